#!/usr/bin/python
"""Ansible module: what an operator wants to know of one server, in one round trip. Looks, and changes nothing."""

from __future__ import annotations

import glob
import json
import os
import re
import socket
import ssl
import subprocess
import time
import typing as t
from contextlib import suppress
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.patch_host import NEEDRESTART, SANDBOXED, output, outside, reboot, unattended
from ansible.module_utils.release_host import (
    Layout,
    Mask,
    ReleaseError,
    Supervisor,
    check_health,
    read_pending,
    read_records,
)

DOCUMENTATION = r"""
module: status_host
short_description: Tell what serves on a host, how well, and what is about to end
description:
  - Gathers release, workers, health, certificates, disks, the last deploy, the deploy lock, on load balancers the pool,
    what there is to know of PostgreSQL and of backups, and what waits for a reboot or a restart.
  - Changes nothing, takes no lock, and does not fail over what it finds.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  runs_app: {description: Whether the application runs here., type: bool, default: false}
  balances: {description: Whether this host is a load balancer., type: bool, default: false}
  certificates: {description: Certificates to look at., type: list, elements: path, default: []}
  certificate_records:
    {description: What is known of certificates that renew themselves., type: list, elements: path, default: []}
  directories: {description: Directories whose file systems matter., type: list, elements: path, default: []}
  lock_file: {description: The deploy lock., type: path, required: true}
  maintenance_file: {description: It is there while maintenance is on., type: path, default: ""}
  pool_file: {description: The load balancer's pool., type: path, default: ""}
  database_port: {description: Port of the PostgreSQL on this host; 0 when there is none., type: int, default: 0}
  backup_file: {description: What is known here of the backups. Empty - there are none., type: path, default: ""}
  backup_note: {description: Why there are no backups here., type: str, default: ""}
  kept: {description: Patterns of what restores leave here., type: list, elements: path, default: []}
  url:
    description: What to ask nginx for here, to learn whether clients get an answer. Without it nothing is asked.
    type: dict
    suboptions:
      port: {description: nginx's port for TLS., type: int, default: 443}
      name: {description: The name that clients ask for., type: str, required: true}
      path: {description: The path., type: str, required: true}
  timeout: {description: Seconds that the application may take for a health check., type: float, default: 5}
  supervisor_socket: {description: Where supervisord listens., type: path, default: /run/supervisor.sock}
  supervisor_directory: {description: Where supervisord reads programs., type: path, default: /etc/supervisor/conf.d}
"""

RETURN = r"""
status:
  description: What was found; see roles/status/README.md.
  type: dict
  returned: success
"""

_GUNICORN_WORKERS = re.compile(r"^workers = (.+)$", re.MULTILINE)


class Programs(Supervisor):
    """Supervisor, asked for a process as well."""

    def pid(self, program: str) -> int:
        """Return the process of a program that is known; 0 when it is not running."""
        return int(self._call("getProcessInfo", program)["pid"])


def stamp(seconds: float) -> str:
    """Return a moment (seconds since the epoch) as deploys.jsonl spells it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def children(pid: int) -> list[int]:
    """Return the children of a process, those that have ended apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # The command's name, in parentheses, may contain anything; state and parent follow it (proc(5)).
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == pid and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wanted_workers(directory: Path, master: int) -> int | None:
    """Return how many workers a release is to have, from its gunicorn settings; None when they do not say."""
    try:
        text = (directory / ".hardstand" / "gunicorn.conf.py").read_text(encoding="utf-8")
        # The last one counts: release_gunicorn_settings come after the role's own.
        value = _GUNICORN_WORKERS.findall(text)[-1]
        return int(value) if value.isdecimal() else len(os.sched_getaffinity(master))
    except (OSError, IndexError):
        return None


