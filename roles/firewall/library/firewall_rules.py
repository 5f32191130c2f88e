#!/usr/bin/python
"""Ansible module: the rules of this server's firewall, with a way back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import diff_of, write_file
from ansible.module_utils.undo_timer import SYSTEMCTL, ChangeError, UndoTimer, run

DOCUMENTATION = r"""
module: firewall_rules
short_description: The rules of this server's firewall, with a way back
description:
  - Tells the kernel rules that it does not have yet, as one transaction. Other tables are never touched.
  - New rules are the kernel's alone until I(state=kept) writes them down for the next boot. A timer on the server goes
    back to the ones before after I(undo_seconds), so that nobody needs to reach the server for it.
  - The action plugin of the same name calls it for each step, and proves in between that one can log in.
options:
  state:
    description:
      - V(applied) tells the kernel, and arms the timer. V(kept) disarms it. V(undone) goes back now. V(absent) takes
        the firewall away.
    type: str
    choices: [applied, kept, undone, absent]
    default: applied
  rules:
    description: Input for nft that replaces the table C(inet hardstand_firewall).
    type: str
    default: ""
  undo_seconds:
    description: When the timer goes off.
    type: int
    default: 60
"""

RETURN = r"""
armed:
  {description: Whether new rules wait to be kept or undone., type: bool, returned: always}
"""

TABLE = "hardstand_firewall"
RULES = Path("/etc/hardstand/firewall.nft")
STATE = Path("/var/lib/hardstand/firewall")
UNIT_FILE = Path("/etc/systemd/system/hardstand-firewall.service")
DROP_IN = Path("/etc/systemd/system/nftables.service.d/hardstand-firewall.conf")
UNIT = "hardstand-firewall.service"
TIMER = UndoTimer("hardstand-firewall-undo", STATE / "undo", "firewall_undo_seconds")
NFT = "/usr/sbin/nft"

# Seconds in which the kernel gets to know the connections that there are, before it drops what belongs to none.
LEARN_SECONDS = 2.0
LEARN = f"""
table inet {TABLE} {{
    chain learn_input {{ type filter hook input priority filter; policy accept; ct state new accept; }}
    chain learn_output {{ type filter hook output priority filter; policy accept; ct state new accept; }}
}}
"""


def loaded() -> str:
    """Return a digest of the kernel's rules, without what they have counted; empty when there are none."""
    done = run(NFT, "-s", "-t", "list", "table", "inet", TABLE, check=False)
    return hashlib.sha256(done.stdout.encode()).hexdigest() if done.returncode == 0 else ""


def refuse_a_kernel_that_takes_no_rules() -> None:
    """Raise ChangeError where nobody may set rules, as in a container without the capability NET_ADMIN."""
    done = run(NFT, "list", "tables", check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nft failed"])[0]
        raise ChangeError(
            f"this kernel lets root set no rules ({said}). "
            "A container needs the capability NET_ADMIN; where the host has the firewall: firewall_enabled: false."
        )


def is_current(rules: str) -> bool:
    """Return whether these rules are the kernel's and the next boot's."""
    try:
        record = json.loads((STATE / "loaded.json").read_text())
    except (OSError, ValueError):
        return False
    written = RULES.is_file() and RULES.read_text() == rules
    return bool(written and loaded() and loaded() == record.get("kernel"))


def apply(rules: str, seconds: int, check: bool) -> dict[str, Any]:
    """Tell the kernel, with a timer that goes back."""
    before = RULES.read_text() if RULES.is_file() else ""
    result: dict[str, Any] = {
        "changed": True,
        "armed": False,
        "diff": diff_of(RULES, before, rules),
    }
    if check and not Path(NFT).exists():
        return result
    refuse_a_kernel_that_takes_no_rules()
    run(NFT, "-c", "-f", "-", stdin=rules)
    # What an earlier run has left is neither kept nor undone, so it is proven now.
    if is_current(rules) and not TIMER.script.exists():
        return {**result, "changed": False}
    if check:
        return result

    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    TIMER.disarm()
    known = bool(loaded())
    candidate = STATE / "candidate.nft"
    candidate.write_text(rules)
    # Back to what an operator has proven once, or to no firewall: whatever else the kernel has may be the mistake.
    back = f"{NFT} -f {RULES}" if known and before else f"{NFT} delete table inet {TABLE}"
    TIMER.script.write_text(
        "#!/bin/sh\n# Made by role firewall: goes back from rules that nobody has proven to work.\n"
        f"{back}\nrm -f {candidate} {TIMER.script}\n"
    )
    TIMER.arm(seconds)
    try:
        if not known:
            run(NFT, "-f", "-", stdin=LEARN)
            time.sleep(LEARN_SECONDS)
        run(NFT, "-f", candidate)
    except ChangeError:
        TIMER.undo()
        raise
    return {**result, "armed": True}


def keep() -> None:
    """Let the new rules stand. Raises ChangeError when the server has gone back already."""
    TIMER.stop()
    candidate = STATE / "candidate.nft"
    RULES.parent.mkdir(mode=0o755, exist_ok=True)
    write_file(RULES, candidate.read_text(), 0o644)
    (STATE / "loaded.json").write_text(json.dumps({"kernel": loaded()}))
    for file in (candidate, TIMER.script):
        file.unlink()
    TIMER.disarm()


def remove(check: bool) -> bool:
    """Take the firewall away; returns whether there was one."""
    present = UNIT_FILE.exists() or RULES.exists() or STATE.exists()
    if not present or check:
        return present
    TIMER.disarm()
    DROP_IN.unlink(missing_ok=True)
    if UNIT_FILE.exists():
        run(SYSTEMCTL, "disable", "--now", UNIT)
        UNIT_FILE.unlink()
    run(SYSTEMCTL, "daemon-reload")
    if Path(NFT).exists():
        run(NFT, "delete", "table", "inet", TABLE, check=False)
    RULES.unlink(missing_ok=True)
    shutil.rmtree(STATE, ignore_errors=True)
    return True


def main() -> None:
    """Do one step."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["applied", "kept", "undone", "absent"], "default": "applied"},
            "rules": {"type": "str", "default": ""},
            "undo_seconds": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        if p["state"] == "applied":
            module.exit_json(**apply(p["rules"], p["undo_seconds"], module.check_mode))
        changed = p["state"] == "undone"
        if p["state"] == "absent":
            changed = remove(module.check_mode)
        elif not module.check_mode:
            (keep if p["state"] == "kept" else TIMER.undo)()
        module.exit_json(changed=changed, armed=False)
    except (ChangeError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
