#!/usr/bin/python
"""Ansible module: what there is to update on a server, and what has to start again for it."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.patch_host import NEEDRESTART, SANDBOXED, output, outside, reboot, services

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
interrupted:
  description: Whether dpkg was cut off half-way, such as by a loss of power, and refuses all else until that is done.
  type: bool
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

# What dpkg has begun and not yet written to its own state; apt-get asks the same (pkgDebianSystem::CheckUpdates).
JOURNAL = Path("/var/lib/dpkg/updates")


def interrupted() -> bool:
    """Return whether dpkg was cut off half-way."""
    return any(path.name.isdigit() for path in JOURNAL.iterdir())


def upgrades(simulation: str) -> list[str]:
    """Return the packages that apt-get, simulating, would install, upgrade, or finish where that failed before."""
    return sorted(set(re.findall(r"^(?:Inst|Conf) (\S+)", simulation, re.MULTILINE)))


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"never": {"type": "list", "elements": "str", "default": []}}, supports_check_mode=True
    )
    simulation = output(["/usr/bin/apt-get", "--simulate", "--with-new-pkgs", "upgrade"])
    report = output([NEEDRESTART, "-b", "-r", "l"])
    found = sorted({*services(report), *(unit for unit in SANDBOXED if outside(unit))})
    waiting = [unit for unit in found if any(re.match(pattern, unit) for pattern in module.params["never"])]
    module.exit_json(
        changed=False,
        upgrades=upgrades(simulation),
        interrupted=interrupted(),
        reboot=reboot(report),
        services=[unit for unit in found if unit not in waiting],
        waiting=waiting,
    )


if __name__ == "__main__":
    main()