class Application:
    """The application on this host."""

    def __init__(self, params: t.Mapping[str, t.Any]) -> None:
        self.p = params
        self.layout = Layout(params["root"], params["app"])
        self.supervisor = Programs(params["supervisor_socket"], params["supervisor_directory"])

    def status(self) -> dict[str, t.Any]:
        """Return which release serves, since when, and how well."""
        release_id, slot = self.layout.live_release(), self.layout.live_slot()
        found: dict[str, t.Any] = {
            "release": release_id,
            "commit": None,
            "subject": "",
            "slot": slot,
            "since": None,
            "state": None,
            "workers": 0,
            "workers_wanted": None,
            "healthy": False,
            "health": "no release has gone live",
            "pending": self.pending(),
        }
        if release_id is None:
            return found
        with suppress(OSError):
            # Made anew whenever another release goes live, and then only.
            found["since"] = stamp(self.layout.current.lstat().st_mtime)
        release = self.layout.release(release_id)
        if release is None or slot is None:
            return {**found, "health": f"{self.layout.current} leads to a release that is not whole"}
        found |= {"commit": release["commit"], "subject": release["subject"]}
        try:
            found |= self.processes(slot, self.layout.releases / release_id)
        except ReleaseError as error:
            return {**found, "health": str(error)}
        finally:
            self.supervisor.close()
        mask = Mask.of_release(self.layout.releases / release_id)
        answer = check_health(
            self.layout.live_socket, release["health_path"], release["host_header"], self.p["timeout"]
        )
        return {**found, "healthy": answer.healthy, "health": " ".join(mask(answer.text).split())[:300]}

    def processes(self, slot: str, directory: Path) -> dict[str, t.Any]:
        """Return what runs in the live slot.

        Raises:
            ReleaseError: supervisord does not answer.
        """
        program = self.layout.program(slot)
        state = self.supervisor.state(program)
        if state not in Supervisor.UP:
            return {"state": state, "workers_wanted": wanted_workers(directory, 0)}
        master = self.supervisor.pid(program)
        return {
            "state": state,
            "workers": len(children(master)) if master else 0,
            "workers_wanted": wanted_workers(directory, master),
            "configured": self.configured(slot, directory),
        }

    def configured(self, slot: str, directory: Path) -> bool:
        """Return whether what runs is what `current` says."""
        try:
            running = self.supervisor.file(self.layout.program(slot)).read_bytes()
            return bool(running == (directory / ".hardstand" / f"{slot}.conf").read_bytes())
        except OSError:
            return False

    def pending(self) -> dict[str, t.Any] | None:
        """Return the deploy that began to start a release here and has not ended, or None."""
        found = read_pending(self.layout)
        if not found:
            return None
        deploy = found.get("deploy") or {}
        return {"to": found.get("to"), "from": found.get("from"), "who": deploy.get("who")}

    def last_deploy(self) -> dict[str, t.Any] | None:
        """Return the last line of deploys.jsonl, or None."""
        records = read_records(self.layout)
        return records[-1] if records else None


