#!/usr/bin/python
"""Ansible module: find out whether a server can be deployed to, and take its deploy lock."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import typing as t
from pathlib import Path

try:
    from ansible.module_utils.basic import AnsibleModule
    from ansible.module_utils.deploy_lock import DeployLock
except ImportError:  # the action plugin imports this file for its functions, on the control node
    DeployLock = None

DOCUMENTATION = r"""
module: preflight_host
short_description: Check a server, take its deploy lock and return the facts that the roles need
description:
  - Checks the operating system, systemd, root and free disk space, then takes the deploy lock, all in one round trip.
  - Changes nothing on the server but its lock, which lives in memory and never counts as a change. In check mode the
    lock is neither looked at nor taken.
  - The action plugin of the same name adds what only the control node can do - say which file defines the server, wait
    for the lock, recognise a holder that is dead, and install Python on a server that has none.
options:
  platforms:
    description: Platforms that are let through, such as V(debian-12), each with V(tested) or V(untested).
    type: dict
    required: true
  directories:
    description: Directories whose file systems need space. They need not exist yet.
    type: list
    elements: path
    default: []
  min_free_mb:
    description: Free space that each of these file systems must have, in MB (2**20 bytes).
    type: int
    default: 0
  lock:
    description: The deploy lock to take; nothing is taken without it.
    type: dict
    suboptions:
      path:
        description: The lock's file.
        type: path
        required: true
      token:
        description: What tells this run from any other.
        type: str
        required: true
      holder:
        description: What the file shall say about this run.
        type: dict
        required: true
      lease:
        description: Seconds until the lock frees itself.
        type: int
        required: true
      dead_token:
        description: Token of a holder that is known to be dead.
        type: str
        default: ""
      force:
        description: Take the lock from whoever holds it.
        type: bool
        default: false
attributes:
  check_mode:
    support: full
author:
  - Hardstand
"""

EXAMPLES = r"""
- name: Check the server and take the deploy lock
  preflight_host:
    platforms: {debian-12: tested, debian-13: tested}
    directories: [/opt, /srv]
    min_free_mb: 2048
"""

RETURN = r"""
lock:
  description: Path and token of the lock that was taken; empty when none was.
  type: dict
  returned: success
lock_holder:
  description: What the lock's file says of another holder; the lock was not taken then.
  type: dict
  returned: when the lock is held
problems:
  description: Why the server cannot be deployed to.
  type: list
  elements: str
  returned: failure
"""

DISTRIBUTIONS = {"debian": "Debian", "ubuntu": "Ubuntu"}


def parse_os_release(text: str) -> dict[str, str]:
    """Return the fields of os-release(5), such as ID and VERSION_ID."""
    fields = {}
    for line in text.splitlines():
        key, separator, value = line.strip().partition("=")
        if separator and not key.startswith("#"):
            fields[key] = "".join(shlex.split(value))
    return fields


def platform_problem(release: t.Mapping[str, str], platforms: t.Mapping[str, str]) -> tuple[str, str]:
    """Judge the operating system; returns a problem and a warning, either empty."""
    key = f"{release.get('ID', 'unknown')}-{release.get('VERSION_ID', 'unknown')}"
    name = release.get("PRETTY_NAME", key)
    if key not in platforms:
        supported = ", ".join(name.replace("-", " ").capitalize() for name in sorted(platforms))
        return f"runs {name}, which is not supported; supported are {supported}", ""
    if platforms[key] != "tested":
        return "", f"runs {name}, on which Hardstand is untested; it takes the same path as Debian"
    return "", ""


def disk_problems(free: t.Mapping[str, int], min_free_mb: int) -> list[str]:
    """Judge the free space: MB by the directories on each file system."""
    return [
        f"has {megabytes} MB free for {directories}, and {min_free_mb} MB are needed;"
        " make room, or lower preflight_min_free_mb"
        for directories, megabytes in free.items()
        if megabytes < min_free_mb
    ]


def free_megabytes(directories: t.Iterable[str]) -> dict[str, int]:
    """Return the MB (2**20 bytes) that root may still use on each file system, by the directories on it."""
    names: dict[int, list[str]] = {}
    megabytes: dict[int, int] = {}
    for directory in directories:
        existing = Path(directory)
        while not existing.is_dir():
            existing = existing.parent
        device = existing.stat().st_dev
        status = os.statvfs(existing)
        names.setdefault(device, []).append(directory)
        megabytes[device] = status.f_bavail * status.f_frsize // 2**20
    return {" and ".join(names[device]): free for device, free in megabytes.items()}


def own_address() -> str:
    """Return the IPv4 address that this server has for the rest of the world; empty when it has no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: connecting a datagram socket only chooses the route. The address is one of RFC 5737's.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def facts(release: t.Mapping[str, str]) -> dict[str, t.Any]:
    """Return what roles may read from ``ansible_facts``, under the names that M(setup) uses."""
    memory = Path("/proc/meminfo").read_text(encoding="ascii")
    memory_kb = next(int(line.split()[1]) for line in memory.splitlines() if line.startswith("MemTotal:"))
    version = release.get("VERSION_ID", "")
    return {
        "ansible_distribution": DISTRIBUTIONS.get(release.get("ID", ""), release.get("NAME", "")),
        "ansible_distribution_release": release.get("VERSION_CODENAME", ""),
        "ansible_distribution_version": version,
        "ansible_distribution_major_version": version.split(".")[0],
        "ansible_architecture": platform.machine(),
        "ansible_processor_vcpus": os.cpu_count() or 1,
        "ansible_memtotal_mb": memory_kb // 1024,
        "ansible_hostname": platform.node().split(".")[0],
        "ansible_default_ipv4": {"address": address} if (address := own_address()) else {},
    }


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        {
            "platforms": {"type": "dict", "required": True},
            "directories": {"type": "list", "elements": "path", "default": []},
            "min_free_mb": {"type": "int", "default": 0},
            "lock": {
                "type": "dict",
                "options": {
                    "path": {"type": "path", "required": True},
                    "token": {"type": "str", "required": True, "no_log": False},
                    "holder": {"type": "dict", "required": True},
                    "lease": {"type": "int", "required": True},
                    "dead_token": {"type": "str", "default": "", "no_log": False},
                    "force": {"type": "bool", "default": False},
                },
            },
        },
        supports_check_mode=True,
    )
    release = parse_os_release(Path("/etc/os-release").read_text(encoding="utf-8"))
    problem, warning = platform_problem(release, module.params["platforms"])
    problems = [problem] if problem else []
    if not Path("/run/systemd/system").is_dir():
        problems.append("was not booted with systemd")
    if os.geteuid() != 0:
        problems.append("is not reached as root; log in as root, or as a user who may become root")
    problems += disk_problems(free_megabytes(module.params["directories"]), module.params["min_free_mb"])
    if problems:
        module.fail_json(msg="; ".join(problems), problems=problems)
    if warning:
        module.warn(f"{platform.node()} {warning}")

    result: dict[str, t.Any] = {"changed": False, "ansible_facts": facts(release), "lock": {}}
    lock = module.params["lock"]
    if lock and not module.check_mode:
        try:
            holder = DeployLock(lock["path"], lock["token"]).acquire(
                lock["holder"], lock["lease"], lock["dead_token"], lock["force"]
            )
        except OSError as error:
            module.fail_json(msg=f"cannot hold the deploy lock {lock['path']}: {error.strerror}")
        if holder:
            module.exit_json(changed=False, lock_holder=holder)
        result["lock"] = {"path": lock["path"], "token": lock["token"]}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
