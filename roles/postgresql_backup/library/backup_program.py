#!/usr/bin/python
"""Ansible module: run a command of the backups' program, and fail with its own words."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: backup_program
short_description: Run a command of the program that makes and restores backups
description:
  - A failure's message is what the program says, and nothing else. In check mode nothing is run.
options:
  argv:
    description: The program and its arguments.
    type: list
    elements: str
    required: true
  unit:
    description:
      - Run it as a systemd unit of this name. It goes on when the connection to the server is lost, and what it has
        started ends with it.
    type: str
    default: ""
  properties:
    description: Properties of that unit.
    type: list
    elements: str
    default: []
  changes:
    description: Whether it changes the server. V(told), it says so in a line that begins with C(changed:).
    type: str
    choices: [always, never, told]
    default: always
  optional:
    description: Do nothing where the program is not there.
    type: bool
    default: false
attributes:
  check_mode: {support: full}
author:
  - Hardstand
"""

EXAMPLES = r"""
- name: Make a backup
  backup_program:
    argv: [/usr/local/lib/hardstand/postgresql_backup.py, --app, blog, run]
"""

RETURN = r"""
lines: {description: What it said., type: list, returned: always}
"""


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        {
            "argv": {"type": "list", "elements": "str", "required": True},
            "unit": {"type": "str", "default": ""},
            "properties": {"type": "list", "elements": "str", "default": []},
            "changes": {"type": "str", "choices": ["always", "never", "told"], "default": "always"},
            "optional": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    program = Path(p["argv"][0])
    if module.check_mode or (p["optional"] and not program.exists()):
        module.exit_json(changed=module.check_mode and p["changes"] == "always", lines=[])
    if not program.exists():
        module.fail_json(msg=f"There is no {program} on this server; deploy first.", lines=[])
    command = list(p["argv"])
    if p["unit"]:
        options = ["--quiet", "--wait", "--pipe", "--collect", f"--unit={p['unit']}"]
        command = ["systemd-run", *options, *(f"--property={each}" for each in p["properties"]), *command]
    done = subprocess.run(  # noqa: S603
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        # The last thing it says begins with "error:".
        before, _, problem = done.stderr.strip().rpartition("error: ")
        module.fail_json(msg=problem or before or f"{program} ended with code {done.returncode}", lines=lines)
    changed = p["changes"] == "always" or (
        p["changes"] == "told" and any(line.startswith("changed:") for line in lines)
    )
    module.exit_json(changed=changed, lines=lines)


if __name__ == "__main__":
    main()
