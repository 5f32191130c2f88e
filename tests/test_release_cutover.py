"""Module release_cutover with a real supervisord and real gunicorns: what serves goes on serving, whatever happens."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import (
    APP,
    SERVICE,
    Server,
    alive,
    eventually,
    load,
    result_of,
    run_module,
    start_module,
    start_settings,
)

host = load("module_utils/release_host.py")
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

    def deploy_new(self, **changes: Any) -> str:
        """Build and cut over; returns the release's id."""
        release_id = self.make()
        result = self.cut_over(release_id, **changes)
        assert result.get("changed"), result
        return release_id

    def connection(self) -> Connection:
        return Connection(self.root / "run" / "live.sock")

    def ask(self, path: str = "/") -> dict[str, Any]:
        """Return what a new client gets."""
        connection = self.connection()
        try:
            return connection.ask(path)
        finally:
            connection.close()

    def live(self) -> str:
        """Return the release that people see."""
        return (self.root / "current").readlink().name

    def programs(self) -> dict[str, str]:
        """Return what supervisord knows, and its state."""
        found = self.supervisor._call("getAllProcessInfo")
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
        for name in ("current", "deploys.jsonl"):
            (self.root / name).unlink(missing_ok=True)

    def stop(self) -> None:
        self.supervisor.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def shared_host() -> Iterator[Host]:
    directory = Path(tempfile.mkdtemp(prefix="hardstand-"))
    directory.chmod(0o755)
    made = Host(directory)
    eventually(made.socket.exists, "supervisord listens")
    yield made
    made.stop()
    assert made.gunicorns() == set(), "supervisord's end leaves no gunicorn"
    shutil.rmtree(directory)


@pytest.fixture
def app_host(shared_host: Host) -> Iterator[Host]:
    """A host without a release."""
    yield shared_host
    shared_host.reset()


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


def test_the_first_release_and_the_ones_after_it(app_host: Host) -> None:
    first = app_host.make()
    foretold = app_host.cut_over(first, check=True)
    assert (foretold["changed"], foretold["slot"], app_host.programs()) == (True, "blue", {})
    result = app_host.cut_over(first)
    assert (result["changed"], result["slot"], result["previous"], result["unfinished"]) == (True, "blue", "", 0)
    app_host.assert_one_slot(first)

    second = app_host.make()
    result = app_host.cut_over(second)
    assert (result["slot"], result["previous"]) == ("green", first)
    assert result["healthy_seconds"] > 0
    app_host.assert_one_slot(second)

    back = app_host.cut_over(first)
    assert (back["slot"], back["previous"]) == ("blue", second)
    app_host.assert_one_slot(first)


def test_runs_as_the_service_account(app_host: Host) -> None:
    app_host.deploy_new()
    owners = {Path(f"/proc/{pid}").owner() for pid in app_host.gunicorns()}
    assert owners == {SERVICE}


def test_a_release_that_serves_is_left_alone(app_host: Host) -> None:
    release_id = app_host.deploy_new()
    before = app_host.ask()
    for check in (True, False):
        result = app_host.cut_over(release_id, check=check)
        assert (result["changed"], result["slot"], result["previous"]) == (False, "blue", release_id)
    assert app_host.ask() == before


def test_requests_that_run_are_finished_by_the_release_that_has_them(app_host: Host) -> None:
    app_host.deploy_new()
    new = app_host.make()
    request = InBackground(lambda: app_host.ask("/slow/2"))
    eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the request is there")
    result = app_host.cut_over(new)
    assert request.result()["slot"] == "blue"
    assert result["drain_seconds"] > 1
    assert result["unfinished"] == 0
    app_host.assert_one_slot(new)


def test_new_requests_reach_the_new_release_while_the_old_one_drains(app_host: Host) -> None:
    app_host.deploy_new()
    idle = app_host.connection()
    assert idle.ask()["slot"] == "blue"
    new = app_host.make()
    cutover = start_module("release_cutover", app_host.arguments_for(new))
    eventually(lambda: app_host.ask()["slot"] == "green", "the new release serves")
    # The connection that was open before is not closed under its owner: nginx does that, between requests.
    assert idle.ask()["slot"] == "blue"
    assert cutover.poll() is None
    idle.close()
    assert result_of(cutover)["unfinished"] == 0
    app_host.assert_one_slot(new)


def test_draining_ends_at_its_limit_and_the_request_is_still_answered(app_host: Host) -> None:
    app_host.deploy_new()
    request = InBackground(lambda: app_host.ask("/slow/3"))
    eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the request is there")
    new = app_host.make()
    result = app_host.cut_over(new, drain_timeout=0.1)
    assert result["unfinished"] == 1
    assert request.result()["slot"] == "blue", "gunicorn stops gracefully"
    app_host.assert_one_slot(new)


