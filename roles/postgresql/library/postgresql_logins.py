#!/usr/bin/python
"""Ansible module: end the logins of an application that none of its servers uses any more."""

from __future__ import annotations

import os
import re
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_host import PostgresqlError, find_cluster, identifier, literal, psql, query

DOCUMENTATION = r"""
---
module: postgresql_logins
short_description: End the logins of an application that none of its servers uses any more
description:
  - Each password of an application has a login of its own, so that a release with a new password and one with the old
    serve side by side. This ends all but one, once the new release serves everywhere. They can log in no more, their
    sessions are closed, and they are dropped.
  - A login is a member of the group that is named after it, with six hexadecimal digits. Other members, such as a
    person's role, are left alone. A group that can log in itself, because it was the application's role before, loses
    that.
options:
  group: {description: Role that has the application's rights., type: str, required: true}
  keep: {description: The login that stays., type: str, required: true}
  seconds: {description: How long to wait for the sessions to end., type: int, default: 30}
author: Hardstand
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: End the logins that no release uses any more
  postgresql_logins:
    group: blog
    keep: blog_1a2b3c
"""

RETURN = r"""
ended:
  description: Logins that were ended.
  type: list
  elements: str
  returned: success
kept:
  description: Those of them that could not be dropped, because something belongs to them, and why.
  type: list
  elements: str
  returned: success
"""

MEMBERS = """
SELECT json_build_object(
  'keep', EXISTS (SELECT FROM pg_roles WHERE rolname = {keep} AND rolcanlogin),
  'group', EXISTS (SELECT FROM pg_roles WHERE rolname = {group} AND rolcanlogin),
  'members', (SELECT coalesce(json_object_agg(r.rolname, r.rolcanlogin ORDER BY r.rolname), '{{}}')
    FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member JOIN pg_roles g ON g.oid = m.roleid
    WHERE g.rolname = {group}))
"""
SESSIONS = "SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {name}) ended"


def to_end(group: str, keep: str, members: t.Iterable[str]) -> list[str]:
    """Return which members of the group are logins of former passwords."""
    return [name for name in members if re.fullmatch(re.escape(group) + "_[0-9a-f]{6}", name) and name != keep]


def end(name: str, seconds: int) -> None:
    """Close a login for good, and its sessions.

    Raises PostgresqlError when the sessions do not end in time.
    """
    psql(f"ALTER ROLE {identifier(name)} NOLOGIN PASSWORD NULL;")
    deadline = time.monotonic() + seconds
    while int(psql(SESSIONS.format(name=literal(name)))):
        if time.monotonic() > deadline:
            raise PostgresqlError(f"The sessions of {name} have not ended after {seconds} s.")
        time.sleep(0.1)


def drop(name: str) -> str:
    """Drop a login; returns why PostgreSQL refuses to, or nothing."""
    try:
        psql(f"DROP ROLE {identifier(name)};")
    except PostgresqlError as error:
        return f"{name}: {error}"
    return ""


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "group": {"type": "str", "required": True},
            "keep": {"type": "str", "required": True},
            "seconds": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    group, keep = module.params["group"], module.params["keep"]
    try:
        cluster = find_cluster()
        if module.check_mode and not (cluster and cluster.running):
            module.exit_json(changed=False, ended=[], kept=[])
        found = query(MEMBERS.format(group=literal(group), keep=literal(keep)))
        members = to_end(group, keep, found["members"])
        ending = [name for name in members if found["members"][name]] + ([group] if found["group"] else [])
        if members and not found["keep"] and not module.check_mode:
            module.fail_json(
                msg=f"There is no login {keep}, so no other one is ended. Deploy with the role's main part first."
            )
        refused = {}
        if not module.check_mode:
            for name in ending:
                end(name, module.params["seconds"])
            # Those that an earlier run could not drop are tried again.
            refused = {name: reason for name in members if (reason := drop(name))}
    except PostgresqlError as error:
        module.fail_json(msg=str(error))
    changed = bool(ending) or (not module.check_mode and len(refused) < len(members))
    module.exit_json(changed=changed, ended=ending, kept=list(refused.values()))


if __name__ == "__main__":
    main()
