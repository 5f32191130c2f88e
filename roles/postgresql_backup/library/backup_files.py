#!/usr/bin/python
"""Ansible module: the files of a server's backups - programs, settings, units - in one round trip."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import diff_of, write_file

DOCUMENTATION = r"""
module: backup_files
short_description: Keep directories and files in place, and have systemd know its units
description:
  - Makes directories, and writes files that differ, each as a whole. systemd reads its units again when one changed.
  - Schedules are checked by systemd itself before anything is written.
options:
  calendars:
    description: Schedules, as systemd.time(7) has them.
    type: list
    elements: str
    default: []
  directories:
    description: Directories to make, each after its parent. Without owner, group or mode, those that are there stay.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The directory., type: path, required: true}
      owner: {description: Its owner., type: str}
      group: {description: Its group., type: str}
      mode: {description: Its mode in octal; 0755 for one that is made., type: str}
  files:
    description: Files to write, with I(content) or I(secret).
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The file., type: path, required: true}
      content: {description: What is in it., type: str}
      secret: {description: What is in it and is shown nowhere., type: str}
      owner: {description: Its owner., type: str, default: root}
      group: {description: Its group., type: str, default: root}
      mode: {description: Its mode in octal., type: str, default: "0644"}
attributes:
  check_mode: {support: full}
  diff_mode:
    support: full
    description: Secrets are left out.
author:
  - Hardstand
"""

EXAMPLES = r"""
- name: Put the program and its timer in place
  backup_files:
    calendars: ["*-*-* 02:00:00"]
    directories:
      - {path: /usr/local/lib/hardstand}
    files:
      - {path: /usr/local/lib/hardstand/backup.py, content: "{{ lookup('file', 'backup.py') }}\n", mode: "0755"}
"""

RETURN = r"""
paths: {description: What was made, written or given another owner or mode., type: list, returned: always}
"""

UNITS = Path("/etc/systemd/system")


class FilesError(Exception):
    """Something the operator has to put right; the text says what."""


def calendar_problem(calendars: t.Sequence[str]) -> str:
    """Return what systemd says of schedules that it does not understand; empty when it does."""
    if not calendars:
        return ""
    done = subprocess.run(  # noqa: S603
        ["/usr/bin/systemd-analyze", "calendar", *calendars], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


def number(name: str | None, kind: str, check: bool) -> int:
    """Return the number of an account (kind `owner`) or a group; -1, which changes nothing, for none.

    Raises:
        FilesError: there is none of that name, and this is no dry run, before which the package may not have made it.
    """
    if name is None:
        return -1
    try:
        return pwd.getpwnam(name).pw_uid if kind == "owner" else grp.getgrnam(name).gr_gid
    except KeyError:
        if check:
            return -1
        raise FilesError(f"There is no {'account' if kind == 'owner' else 'group'} {name} on this server") from None


def own(path: Path, uid: int, gid: int, mode: int | None, check: bool) -> bool:
    """Give a path its owner, group and mode where they differ; returns whether they did."""
    found = path.stat()
    owned = uid in (-1, found.st_uid) and gid in (-1, found.st_gid)
    if owned and mode in (None, found.st_mode & 0o7777):
        return False
    if not check:
        os.chown(path, uid, gid)
        if mode is not None:
            path.chmod(mode)
    return True


def make_directory(wanted: t.Mapping[str, t.Any], check: bool) -> bool:
    """Make a directory, or correct it; returns whether anything changed."""
    path = Path(wanted["path"])
    uid, gid = number(wanted["owner"], "owner", check), number(wanted["group"], "group", check)
    mode = int(wanted["mode"], 8) if wanted["mode"] else None
    if path.is_dir():
        return own(path, uid, gid, mode, check)
    if not check:
        path.mkdir()
        os.chown(path, uid, gid)
        # After the change of owner, and whatever the umask is.
        path.chmod(0o755 if mode is None else mode)
    return True


def put_file(wanted: t.Mapping[str, t.Any], check: bool) -> tuple[bool, dict[str, str] | None]:
    """Write a file that differs; returns whether anything changed, and what to show of it."""
    path = Path(wanted["path"])
    secret = wanted["secret"] is not None
    data = (wanted["secret"] if secret else wanted["content"] or "").encode()
    uid, gid = number(wanted["owner"], "owner", check), number(wanted["group"], "group", check)
    mode = int(wanted["mode"], 8)
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        before = None
    if before == data:
        return own(path, uid, gid, mode, check), None
    if not check:
        write_file(path, data, mode, uid, gid)
    if secret:
        return True, {**diff_of(path, None, None), "after_header": f"{path} (not shown)"}
    return True, diff_of(path, (before or b"").decode(errors="replace"), data.decode())


def converge(parameters: t.Mapping[str, t.Any], check: bool) -> dict[str, t.Any]:
    """Bring everything to what `parameters` ask for and return the module's result. Raises FilesError or OSError."""
    if problem := calendar_problem(parameters["calendars"]):
        raise FilesError(f"A schedule is wrong, see systemd.time(7): {problem}")
    paths, diffs, units = [], [], False
    for wanted in parameters["directories"]:
        if make_directory(wanted, check):
            paths.append(wanted["path"])
    for wanted in parameters["files"]:
        changed, diff = put_file(wanted, check)
        if changed:
            paths.append(wanted["path"])
            units |= UNITS in Path(wanted["path"]).parents
        if diff:
            diffs.append(diff)
    if units and not check:
        subprocess.run(["/usr/bin/systemctl", "daemon-reload"], check=True)
    return {"changed": bool(paths), "paths": paths, "diff": diffs}


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        {
            "calendars": {"type": "list", "elements": "str", "default": []},
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "owner": {"type": "str"},
                    "group": {"type": "str"},
                    "mode": {"type": "str"},
                },
            },
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "secret": {"type": "str", "no_log": True},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str", "default": "0644"},
                },
            },
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**converge(module.params, module.check_mode))
    except (FilesError, OSError, subprocess.CalledProcessError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
