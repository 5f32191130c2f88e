#!/usr/bin/python
"""Ansible module: what there is to update on a server, and what has to start again for it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: patch_survey
short_description: What there is to update on a server, and what has to start again
description:
  - Reads which packages have a newer version, why a reboot is due, which services run with libraries that are no
    longer on the disk, and which run outside the sandbox that their unit says. Changes nothing.
options:
  never:
    description: Services that are not to be restarted; regular expressions from the beginning of the unit's name.
    type: list
    elements: str
    default: []
author: Hardstand
attributes:
  check_mode:
    support: full
"""

RETURN = r"""
upgrades:
  description: Packages with a newer version.
  type: list
  returned: success
reboot:
  description: Why a reboot is due, one phrase each.
  type: list
  returned: success
services:
  description: Units to restart.
  type: list
  returned: success
waiting:
  description: Units that would have to restart, and are not to.
  type: list
  returned: success
"""

REBOOT_REQUIRED = Path("/run/reboot-required")
# What Hardstand gives a sandbox, and where the process is that should be in it.
SANDBOXED = ("supervisor.service", "nginx.service")


def output(command: list[str]) -> str:
    """Return what a command says; nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def upgrades(simulation: str) -> list[str]:
    """Return the packages that apt-get, simulating, would install, upgrade, or finish where that failed before."""
    return sorted(set(re.findall(r"^(?:Inst|Conf) (\S+)", simulation, re.MULTILINE)))


def needs(report: str) -> tuple[list[str], list[str]]:
    """Return why needrestart wants a reboot, and the services that it wants restarted, from its batch output."""
    values: dict[str, list[str]] = {}
    for line in report.splitlines():
        name, _, value = line.partition(": ")
        values.setdefault(name, []).append(value.strip())
    # 1: the newest runs; 2: there is a newer build of it; 3: a newer version. 0: not known, as in a container.
    outdated = values.get("NEEDRESTART-KSTA", ["0"])[0] in ("2", "3")
    newer = values.get("NEEDRESTART-KEXP", ["a newer one"])[0]
    return [f"kernel {newer}"] if outdated else [], sorted(set(values.get("NEEDRESTART-SVC", [])))


def outside(unit: str) -> bool:
    """Return whether a unit has a sandbox, and its process is not in it."""
    text = output(["/usr/bin/systemctl", "show", unit, "--property", "NoNewPrivileges,MainPID,ActiveState"])
    state = dict(line.partition("=")[::2] for line in text.splitlines())
    if state.get("ActiveState") != "active" or state.get("NoNewPrivileges") != "yes":
        return False
    status = Path(f"/proc/{state.get('MainPID', '0')}/status")
    return status.exists() and "NoNewPrivs:\t0\n" in status.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"never": {"type": "list", "elements": "str", "default": []}}, supports_check_mode=True
    )
    simulation = output(["/usr/bin/apt-get", "--simulate", "--with-new-pkgs", "upgrade"])
    reboot, services = needs(output(["/usr/sbin/needrestart", "-b", "-r", "l"]))
    if REBOOT_REQUIRED.exists():
        packages = Path(f"{REBOOT_REQUIRED}.pkgs")
        names = sorted(set(packages.read_text(encoding="utf-8").split())) if packages.exists() else []
        reboot.append(f"an update of {', '.join(names)}" if names else "an update")
    services = sorted({*services, *(unit for unit in SANDBOXED if outside(unit))})
    waiting = [unit for unit in services if any(re.match(pattern, unit) for pattern in module.params["never"])]
    module.exit_json(
        changed=False,
        upgrades=upgrades(simulation),
        reboot=reboot,
        services=[unit for unit in services if unit not in waiting],
        waiting=waiting,
    )


if __name__ == "__main__":
    main()