def read_json(path: Path) -> dict[str, t.Any] | None:
    """Return the mapping in a JSON file; None when there is no file, or something else in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def certificate(path: Path) -> dict[str, t.Any]:
    """Return when a certificate ends, and how many whole days that is from now; negative when it has ended."""
    found: dict[str, t.Any] = {"path": str(path), "ends": None, "days": None, "problem": ""}
    if not path.exists():
        return {**found, "problem": "is not there"}
    asked = subprocess.run(  # noqa: S603
        ["openssl", "x509", "-noout", "-enddate", "-in", str(path)],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    try:
        ends = ssl.cert_time_to_seconds(asked.stdout.strip().partition("=")[2])
    except ValueError:
        return {**found, "problem": "is no certificate that openssl can read"}
    return {**found, "ends": stamp(ends), "days": int((ends - time.time()) // 86400)}


def disks(directories: t.Iterable[str]) -> list[dict[str, t.Any]]:
    """Return the free space of each file system, in MB (2**20 bytes) and percent of what others than root may use."""
    found: dict[int, dict[str, t.Any]] = {}
    for directory in directories:
        existing = Path(directory)
        while not existing.is_dir():
            existing = existing.parent
        device = existing.stat().st_dev
        if device in found:
            found[device]["directories"].append(directory)
            continue
        status = os.statvfs(existing)
        used = status.f_blocks - status.f_bfree
        found[device] = {
            "directories": [directory],
            "free_mb": status.f_bavail * status.f_frsize // 2**20,
            "free_percent": 100 * status.f_bavail // max(used + status.f_bavail, 1),
            # Some file systems make inodes as they need them, and count none.
            "inodes_percent": 100 * status.f_favail // status.f_files if status.f_files else 100,
        }
    return [*found.values()]


def lock(path: Path) -> dict[str, t.Any] | None:
    """Return who holds the deploy lock, or None. The token stays here: whoever knows it may take the lock."""
    try:
        if path.lstat().st_uid != os.geteuid():
            return None  # Not a lock: its directory is open to everyone.
    except OSError:
        return None
    held = read_json(path)
    if not held or not held.get("token"):
        return None
    expired = time.clock_gettime(time.CLOCK_BOOTTIME) >= held.get("expires", 0)
    return {**{name: held.get(name) for name in ("owner", "pid", "started", "machine", "since")}, "expired": expired}


def maintenance(path: str) -> str | None:
    """Return since when maintenance is on, or None."""
    try:
        return stamp(Path(path).stat().st_mtime) if path else None
    except OSError:
        return None


# What an operator wants to know of PostgreSQL.
DATABASE = """
SELECT json_build_object(
    'version', split_part(current_setting('server_version'), ' ', 1),
    'connections', (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
    'max_connections', current_setting('max_connections')::int,
    'pending_restart', (SELECT coalesce(json_agg(name ORDER BY name), '[]') FROM pg_settings WHERE pending_restart))
"""


def database(port: int) -> dict[str, t.Any]:
    """Return what PostgreSQL says of itself; `problem` says why it does not answer."""
    command = ["runuser", "--user", "postgres", "--", "psql", "--no-psqlrc", "--no-align", "--tuples-only", "--quiet"]
    command += [f"--port={port}", "--set=ON_ERROR_STOP=1", "--dbname=postgres"]
    try:
        asked = subprocess.run(  # noqa: S603
            command,
            input=DATABASE,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PGCONNECT_TIMEOUT": "5"},
        )
        if asked.returncode == 0:
            return {**json.loads(asked.stdout), "problem": ""}
        said = asked.stderr
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = str(error)
    found = dict.fromkeys(("version", "connections", "max_connections"))
    return {**found, "pending_restart": [], "problem": " ".join(said.partition("\tIs the server running")[0].split())}


def kept(patterns: t.Iterable[str]) -> list[str]:
    """Return what there is that fits the patterns, without the files that SQLite has beside its own."""
    found = (path for pattern in patterns for path in glob.glob(pattern))  # noqa: PTH207 - pathlib wants a root apart
    return sorted(path for path in found if not path.endswith(("-wal", "-shm")))


def system() -> dict[str, t.Any]:
    """Return what waits for a reboot, and for a restart, and when updates last came by themselves."""
    updates = unattended()
    return {
        "reboot": reboot(output([NEEDRESTART, "-b", "-k"])),
        "outside": [unit for unit in SANDBOXED if outside(unit)],
        "updates": {"last": stamp(updates[0]), "days": updates[1]} if updates else None,
    }


def nginx_state() -> str:
    """Return what systemd says of nginx, such as `active`, `failed` or `inactive`."""
    try:
        asked = subprocess.run(
            ["systemctl", "is-active", "nginx.service"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return asked.stdout.strip() or "unknown"


def ask_nginx(url: t.Mapping[str, t.Any], timeout: float) -> dict[str, t.Any]:
    """Ask nginx on this host as a client would; returns `ok` and what it `said`.

    The certificate is not verified: its names and its end are looked at elsewhere, and its authority may be private.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    request = f"GET {url['path']} HTTP/1.1\r\nHost: {url['name']}\r\nConnection: close\r\n\r\n"
    try:
        with (
            socket.create_connection(("127.0.0.1", url["port"]), timeout) as plain,
            context.wrap_socket(plain, server_hostname=url["name"]) as client,
        ):
            client.sendall(request.encode())
            line = client.makefile("rb").readline(200).decode(errors="replace").strip()
    except OSError as error:
        return {"ok": False, "said": str(error)}
    status = line.partition(" ")[2]
    return {"ok": status.startswith("2"), "said": status or "nothing"}


def status_of(p: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return all that there is to know of this host."""
    application = Application(p)
    pool = read_json(Path(p["pool_file"])) if p["balances"] else None
    return {
        "time": stamp(time.time()),
        "app": application.status() if p["runs_app"] else None,
        "last_deploy": application.last_deploy() if p["runs_app"] else None,
        "pool": (pool or {}).get("members") if p["balances"] else None,
        "nginx": nginx_state() if p["runs_app"] or p["balances"] else None,
        "answer": ask_nginx(p["url"], 2 * p["timeout"]) if p["url"] else None,
        "certificates": [certificate(Path(path)) for path in p["certificates"]],
        # By the name of the certificate; empty where there should be a record and is none.
        "renewals": {Path(path).stem: read_json(Path(path)) or {} for path in p["certificate_records"]},
        "disks": disks(p["directories"]),
        "lock": lock(Path(p["lock_file"])),
        "maintenance": maintenance(p["maintenance_file"]),
        "database": database(p["database_port"]) if p["database_port"] else None,
        # Empty where there should be one and is not.
        "backup": (read_json(Path(p["backup_file"])) or {}) if p["backup_file"] else None,
        "backup_note": p["backup_note"],
        "kept": kept(p["kept"]),
        "system": system(),
    }


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "runs_app": {"type": "bool", "default": False},
            "balances": {"type": "bool", "default": False},
            "certificates": {"type": "list", "elements": "path", "default": []},
            "certificate_records": {"type": "list", "elements": "path", "default": []},
            "directories": {"type": "list", "elements": "path", "default": []},
            "lock_file": {"type": "path", "required": True},
            "maintenance_file": {"type": "path", "default": ""},
            "pool_file": {"type": "path", "default": ""},
            "database_port": {"type": "int", "default": 0},
            "backup_file": {"type": "path", "default": ""},
            "backup_note": {"type": "str", "default": ""},
            "kept": {"type": "list", "elements": "path", "default": []},
            "url": {
                "type": "dict",
                "options": {
                    "port": {"type": "int", "default": 443},
                    "name": {"type": "str", "required": True},
                    "path": {"type": "str", "required": True},
                },
            },
            "timeout": {"type": "float", "default": 5},
            "supervisor_socket": {"type": "path", "default": "/run/supervisor.sock"},
            "supervisor_directory": {"type": "path", "default": "/etc/supervisor/conf.d"},
        },
        supports_check_mode=True,
    )
    try:
        status = status_of(module.params)
    except (OSError, ReleaseError) as error:
        module.fail_json(msg=f"The server does not tell its state: {error}")
    module.exit_json(changed=False, status=status)


if __name__ == "__main__":
    main()
