#!/usr/bin/python
"""Ansible module: record a deploy that succeeded, remove what is no longer needed, free the lock."""

from __future__ import annotations

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import (
    Account,
    Layout,
    ReleaseError,
    append_record,
    deploy_record,
    free_lock,
    read_records,
    remove_tree,
    run,
)

DOCUMENTATION = r"""
module: release_finish
short_description: Record a deploy, prune old releases and virtualenvs, free the deploy lock
description:
  - Adds a line to C(deploys.jsonl) when the deploy changed what serves.
  - Keeps the live release, the one before it, and the newest that have served; never counts one that has not.
  - Keeps a virtualenv as long as a release refers to it.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: The release that serves., type: str, required: true}
  record:
    description:
      - Whether the deploy changed what serves. A release that serves and is not on record is recorded in any case,
        because the run that made it live was cut off before it could.
    type: bool
    required: true
  keep: {description: Releases to keep., type: int, default: 5}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
  slot: {description: The live slot., type: str, default: ""}
  rolled_back:
    description: The release that was left for an earlier one, if any. It no longer counts as one to go back to.
    type: str
    default: ""
"""

RETURN = r"""
removed: {description: Releases and virtualenvs that were removed., type: list, returned: success}
"""


def last_live(records: list[dict[str, t.Any]]) -> str | None:
    """Return the release that the records say went live last."""
    return next((record["release"] for record in reversed(records) if record.get("outcome") == "live"), None)


def releases_to_keep(records: list[dict[str, t.Any]], live: str, keep: int) -> set[str]:
    """Return the releases to keep: the live one, the one before it, and the newest that have served."""
    served = [record["release"] for record in records if record.get("outcome") == "live"]
    newest = list(dict.fromkeys([live, *reversed(served)]))
    return set(newest[: max(keep, 2)])


def prune(layout: Layout, live: str, keep: int) -> list[str]:
    """Remove releases and virtualenvs that are no longer needed; returns their names."""
    kept = releases_to_keep(read_records(layout), live, keep)
    removed = []
    venvs = set()
    commits = set()
    for path in sorted(layout.releases.iterdir()):
        if path.name in kept:
            release = layout.release(path.name) or {}
            venvs.add(release.get("venv"))
            commits.add(release.get("commit"))
        else:
            remove_tree(path)
            removed.append(path.name)
    for path in sorted(layout.venvs.iterdir()):
        if path.name not in venvs and not path.name.startswith("."):
            remove_tree(path)
            removed.append(path.name)
    forget_commits(layout, commits)
    return removed


def forget_commits(layout: Layout, kept: set[str | None]) -> None:
    """Let git collect the commits that no release needs any more; what cannot be forgotten now can be the next time."""
    try:
        owner = layout.repository.stat()
    except FileNotFoundError:
        return
    builder = Account("", owner.st_uid, owner.st_gid)
    git = ["git", f"--git-dir={layout.repository}"]
    refs = run([*git, "for-each-ref", "--format=%(refname)", "refs/releases"], user=builder).stdout.split()
    gone = [ref for ref in refs if ref.rpartition("/")[2] not in kept]
    if gone:
        # git itself and not unlink(2): its housekeeping moves references from their files into a common one.
        run([*git, "update-ref", "--stdin"], user=builder, stdin="".join(f"delete {ref}\n" for ref in gone).encode())


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "release_id": {"type": "str", "required": True},
            "record": {"type": "bool", "required": True},
            "keep": {"type": "int", "default": 5},
            "deploy": {"type": "dict", "required": True},
            "slot": {"type": "str", "default": ""},
            "rolled_back": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=False, removed=[])
    layout = Layout(p["root"], p["app"])
    removed: list[str] = []
    record = p["record"] or last_live(read_records(layout)) != p["release_id"]
    try:
        if record:
            if p["rolled_back"] not in ("", p["release_id"]):
                append_record(layout, deploy_record(p["deploy"], p["rolled_back"], "rolled back"))
            append_record(layout, {**deploy_record(p["deploy"], p["release_id"], "live"), "slot": p["slot"]})
            layout.pending.unlink(missing_ok=True)
            removed = prune(layout, p["release_id"], p["keep"])
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=f"Release {p['release_id']} serves, but what it replaces could not be removed: {error}")
    finally:
        free_lock(p["deploy"].get("lock") or {})
    module.exit_json(changed=record, removed=removed)


if __name__ == "__main__":
    main()
