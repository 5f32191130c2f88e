#!/usr/bin/python
"""Ansible module: files, account defaults and kernel settings of a hardened server, in one round trip."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import diff_of, write_file

DOCUMENTATION = r"""
---
module: hardening_system
short_description: Bring files, account defaults and kernel settings of a server to what they should be
description:
  - Writes files, each after the check that it may have, and none that differs in nothing.
  - Sets values in C(/etc/login.defs), which has no place for files of others. The rest of it stays as it is.
  - Sets kernel settings as they should be now; a file in C(/etc/sysctl.d) among I(files) does it at boot. In a
    container only those of its own network are its own; the others, and what it cannot set, are left alone.
options:
  files:
    description:
      - Files to write, each with C(path), C(content), and optionally C(mode) and C(check), a command that gets the path
        of the new content as its last argument and fails when it is not right.
    type: list
    elements: dict
    default: []
  absent:
    description: Files to remove.
    type: list
    elements: path
    default: []
  login_defs:
    description: Names and values in C(/etc/login.defs).
    type: dict
    default: {}
  sysctl:
    description: Names and values of kernel settings.
    type: dict
    default: {}
  units:
    description: Units of systemd's of which to say whether they run and start at boot.
    type: list
    elements: str
    default: []
author: Hardstand
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

RETURN = r"""
paths:
  description: Files that were written or removed, or would be.
  type: list
  returned: success
sysctl:
  description: Kernel settings that were changed, or would be.
  type: list
  returned: success
refused:
  description: Kernel settings that this server cannot change.
  type: list
  returned: success
units:
  description: Those of I(units) that do not run, or do not start at boot.
  type: list
  returned: success
container:
  description: Whether the server is a container.
  type: bool
  returned: success
"""

LOGIN_DEFS = Path("/etc/login.defs")
PROC_SYS = Path("/proc/sys")


class RefusedError(Exception):
    """A file's own check says no."""


def is_container() -> bool:
    """Ask systemd whether this is a container."""
    done = subprocess.run(["/usr/bin/systemd-detect-virt", "--container", "--quiet"], check=False)
    return done.returncode == 0


def with_values(text: str, values: dict[str, Any]) -> str:
    """Return the text of a login.defs in which each name of `values` has its value, once."""
    for name, value in values.items():
        line = f"{name}\t{value}"
        pattern = re.compile(rf"^[ \t]*{re.escape(name)}[ \t].*$", re.MULTILINE)
        if not pattern.search(text):
            text = f"{text.rstrip()}\n{line}\n"
        elif [found.split() for found in pattern.findall(text)] != [[name, str(value)]]:
            text = pattern.sub(line, text, count=1)
            head, _, tail = text.partition(f"{line}\n")
            text = f"{head}{line}\n" + re.sub(rf"(?m)^[ \t]*{re.escape(name)}[ \t].*\n", "", tail)
    return text


def checked(content: str, command: list[str], path: str) -> None:
    """Ask a file's check about its new content.

    Raises:
        RefusedError: it says no.
    """
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            output = (done.stderr + done.stdout).replace(file.name, path).strip()
            raise RefusedError(f"{path} is not valid; the one that is there was kept.\n{output}")


def set_kernel(wanted: dict[str, Any], *, container: bool, check: bool) -> tuple[list[str], list[str]]:
    """Bring kernel settings to their values; returns the names of those that changed, and of those that could not."""
    changed: list[str] = []
    refused: list[str] = []
    for name, value in wanted.items():
        path = PROC_SYS / name.replace(".", "/")
        try:
            now = path.read_text().split()
        except OSError:  # this kernel has none of that name
            refused.append(name)
            continue
        if now == str(value).split():
            continue
        # A container that may set what is not its own would set it for its host.
        if (container and not name.startswith("net.")) or not os.access(path, os.W_OK):
            refused.append(name)
            continue
        try:
            if not check:
                path.write_text(str(value))
        except OSError:
            refused.append(name)
        else:
            changed.append(name)
    return changed, refused


def at_rest(units: list[str]) -> list[str]:
    """Return the units that do not run, or do not start at boot; a running one's files may have changed as well."""
    found = []
    for unit in units:
        names = "ActiveState,UnitFileState,NeedDaemonReload,ConditionResult,ConditionTimestampMonotonic"
        done = subprocess.run(  # noqa: S603
            ["/usr/bin/systemctl", "show", unit, "--property", names], capture_output=True, text=True, check=False
        )
        state = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
        # systemd has looked, and this kernel has not what the unit needs: AppArmor, say.
        pointless = state.get("ConditionResult") == "no" and state.get("ConditionTimestampMonotonic") != "0"
        runs = state.get("ActiveState") == "active" or pointless
        if not runs or state.get("UnitFileState") != "enabled" or state.get("NeedDaemonReload") != "no":
            found.append(unit)
    return found


def converge(parameters: dict[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """Bring the server to what `parameters` ask for and return the module's result; with `check`, write nothing.

    Raises:
        RefusedError: a file's own check says no; nothing was written then.
    """
    container = is_container()
    wanted: list[tuple[Path, str | None, int]] = []
    for file in parameters["files"]:
        wanted.append((Path(file["path"]), file["content"], int(file.get("mode") or "0644", 8)))
    wanted += [(Path(path), None, 0) for path in parameters["absent"]]
    if parameters["login_defs"] and LOGIN_DEFS.exists():
        text = with_values(LOGIN_DEFS.read_text(encoding="utf-8"), parameters["login_defs"])
        wanted.append((LOGIN_DEFS, text, LOGIN_DEFS.stat().st_mode & 0o7777))

    changes = []
    for path, content, mode in wanted:
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if before != content or (content is not None and path.stat().st_mode & 0o7777 != mode):
            changes.append((path, before, content, mode))
    checks = {file["path"]: file.get("check") for file in parameters["files"] if file.get("check")}
    for path, _, content, _ in changes:
        command = checks.get(str(path))
        # In check mode the program that checks may be yet to come.
        if content is not None and command and (Path(command[0]).exists() or not check):
            checked(content, command, str(path))
    if not check:
        for path, _, content, mode in changes:
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, content, mode)
    changed, refused = set_kernel(parameters["sysctl"], container=container, check=check)
    result: dict[str, Any] = {
        "changed": bool(changes or changed),
        "paths": [str(path) for path, *_ in changes],
        "sysctl": changed,
        "refused": refused,
        "container": container,
        "units": at_rest(parameters["units"]),
    }
    if diff:
        result["diff"] = [diff_of(path, before, content) for path, before, content, _ in changes]
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    "mode": {"type": "str", "default": "0644"},
                    "check": {"type": "list", "elements": "str"},
                },
            },
            "absent": {"type": "list", "elements": "path", "default": []},
            "login_defs": {"type": "dict", "default": {}},
            "sysctl": {"type": "dict", "default": {}},
            "units": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        result = converge(module.params, check=module.check_mode, diff=module._diff)
    except (RefusedError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
