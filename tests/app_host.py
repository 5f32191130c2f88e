"""A server with a real supervisord and real gunicorns, below a temporary directory."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import xmlrpc.client
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.release_support import (
    APP,
    SERVICE,
    Server,
    alive,
    eventually,
    load,
    run_module,
    start_module,
    start_settings,
)

host = load("module_utils/release_host.py")
replace_symlink = load("module_utils/host_files.py").replace_symlink
PROJECT = Path(__file__).resolve().parents[1]

# Answers with its own version, and who it is. "/slow/2" takes two seconds; "/health" is bad while shared/sick exists.
SERVICE_PY = """
import asyncio, json, os
from pathlib import Path

VERSION = "{version}"
{extra}

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    path = scope["path"]
    if path.startswith("/slow/"):
        await asyncio.sleep(float(path.removeprefix("/slow/")))
    sick = Path(os.environ["HOME"], "sick").exists()
    status = 503 if path == "/health" and sick else 200
    about = {{"version": VERSION, "slot": os.environ["HARDSTAND_SLOT"], "pid": os.getpid(), "master": os.getppid()}}
    body = json.dumps(about)
    await send({{"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}})
    await send({{"type": "http.response.body", "body": body.encode()}})
"""


class Connection(http.client.HTTPConnection):
    """A connection to the live slot, as nginx makes one."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self.path))

    def ask(self, path: str = "/") -> dict[str, Any]:
        self.request("GET", path)
        answer: dict[str, Any] = json.loads(self.getresponse().read())
        return answer


class Host(Server):
    """A server with a supervisord."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, None)
        self.conf, self.logs = directory / "conf.d", directory / "log"
        self.conf.mkdir()
        self.logs.mkdir()
        self.socket = directory / "supervisor.sock"
        (directory / "supervisord.conf").write_text(
            f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/supervisord.pid\nuser=root\n"
            f"[unix_http_server]\nfile={self.socket}\n"
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = "
            "supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[include]\nfiles={self.conf}/*.conf\n"
        )
        supervisord = Path(sys.executable).with_name("supervisord")
        self.process = subprocess.Popen(
            [supervisord, "--nodaemon", "--silent", "--configuration", directory / "supervisord.conf"], cwd="/"
        )
        self.supervisor = host.Supervisor(str(self.socket), str(self.conf))
        self.number = 0

    def make(self, extra: str = "", *, settings: dict[str, Any] | None = None, dotenv: str = "") -> str:
        """Build a release of a new version of the service; returns its id. The first one installs from the index."""
        self.number += 1
        release_id = f"{self.number:08}-{self.number:08}"
        commit = self.repository.commit(
            {
                "service.py": SERVICE_PY.format(version=self.number, extra=extra),
                "requirements.txt": "".join(
                    line + "\n"
                    for line in (PROJECT / "requirements.txt").read_text().splitlines()
                    if line.startswith(("gunicorn==", "uvicorn==", "uvicorn-worker=="))
                ),
            }
        )
        files = start_settings(
            self.root, release_id, release_workers="1", release_request_timeout=10, _release_user=SERVICE
        )
        files = {name: text.replace("/var/log/supervisor", str(self.logs)) for name, text in files.items()}
        result = self.build(
            commit,
            release_id,
            files=files,
            settings=settings or {},
            dotenv=f'KEY="value"\n{dotenv}',
            secret_names=["TOKEN"],
        )
        assert result.get("changed"), result
        return release_id

    def arguments_for(self, release_id: str, **changes: Any) -> dict[str, Any]:
        return {
            "app": APP,
            "root": str(self.root),
            "release_id": release_id,
            "health_timeout": 20,
            "drain_timeout": 10,
            "supervisor_socket": str(self.socket),
            "supervisor_directory": str(self.conf),
            "log_directory": str(self.logs),
            "deploy": self.deploy,
        } | changes

    def cut_over(self, release_id: str, *, check: bool = False, **changes: Any) -> dict[str, Any]:
        return run_module("release_cutover", self.arguments_for(release_id, **changes), check=check)

    def step(self, step: str, release_id: str, **changes: Any) -> dict[str, Any]:
        """Take one step of a cut-over; it must succeed."""
        result = self.cut_over(release_id, step=step, **changes)
        assert "failed" not in result, result
        return result

    def finish(self, release_id: str, **changes: Any) -> dict[str, Any]:
        """Record a deploy and prune, as its last step does."""
        arguments = {"app": APP, "root": str(self.root), "release_id": release_id, "record": True, "slot": "blue"}
        return run_module("release_finish", {**arguments, "deploy": self.deploy, **changes})

    def recover(self, *, check: bool = False, **changes: Any) -> dict[str, Any]:
        """Run module release_recover."""
        return run_module("release_recover", self.arguments_to_recover(**changes), check=check)

    def arguments_to_recover(self, **changes: Any) -> dict[str, Any]:
        arguments = self.arguments_for("")
        for name in ("release_id", "deploy"):
            del arguments[name]
        return {**arguments, **changes}

    def pending(self) -> dict[str, Any] | None:
        """Return what the host has noted of a deploy that is under way."""
        pending: dict[str, Any] | None = host.read_pending(host.Layout(str(self.root), APP))
        return pending

    def cut_off(self, release_id: str, when: Callable[[], object], what: str, **changes: Any) -> None:
        """Begin a cut-over and kill it when a condition holds; `what` says which."""
        process = start_module("release_cutover", self.arguments_for(release_id, **changes))
        eventually(lambda: process.poll() is not None or when(), what)
        assert process.poll() is None, f"it has ended before this: {what}"
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def deploy_new(self, **changes: Any) -> str:
        """Build and cut over; returns the release's id."""
        release_id = self.make()
        result = self.cut_over(release_id, **changes)
        assert result.get("changed"), result
        return release_id

    def connection(self, slot: str = "live") -> Connection:
        return Connection(self.root / "run" / f"{slot}.sock")

    def ask(self, path: str = "/", slot: str = "live") -> dict[str, Any]:
        """Return what a new client gets."""
        connection = self.connection(slot)
        try:
            return connection.ask(path)
        finally:
            connection.close()

    def live(self) -> str:
        """Return the release that people see."""
        return (self.root / "current").readlink().name

    def programs(self) -> dict[str, str]:
        """Return what supervisord knows, and its state."""
        found: list[dict[str, str]] = self.supervisor._call("getAllProcessInfo")
        return {program["name"]: program["statename"] for program in found}

    def gunicorns(self) -> set[int]:
        """Return the processes of this server's gunicorns."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.root).encode() in path.read_bytes() and alive(int(path.parent.name)):
                    found.add(int(path.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def assert_one_slot(self, release_id: str) -> None:
        """One release serves, alone, and Supervisor's files say what runs."""
        answer = self.ask()
        assert answer["version"] == str(int(release_id.partition("-")[0]))
        slot = answer["slot"]
        assert self.live() == release_id
        assert self.programs().keys() == {f"{APP}-{slot}"}
        assert [file.name for file in self.conf.glob("*.conf")] == [f"{APP}-{slot}.conf"]
        assert sorted(file.name for file in (self.root / "run").glob("*.sock")) == sorted([f"{slot}.sock", "live.sock"])
        assert len(self.gunicorns()) == 2, "a master and its worker"

    def reset(self) -> None:
        """Forget releases and processes, and keep the virtualenv and the cache."""
        for program, state in self.programs().items():
            if state in ("RUNNING", "STARTING", "BACKOFF"):
                self.supervisor._call("stopProcess", program, False)
            with suppress(xmlrpc.client.Fault):  # it has ended already
                self.supervisor._call("signalProcess", program, "KILL")
            self.supervisor.remove(program, 20)
        for pid in self.gunicorns():
            os.kill(pid, signal.SIGKILL)
        for name in ("run", "shared", "releases"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name in ("current", "deploys.jsonl", ".deploy.json"):
            (self.root / name).unlink(missing_ok=True)

    def stop(self) -> None:
        self.supervisor.close()
        self.process.terminate()
        self.process.wait(30)


class InBackground:
    """A request, or anything else, that goes on meanwhile."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._result.append(action()), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(30)
        assert self._result, "it failed, or did not end"
        return self._result[0]
