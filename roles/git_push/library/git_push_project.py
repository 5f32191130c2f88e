#!/usr/bin/python
"""Ansible module: the playbooks on a control host, and the password of its vault."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import shutil
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import replace_symlink, write_file

DOCUMENTATION = r"""
module: git_push_project
short_description: Bring playbooks and an environment to a control host, whole or not at all
description:
  - The tree appears under a name made of what is in it, and becomes current by one rename(2). A deploy that runs stays
    with the tree that it began with; trees and virtualenvs that are not current go when none runs.
  - Called by the action plugin of the same name, which reads and ships them.
options:
  root:
    {description: Directory of the trees. The current one is its link C(project)., type: path, required: true}
  digest:
    {description: Name of what is to be current., type: str, required: true}
  archive:
    {description: "The tree, as a tar archive. Without it the module only says whether it needs it.", type: path}
  user:
    {description: Account that may read it., type: str, required: true}
  lock:
    {description: File that a deploy holds a lock on., type: path, required: true}
  keep:
    {description: Names of other things in the directory that are in use., type: list, elements: str, default: []}
  vault_password_file:
    {description: Where the password of the vault goes., type: path, required: true}
  vault_password:
    {description: The password., type: str, required: true}
"""


def unpack(module: AnsibleModule, archive: str, tree: Path, user: str) -> None:
    """Unpack an archive beside its place and move it there."""
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=tree.parent) as directory:
        incoming = Path(directory, "tree")
        incoming.mkdir(mode=0o750)
        module.run_command(
            ["tar", "--extract", "--file", archive, "--directory", str(incoming), "--no-same-owner"], check_rc=True
        )
        # An environment names servers and settings: not for every account of this host.
        os.chown(incoming, 0, grp.getgrnam(user).gr_gid)
        incoming.chmod(0o750)
        incoming.rename(tree)


def make_current(link: Path, tree: Path) -> bool:
    """Point the link at a tree; returns whether it pointed elsewhere."""
    if link.is_symlink() and str(link.readlink()) == tree.name:
        return False
    replace_symlink(link, tree.name)
    return True


def write_password(file: Path, password: str, user: str) -> None:
    """Write the password, for its account alone, in one step."""
    account = pwd.getpwnam(user)
    write_file(file, f"{password}\n", 0o400, account.pw_uid, account.pw_gid)


def password_is(file: Path, password: str, user: str) -> bool:
    """Tell whether the file is as it should be."""
    try:
        status = file.stat()
        right = (status.st_mode & 0o777, status.st_uid) == (0o400, pwd.getpwnam(user).pw_uid)
        return right and file.read_text(encoding="utf-8") == f"{password}\n"
    except (FileNotFoundError, KeyError):
        return False


def prune(root: Path, current: set[str], lock: Path) -> None:
    """Remove what is not current, unless a deploy runs that may have begun with it."""
    descriptor = os.open(lock, os.O_RDWR) if lock.exists() else -1
    try:
        if descriptor >= 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in [*root.glob("project-*"), *root.glob("venv-*"), *root.glob(".incoming-*")]:
            if path.name not in current:
                shutil.rmtree(path)
    except BlockingIOError:
        pass  # the next run removes it
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "digest": {"type": "str", "required": True},
            "archive": {"type": "path"},
            "user": {"type": "str", "required": True},
            "lock": {"type": "path", "required": True},
            "keep": {"type": "list", "elements": "str", "default": []},
            "vault_password_file": {"type": "path", "required": True, "no_log": False},
            "vault_password": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    root, user = Path(p["root"]), p["user"]
    tree, link, password_file = root / f"project-{p['digest']}", root / "project", Path(p["vault_password_file"])
    try:
        same_password = password_is(password_file, p["vault_password"], user)
        if module.check_mode:
            current = link.is_symlink() and str(link.readlink()) == tree.name
            module.exit_json(changed=not (current and same_password), archive_wanted=False)
        if not tree.is_dir() and not p["archive"]:
            module.exit_json(changed=False, archive_wanted=True)
        if not tree.is_dir():
            unpack(module, p["archive"], tree, user)
        if not same_password:
            write_password(password_file, p["vault_password"], user)
        changed = make_current(link, tree) or not same_password
        prune(root, {tree.name, *p["keep"]}, Path(p["lock"]))
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, archive_wanted=False)


if __name__ == "__main__":
    main()
