#!/usr/bin/python
"""Ansible module: run supervisord, and never restart it under a program."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: supervisor_service
short_description: Run supervisord, and never restart it under a program
description:
  - Enables and starts supervisord, and makes systemd read its unit again where that changed.
  - Settings that supervisord only reads at its start are applied by a restart while it runs no program. While it
    does, they wait, and every run warns of it.
options:
  dropin:
    {description: The unit's drop-in., type: path, required: true}
  sandbox:
    {description: The drop-in with its sandbox; empty where it has none., type: str, default: ""}
  running_sandbox:
    {description: Copy of that as systemd read it when it last started supervisord., type: path, required: true}
  configuration:
    {description: The file that supervisord reads at its start., type: path, required: true}
  running_configuration:
    {description: Copy of it as supervisord read it., type: path, required: true}
  start_timeout:
    {description: Seconds that a start may take., type: int, default: 60}
"""

RETURN = r"""
actions:
  {description: What was done or, in check mode, would be., type: list, returned: always}
programs:
  {description: Programs that a restart would stop., type: list, returned: when settings wait for a restart}
"""

UNIT = "supervisor.service"
# States of a program that a restart of supervisord cannot hurt.
AT_REST = frozenset({"STOPPED", "EXITED", "FATAL"})


@dataclass(frozen=True)
class Unit:
    """What systemd knows of supervisord."""

    installed: bool
    active: bool
    enabled: bool
    outdated: bool
    open_files: int
    pid: int


def read_unit(module: AnsibleModule, dropins: list[str]) -> Unit:
    """Ask systemd for the unit's state."""
    names = "LoadState,ActiveState,UnitFileState,NeedDaemonReload,DropInPaths,LimitNOFILE,MainPID"
    _, output, _ = module.run_command(["/usr/bin/systemctl", "show", UNIT, "--property", names], check_rc=True)
    values = dict(line.partition("=")[::2] for line in output.splitlines())
    limit = values.get("LimitNOFILE", "0")
    return Unit(
        installed=values["LoadState"] == "loaded",
        active=values["ActiveState"] == "active",
        enabled=values["UnitFileState"] == "enabled",
        # systemd 252, Debian 12's, does not notice a unit's first drop-in by itself.
        outdated=values["NeedDaemonReload"] == "yes"
        or any(Path(path).is_file() and path not in values.get("DropInPaths", "").split() for path in dropins),
        open_files=int(limit) if limit.isdigit() else 0,
        pid=int(values["MainPID"]),
    )


def open_files(pid: int) -> tuple[int, int]:
    """Return the soft and the hard limit of open files of a process; 0 where it has none."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft) if soft.isdigit() else 0, int(hard) if hard.isdigit() else 0
    return 0, 0


def sandboxed(pid: int) -> bool:
    """Return whether a process is in a sandbox: none of ours gives privileges that its parent has not."""
    return "NoNewPrivs:\t1\n" in Path(f"/proc/{pid}/status").read_text()


def sandbox_is_other(pid: int, sandbox: str, running: Path) -> bool:
    """Return whether a process runs in another sandbox than the one on disk, or without, or should be without."""
    if sandboxed(pid) != bool(sandbox):
        return True
    # In check mode it may be on disk nowhere yet.
    if not sandbox or not Path(sandbox).is_file():
        return False
    return not running.is_file() or running.read_bytes() != Path(sandbox).read_bytes()


def restart_is_due(unit: Unit, configuration: Path, running: Path) -> bool:
    """Return whether supervisord runs with other settings than those on disk."""
    if not configuration.is_file():
        return False
    if not running.is_file() or running.read_bytes() != configuration.read_bytes():
        return True
    if not unit.open_files:
        return False
    actual, _ = open_files(unit.pid)
    # systemd sets what it may: in a container that can be less than asked for.
    _, allowed = open_files(1)
    wanted = min(unit.open_files, allowed or unit.open_files)
    return actual < wanted or actual > max(wanted, unit.open_files)


def programs(module: AnsibleModule) -> list[str]:
    """Return the programs that a restart would stop."""
    # Its exit code says whether all programs run, which is not the question.
    _, output, _ = module.run_command(["/usr/bin/supervisorctl", "status"])
    rows = (line.split() for line in output.splitlines())
    return [f"{row[0]} ({row[1].lower()})" for row in rows if len(row) > 1 and row[1] not in AT_REST]


def wait_until_it_answers(module: AnsibleModule, seconds: int) -> None:
    """Return when supervisord answers on its socket; fail with the journal's last lines when it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        code, _, _ = module.run_command(["/usr/bin/supervisorctl", "pid"])
        if code == 0:
            return
        time.sleep(0.2)
    _, journal, _ = module.run_command(["/usr/bin/journalctl", "--unit", UNIT, "--lines", "20", "--no-pager"])
    module.fail_json(msg=f"supervisord does not answer {seconds} s after its start. Its journal ends:\n{journal}")


def main() -> None:
    """Do what is due."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "dropin": {"type": "path", "required": True},
            "sandbox": {"type": "str", "default": ""},
            "running_sandbox": {"type": "path", "required": True},
            "configuration": {"type": "path", "required": True},
            "running_configuration": {"type": "path", "required": True},
            "start_timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    p = module.params
    dropins = [path for path in (p["dropin"], p["sandbox"]) if path]
    actions: list[str] = []

    def act(action: str) -> None:
        actions.append(action)
        if not module.check_mode:
            arguments = [] if action == "daemon-reload" else [UNIT]
            module.run_command(["/usr/bin/systemctl", action, *arguments], check_rc=True)

    unit = read_unit(module, dropins)
    if not unit.installed:
        if not module.check_mode:
            module.fail_json(msg=f"There is no {UNIT} on this server, although its package should be installed")
        module.exit_json(changed=True, actions=["enable", "start"])
    if unit.outdated:
        act("daemon-reload")
        unit = read_unit(module, dropins)
    if not unit.enabled:
        act("enable")

    waiting: list[str] = []
    if not unit.active:
        act("start")
    elif restart_is_due(unit, Path(p["configuration"]), Path(p["running_configuration"])) or sandbox_is_other(
        unit.pid, p["sandbox"], Path(p["running_sandbox"])
    ):
        waiting = programs(module)
        if not waiting:
            act("restart")
    if not module.check_mode and {"start", "restart"} & set(actions):
        wait_until_it_answers(module, p["start_timeout"])
    if waiting:
        module.warn(
            "supervisord keeps running with its earlier settings, because a restart would stop "
            f"{', '.join(waiting)}. At a quiet moment, run on this server: systemctl restart supervisor"
        )
    module.exit_json(changed=bool(actions), actions=actions, programs=waiting)


if __name__ == "__main__":
    main()
