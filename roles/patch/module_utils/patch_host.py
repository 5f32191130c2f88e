"""What waits on a server: a reboot, a service outside its sandbox, updates that ought to come by themselves.

Shared by the modules of role patch, which act on it, and by role status, which only says so.
"""

from __future__ import annotations

import re
import subprocess
import typing as t
from pathlib import Path

REBOOT_REQUIRED = Path("/run/reboot-required")
# What Hardstand gives a sandbox.
SANDBOXED = ("supervisor.service", "nginx.service")

NEEDRESTART = "/usr/sbin/needrestart"
UNATTENDED = Path("/usr/bin/unattended-upgrade")
# apt.systemd.daily touches it after each run of unattended-upgrade that went well.
UNATTENDED_STAMP = Path("/var/lib/apt/periodic/upgrade-stamp")


def output(command: t.Sequence[str]) -> str:
    """Return what a command says; nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _values(report: str, name: str) -> list[str]:
    """Return the values that needrestart's batch output has under a name."""
    return re.findall(rf"^{name}: *(.*?) *$", report, re.MULTILINE)


def services(report: str) -> list[str]:
    """Return the services that needrestart wants restarted, from its batch output."""
    return sorted(set(_values(report, "NEEDRESTART-SVC")))


def reboot(report: str) -> list[str]:
    """Return why a reboot is due, one phrase each, from needrestart's batch output and what packages have asked for."""
    reasons = []
    # 1: the newest runs; 2: there is a newer build of it; 3: a newer version. 0: not known, as in a container.
    if "".join(_values(report, "NEEDRESTART-KSTA")) in ("2", "3"):
        version = "".join(_values(report, "NEEDRESTART-KEXP"))
        reasons.append(f"kernel {version}" if version else "a newer kernel")
    if REBOOT_REQUIRED.exists():
        packages = Path(f"{REBOOT_REQUIRED}.pkgs")
        names = sorted(set(packages.read_text(encoding="utf-8").split())) if packages.exists() else []
        reasons.append(f"an update of {', '.join(names)}" if names else "an update")
    return reasons


def outside(unit: str) -> bool:
    """Return whether a unit has a sandbox, and its process is not in it."""
    text = output(["/usr/bin/systemctl", "show", unit, "--property", "NoNewPrivileges,MainPID,ActiveState"])
    state = dict(line.partition("=")[::2] for line in text.splitlines())
    if state.get("ActiveState") != "active" or state.get("NoNewPrivileges") != "yes":
        return False
    status = Path(f"/proc/{state.get('MainPID', '0')}/status")
    return status.exists() and "NoNewPrivs:\t0\n" in status.read_text(encoding="utf-8", errors="replace")


def unattended() -> tuple[float, int] | None:
    """Return when updates last came by themselves and every how many days they should; None where they do not.

    The moment is in seconds since the epoch. Before the first one, it is when the server was told to.
    """
    text = output(
        [
            *("/usr/bin/apt-config", "shell"),
            *("enabled", "APT::Periodic::Enable", "days", "APT::Periodic::Unattended-Upgrade"),
        ]
    )
    said = dict(re.findall(r"^(\w+)='(.*)'$", text, re.MULTILINE))
    days = said.get("days", "0")
    if not UNATTENDED.exists() or said.get("enabled", "1") == "0" or not days.isdecimal() or days == "0":
        return None
    if UNATTENDED_STAMP.exists():
        return UNATTENDED_STAMP.stat().st_mtime, int(days)
    # When it was installed; the time of its content is that of its package.
    return UNATTENDED.stat().st_ctime, int(days)