def test_a_connection_that_waits_to_be_accepted_counts(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        assert host.connections(path) == 0
        client.connect(str(path))
        assert host.connections(path) == 1
        accepted, _ = listener.accept()
        assert host.connections(path) == 1
        accepted.close()
        assert host.connections(path) == 0


class TestARefusedRelease:
    def refused(self, app_host: Host, release_id: str, old: str, **changes: Any) -> str:
        before = app_host.ask()
        result = app_host.cut_over(release_id, **changes)
        assert result.get("failed"), result
        assert result["msg"].endswith(f"\nRelease {old} still serves.")
        assert app_host.ask() == before, "the old release has not noticed"
        app_host.assert_one_slot(old)
        assert app_host.records()[-1]["outcome"] == "failed: cut-over"
        assert app_host.records()[-1]["release"] == release_id
        return str(result["msg"])

    def test_that_ends_at_import(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        extra = 'raise RuntimeError("token is " + open(".env").read().split(chr(34))[3])'
        broken = app_host.make(extra, dotenv='TOKEN="s3cr3t-t0ken"\n')
        message = self.refused(app_host, broken, old)
        assert message.startswith(f"Release {broken} ended while it started (")
        assert "\nThe last lines of its log:\n" in message
        assert "RuntimeError: token is ********" in message
        assert "s3cr3t" not in message
        assert app_host.cut_over(old)["changed"] is False

    def test_that_takes_long_to_fail(self, app_host: Host) -> None:
        """Longer than Supervisor's startsecs, after which it restarts a program at once, for ever."""
        old = app_host.deploy_new()
        broken = app_host.make("import time; time.sleep(1.2); import nowhere")
        message = self.refused(app_host, broken, old)
        assert message.startswith(f"Release {broken} ended while it started (")
        assert "No module named 'nowhere'" in message

    def test_that_never_becomes_healthy(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        sick = app_host.make()
        (app_host.root / "shared" / "sick").touch()
        message = self.refused(app_host, sick, old, health_timeout=1)
        assert f"Release {sick} was not healthy within 1 s; /health said: 503 Service Unavailable: {{" in message

    def test_that_does_not_answer(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        slow = app_host.make(settings={"health_path": "/slow/3"})
        message = self.refused(app_host, slow, old, health_timeout=1)
        assert "/slow/3 said: no answer on green.sock (timed out)" in message

    def test_that_supervisor_cannot_take_because_a_file_of_somebody_else_is_broken(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make()
        foreign = app_host.conf / "foreign.conf"
        foreign.write_text("[program:x]\ncommand=/bin/true %(nonsense)s\n")
        before = app_host.ask()
        message = app_host.cut_over(new)["msg"]
        assert message.startswith("Supervisor cannot read its configuration: ")
        assert f"A file in {app_host.conf} that is not ours is broken; mend it, then deploy again." in message
        assert message.endswith(f"Release {old} still serves.")
        assert app_host.ask() == before
        foreign.unlink()
        app_host.assert_one_slot(old)
        assert app_host.cut_over(new)["changed"]
        app_host.assert_one_slot(new)

    def test_that_is_not_built(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        assert "Release 9-9 is not built here." in self.refused(app_host, "9-9", old)

    def test_the_first_one(self, app_host: Host) -> None:
        broken = app_host.make("import nowhere")
        message = app_host.cut_over(broken)["msg"]
        assert "ModuleNotFoundError: No module named 'nowhere'" in message
        assert message.endswith("No release serves yet.")
        assert app_host.programs() == {}
        assert list(app_host.conf.iterdir()) == []


class TestCutOff:
    """The module is killed, and run again: one release serves, in one slot, and no request is lost meanwhile."""

    def killed(self, app_host: Host, release_id: str, when: Callable[[], object], what: str, **changes: Any) -> None:
        process = start_module("release_cutover", app_host.arguments_for(release_id, **changes))
        eventually(when, what)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def test_before_the_new_release_is_healthy(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make("import time; time.sleep(1)")
        green = app_host.conf / f"{APP}-green.conf"
        self.killed(app_host, new, lambda: green.exists() and len(app_host.programs()) == 2, "green is started")
        assert app_host.ask()["slot"] == "blue"
        assert app_host.live() == old
        assert app_host.cut_over(new)["changed"]
        app_host.assert_one_slot(new)

    def test_and_then_another_release_is_deployed(self, app_host: Host) -> None:
        app_host.deploy_new()
        abandoned = app_host.make("import time; time.sleep(1)")
        self.killed(app_host, abandoned, lambda: len(app_host.programs()) == 2, "green is started")
        app_host.assert_one_slot(app_host.deploy_new())

    def test_between_the_two_links(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.deploy_new()
        host.replace_symlink(app_host.root / "current", f"releases/{old}")
        result = app_host.cut_over(new)
        assert (result["changed"], result["slot"], result["previous"]) == (True, "green", old)
        app_host.assert_one_slot(new)

    def test_while_the_old_release_drains(self, app_host: Host) -> None:
        app_host.deploy_new()
        new = app_host.make()
        request = InBackground(lambda: app_host.ask("/slow/2"))
        eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the request is there")
        self.killed(app_host, new, lambda: app_host.live() == new, "the new release is live")
        pid = app_host.ask()["pid"]
        result = app_host.cut_over(new)
        assert result["changed"]
        assert request.result()["slot"] == "blue"
        assert app_host.ask()["pid"] == pid, "what was live already was not started again"
        app_host.assert_one_slot(new)

    def test_while_the_old_release_stops(self, app_host: Host) -> None:
        app_host.deploy_new()
        new = app_host.make()
        request = InBackground(lambda: app_host.ask("/slow/2"))
        eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the request is there")
        stopping = lambda: app_host.programs().get(f"{APP}-blue") == "STOPPING"  # noqa: E731
        self.killed(app_host, new, stopping, "blue stops", drain_timeout=0)
        assert [file.name for file in app_host.conf.iterdir()] == [f"{APP}-green.conf"], "a reboot starts one slot"
        assert app_host.cut_over(new)["changed"]
        assert request.result()["slot"] == "blue"
        app_host.assert_one_slot(new)

    def test_a_second_run_is_refused_while_the_first_goes_on(self, app_host: Host) -> None:
        app_host.deploy_new()
        new, other = app_host.make("import time; time.sleep(1)"), app_host.make()
        first = start_module("release_cutover", app_host.arguments_for(new))
        eventually(lambda: len(app_host.programs()) == 2, "green is started")
        assert app_host.cut_over(other)["msg"].startswith("Another cut-over is under way on this host")
        assert result_of(first)["changed"]
        app_host.assert_one_slot(new)


class TestWhatIsLive:
    @pytest.mark.parametrize("state", ["STOPPED", "BACKOFF"])
    def test_is_started_again_when_it_is_down(self, app_host: Host, state: str) -> None:
        release_id = app_host.make('if Path(os.environ["HOME"], "broken").exists(): raise RuntimeError')
        app_host.cut_over(release_id)
        program, broken = f"{APP}-blue", app_host.root / "shared" / "broken"
        app_host.supervisor._call("stopProcess", program, True)
        if state == "BACKOFF":
            broken.touch()
            app_host.supervisor.resume(program)
            eventually(lambda: app_host.programs()[program] == "BACKOFF", "Supervisor tries again and again")
            assert "ended while it started" in app_host.cut_over(release_id)["msg"]
            broken.unlink()
        assert app_host.cut_over(release_id).get("changed")
        app_host.assert_one_slot(release_id)

    def test_is_left_running_when_it_is_unhealthy_and_the_deploy_fails(self, app_host: Host) -> None:
        release_id = app_host.deploy_new()
        before = app_host.ask()
        (app_host.root / "shared" / "sick").touch()
        message = app_host.cut_over(release_id, health_timeout=1)["msg"]
        assert f"Release {release_id} was not healthy within 1 s; /health said: 503" in message
        assert message.endswith("It is the live release, and is left as it is.")
        assert app_host.ask() == before

    def test_is_found_healthy_without_a_log(self, app_host: Host) -> None:
        release_id = app_host.deploy_new()
        for file in app_host.logs.iterdir():
            file.unlink()
        assert app_host.cut_over(release_id)["changed"] is False

    def test_comes_back_after_its_master_was_killed_and_leaves_no_orphan(self, app_host: Host) -> None:
        app_host.deploy_new()
        before = app_host.ask()
        os.kill(before["master"], signal.SIGKILL)
        eventually(lambda: not alive(before["pid"]), "the worker ends as well", 5)

        def answers() -> bool:
            try:
                return bool(app_host.ask()["master"] != before["master"])
            except (OSError, http.client.HTTPException):
                return False

        eventually(answers, "Supervisor has started it again", 10)
        assert len(app_host.gunicorns()) == 2


def test_a_supervisord_that_is_away_is_named(app_host: Host) -> None:
    release_id = app_host.deploy_new()
    message = app_host.cut_over(release_id, supervisor_socket="/nowhere.sock")["msg"]
    assert message.startswith("supervisord does not answer (")
    assert "see `systemctl status supervisor`" in message


def test_one_that_is_shutting_down_is_not_taken_for_one_without_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = host.Supervisor(str(tmp_path / "sock"), str(tmp_path))

    def shutting_down(*_: object) -> None:
        raise xmlrpc.client.Fault(6, "SHUTDOWN_STATE")

    monkeypatch.setattr(supervisor, "_call", shutting_down)
    with pytest.raises(host.ReleaseError, match="does not tell the state of blog-blue: SHUTDOWN_STATE"):
        supervisor.state("blog-blue")
