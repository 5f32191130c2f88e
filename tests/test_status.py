"""Role status: the module against a server below a temporary root, and the report over what such modules return."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import load
from tests.role_modules import run_module

PROJECT = Path(__file__).resolve().parents[1]
ROLE = PROJECT / "roles" / "status"
APP = "blog"
LIVE = "0000000a-0000000b"
NOW = datetime(2026, 11, 24, 14, 30, tzinfo=UTC)
LIMITS = {"certificate_days": 21, "disk_free_mb": 2048, "disk_free_percent": 10}

release_host = load("module_utils/release_host.py")
report = runpy.run_path(str(ROLE / "action_plugins" / "status_report.py"))


class Host:
    """A server's files below a temporary directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "srv"
        (self.root / "run").mkdir(parents=True)
        self.lock = directory / "lock"
        self.pool = directory / "pool.json"
        self.page = directory / "maintenance"
        self.lives = False  # its files change without us

    def ask(self, **changes: Any) -> dict[str, Any]:
        """Run the module; returns what it found."""
        arguments = {
            "app": APP,
            "root": str(self.root),
            "runs_app": True,
            "directories": [str(self.root), str(self.directory / "not" / "there")],
            "lock_file": str(self.lock),
            "maintenance_file": str(self.page),
            "pool_file": str(self.pool),
            "timeout": 2,
            "supervisor_socket": str(self.directory / "supervisor.sock"),
            "supervisor_directory": str(self.directory / "conf.d"),
        } | changes
        before = self.listing()
        answer = run_module(ROLE, "status_host", arguments)
        assert answer.get("changed") is False, answer
        if not self.lives:
            assert self.listing() == before, "it only looks"
        status: dict[str, Any] = answer["status"]
        return status

    def listing(self) -> dict[str, float]:
        return {str(path): path.lstat().st_mtime for path in self.directory.rglob("*")}

    def release(self, release_id: str = LIVE, **changes: Any) -> None:
        """Make a release and make it live in slot blue."""
        directory = self.root / "releases" / release_id
        (directory / ".hardstand").mkdir(parents=True)
        (directory / ".hardstand" / "gunicorn.conf.py").write_text('workers = 7\nworker_class = "x"\nworkers = 2\n')
        (directory / ".hardstand" / "blue.conf").write_text("; blue\n")
        (directory / ".env").write_text('TOKEN="top-secret-token"\n')
        content = {
            "release": release_id,
            "commit": "a" * 40,
            "subject": "Say hello",
            "venv": "v",
            "secret_names": ["TOKEN"],
            "health_path": "/health",
            "host_header": "localhost",
        } | changes
        (directory / "release.json").write_text(json.dumps(content))
        (self.root / "current").symlink_to(f"releases/{release_id}")
        (self.root / "run" / "live.sock").symlink_to("blue.sock")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


class TestModule:
    """What the module finds on a server."""

    def test_a_server_that_nothing_was_deployed_to(self, host: Host) -> None:
        status = host.ask()
        app = status["app"]
        assert (app["release"], app["slot"], app["since"], app["healthy"]) == (None, None, None, False)
        assert app["health"] == "no release has gone live"
        assert (status["last_deploy"], status["lock"], status["maintenance"], status["pool"]) == (None,) * 4
        assert status["answer"] is None

    def test_data(self, host: Host) -> None:
        """Nothing answers on port 1, and nothing that a restore has left is missed."""
        status = host.ask()
        assert (status["database"], status["backup"], status["kept"]) == (None, None, [])
        for name in ("main", "main.before-1", "main.before-2", "main.before-2-wal"):
            (host.directory / "postgresql" / "17" / name).mkdir(parents=True)
        state = host.directory / "state.json"
        pattern = str(host.directory / "postgresql" / "*" / "main.before-*")
        status = host.ask(database_port=1, backup_file=str(state), kept=[pattern])
        assert status["database"]["problem"]
        assert status["database"]["pending_restart"] == []
        assert status["backup"] == {}
        assert [Path(path).name for path in status["kept"]] == ["main.before-1", "main.before-2"]
        state.write_text('{"last": null}')
        assert host.ask(backup_file=str(state))["backup"] == {"last": None}

    def test_the_release_and_the_last_deploy(self, host: Host) -> None:
        host.release()
        os.utime(host.root / "current", (1_700_000_000, 1_700_000_000), follow_symlinks=False)
        records = [{"id": "1", "outcome": "failed: migrate"}, {"id": "2", "outcome": "live", "who": "kim"}]
        (host.root / "deploys.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"cut')
        status = host.ask()
        assert status["last_deploy"] == records[1]
        app = status["app"]
        assert (app["release"], app["commit"], app["subject"], app["slot"]) == (LIVE, "a" * 40, "Say hello", "blue")
        assert app["since"] == "2023-11-14T22:13:20Z"
        # No supervisord: that is a finding, and no failure.
        assert not app["healthy"]
        assert "supervisord does not answer" in app["health"]

    def test_a_release_that_is_not_whole(self, host: Host) -> None:
        host.release()
        (host.root / "releases" / LIVE / "release.json").unlink()
        app = host.ask()["app"]
        assert (app["release"], app["healthy"]) == (LIVE, False)
        assert "not whole" in app["health"]

    def test_a_deploy_that_was_cut_off(self, host: Host) -> None:
        host.release()
        deploy = {"to": "b-c", "from": LIVE, "deploy": {"who": "kim", "id": "9"}}
        (host.root / ".deploy.json").write_text(json.dumps(deploy))
        assert host.ask()["app"]["pending"] == {"to": "b-c", "from": LIVE, "who": "kim"}

    def test_the_lock_and_no_token(self, host: Host) -> None:
        held = {"owner": "kim@laptop", "pid": 12, "started": "5", "machine": "m", "since": "2026-11-24T14:00:00Z"}
        later = time.clock_gettime(time.CLOCK_BOOTTIME) + 60
        host.lock.write_text(json.dumps({**held, "token": "m/12/5", "expires": later}))
        assert host.ask()["lock"] == {**held, "expired": False}
        host.lock.write_text(json.dumps({**held, "token": "m/12/5", "expires": 1}))
        assert host.ask()["lock"] == {**held, "expired": True}
        host.lock.write_text("left by somebody")
        assert host.ask()["lock"] is None

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_anybodys_file_is_no_lock(self, host: Host) -> None:
        host.lock.write_text('{"token": "x", "expires": 1e12}')
        os.chown(host.lock, 65534, 65534)
        assert host.ask()["lock"] is None

    def test_the_pool_is_a_load_balancers(self, host: Host) -> None:
        members = {"app1": {"address": "10.0.0.1", "port": 8443, "drained": False, "reason": "", "since": ""}}
        host.pool.write_text(json.dumps({"members": members}))
        assert host.ask(balances=True, runs_app=False)["pool"] == members
        assert host.ask(balances=False)["pool"] is None
        host.pool.unlink()
        assert host.ask(balances=True)["pool"] is None

    def test_maintenance(self, host: Host) -> None:
        host.page.write_text("<html>")
        os.utime(host.page, (1_700_000_000, 1_700_000_000))
        assert host.ask()["maintenance"] == "2023-11-14T22:13:20Z"
        assert host.ask(maintenance_file="")["maintenance"] is None

    def test_disks_once_each(self, host: Host) -> None:
        (disk,) = host.ask()["disks"]
        assert len(disk["directories"]) == 2
        assert disk["free_mb"] > 0
        assert 0 <= disk["free_percent"] <= 100
        assert 0 <= disk["inodes_percent"] <= 100

    def test_certificates(self, host: Host) -> None:
        good, bad = host.directory / "good.crt", host.directory / "bad.crt"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-subj", "/CN=x", "-days", "30", "-keyout", host.directory / "key", "-out", good),
            ],
            check=True,
            capture_output=True,
        )
        bad.write_text("nothing")
        paths = [str(path) for path in (good, bad, host.directory / "none.crt")]
        found = host.ask(certificates=paths)["certificates"]
        assert found[0]["days"] in (29, 30)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found[0]["ends"])
        assert [entry["problem"] for entry in found] == ["", "is no certificate that openssl can read", "is not there"]

    def test_records_of_renewals(self, host: Host) -> None:
        (host.directory / "blog.json").write_text('{"failures": 3}')
        paths = [str(host.directory / name) for name in ("blog.json", "other.json")]
        assert host.ask(certificate_records=paths)["renewals"] == {"blog": {"failures": 3}, "other": {}}

    def test_what_waits_on_the_operating_system(self, host: Host) -> None:
        """Whatever that is on this machine."""
        system = host.ask()["system"]
        assert bool(system["reboot"]) >= Path("/run/reboot-required").exists()
        assert system["outside"] == []
        assert system["updates"] is None or system["updates"]["days"] > 0

    def test_nobody_answers_clients(self, host: Host) -> None:
        answer = host.ask(url={"port": 1, "name": "a.test", "path": "/health"})["answer"]
        assert not answer["ok"]
        assert "refused" in answer["said"]


# A master with two workers, as gunicorn has them, on the socket that the first argument names. Not healthy while the
# file in the second one is there, and tells a secret then.
SERVICE = """
import os, socket, sys
from pathlib import Path

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
for _ in range(2):
    if os.fork() == 0:
        while True:
            client = server.accept()[0]
            client.recv(4000)
            sick = Path(sys.argv[2]).exists()
            status, body = ("503 No", "no database: top-secret-token") if sick else ("200 OK", "ok")
            client.sendall(f"HTTP/1.1 {status}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
            client.close()
while True:
    os.wait()
"""


@pytest.fixture
def supervised(host: Host) -> Iterator[Host]:
    """A server whose release is run by a real supervisord."""
    host.release()
    host.lives = True
    directory = host.directory
    (directory / "conf.d").mkdir()
    service = directory / "service.py"
    service.write_text(SERVICE)
    program = (
        f"[program:{APP}-blue]\ncommand={sys.executable} {service} {host.root}/run/blue.sock {directory}/sick\n"
        f"startsecs=0\nautorestart=false\nkillasgroup=true\nstopasgroup=true\nstdout_logfile={directory}/program.log\n"
    )
    (directory / "conf.d" / f"{APP}-blue.conf").write_text(program)
    (host.root / "releases" / LIVE / ".hardstand" / "blue.conf").write_text(program)
    (directory / "supervisord.conf").write_text(
        f"[supervisord]\nlogfile={directory}/supervisord.log\npidfile={directory}/supervisord.pid\n"
        f"[unix_http_server]\nfile={directory}/supervisor.sock\n"
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = "
        "supervisor.rpcinterface:make_main_rpcinterface\n"
        f"[include]\nfiles={directory}/conf.d/*.conf\n"
    )
    supervisord = Path(sys.executable).with_name("supervisord")
    process = subprocess.Popen(
        [supervisord, "--nodaemon", "--silent", "--configuration", directory / "supervisord.conf"], cwd="/"
    )
    yield host
    process.terminate()
    process.wait(30)


class TestProcesses:
    """What the module finds where supervisord runs the release."""

    @staticmethod
    def wait(host: Host, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return what is found once the condition holds."""
        deadline = time.monotonic() + 20
        while True:
            app: dict[str, Any] = host.ask()["app"]
            if condition(app):
                return app
            assert time.monotonic() < deadline, app

    def test_a_healthy_release(self, supervised: Host) -> None:
        app = self.wait(supervised, lambda app: app["healthy"] and app["state"] != "STARTING")
        assert (app["state"], app["workers"], app["workers_wanted"]) == ("RUNNING", 2, 2)
        assert app["configured"] is True
        assert app["health"] == "200 OK: ok"

    def test_what_it_says_is_told_without_its_secrets(self, supervised: Host) -> None:
        (supervised.directory / "sick").touch()
        app = self.wait(supervised, lambda app: "503" in app["health"])
        assert (app["healthy"], app["health"]) == (False, "503 No: no database: ********")

    def test_a_worker_that_has_died(self, supervised: Host) -> None:
        self.wait(supervised, lambda app: app["healthy"])
        pids = subprocess.run(["pgrep", "-f", supervised.directory / "service.py"], capture_output=True, text=True)
        os.kill(max(map(int, pids.stdout.split())), signal.SIGKILL)
        app = self.wait(supervised, lambda app: app["workers"] == 1)
        assert app["healthy"]

    def test_a_program_that_was_stopped(self, supervised: Host) -> None:
        self.wait(supervised, lambda app: app["healthy"])
        directory = supervised.directory
        supervisor = release_host.Supervisor(str(directory / "supervisor.sock"), str(directory / "conf.d"))
        supervisor._call("stopProcess", f"{APP}-blue", True)
        supervisor.close()
        app = supervised.ask()["app"]
        assert (app["state"], app["workers"], app["healthy"]) == ("STOPPED", 0, False)

    def test_another_release_than_the_one_that_current_names(self, supervised: Host) -> None:
        (supervised.root / "releases" / LIVE / ".hardstand" / "blue.conf").write_text("; another\n")
        app = self.wait(supervised, lambda app: app["healthy"])
        assert app["configured"] is False


def app_status(**changes: Any) -> dict[str, Any]:
    """Return what the module finds on an application server on which all is well."""
    status: dict[str, Any] = {
        "app": {
            "release": LIVE,
            "commit": "a" * 40,
            "subject": "Say hello",
            "slot": "blue",
            "since": "2026-11-24T13:02:11Z",
            "state": "RUNNING",
            "workers": 2,
            "workers_wanted": 2,
            "configured": True,
            "healthy": True,
            "health": "200 OK: {}",
            "pending": None,
        },
        "last_deploy": {
            "id": "1",
            "release": LIVE,
            "who": "kim",
            "when": "2026-11-24T13:02:12Z",
            "outcome": "live",
            "reason": "",
        },
        "pool": None,
        "nginx": "active",
        "answer": None,
        "certificates": [{"path": "/etc/ssl/x.crt", "ends": "2027-02-14T00:00:00Z", "days": 82, "problem": ""}],
        "renewals": {},
        "disks": [{"directories": ["/"], "free_mb": 12_345, "free_percent": 61, "inodes_percent": 90}],
        "lock": None,
        "maintenance": None,
        "database": None,
        "backup": None,
        "backup_note": "",
        "kept": [],
        "system": {"reboot": [], "outside": [], "updates": {"last": "2026-11-24T06:12:00Z", "days": 1}},
        "time": "2026-11-24T14:30:00Z",
    }
    application = changes.pop("app", {})
    return {**status, **changes, "app": {**status["app"], **application}}


def lb_status(**changes: Any) -> dict[str, Any]:
    """Return what the module finds on a load balancer on which all is well."""
    members = {
        name: {"address": "10.0.0.1", "port": 8443, "drained": False, "reason": "", "since": ""}
        for name in ("app1", "app2")
    }
    answer = {"ok": True, "said": "200 OK"}
    return {**app_status(), "app": None, "last_deploy": None, "pool": members, "answer": answer, **changes}


def db_status(**changes: Any) -> dict[str, Any]:
    """Return what the module finds on a database server that makes its own backups, and on which all is well."""
    database = {
        "version": "17.6",
        "connections": 12,
        "max_connections": 100,
        "pending_restart": [],
        "problem": "",
    }
    bare = {"app": None, "last_deploy": None, "pool": None, "nginx": None}
    found = {**app_status(), **bare, "database": database, "backup": backup_state(), **changes}
    return {**found, "database": {**database, **changes.get("database", {})}}


FAILED_BACKUP = {
    "started": "2026-11-24T02:00:00Z",
    "ended": "2026-11-24T02:00:01Z",
    "ok": False,
    "label": None,
    "type": "diff",
    "bytes": 0,
    "message": "the repository /b is not there; is its disk mounted?",
}


def backup_state(**changes: Any) -> dict[str, Any]:
    """Return the state file of backups that are in order, made at 02:00."""
    last = {
        "started": "2026-11-24T02:00:00Z",
        "ended": "2026-11-24T02:00:12Z",
        "ok": True,
        "label": "20261122-020000F_20261124-020000D",
        "type": "diff",
        "bytes": 3_725_776,
        "size": 2_100_000_000,
        "message": "",
    }
    return {
        "kind": "postgresql",
        "repository": "/var/lib/pgbackrest",
        "runs_backups": True,
        "max_age_hours": 26,
        "created": "2026-11-01T00:00:00Z",
        "last": last,
        "last_success": last,
        "check": {"time": "2026-11-24T14:20:00Z", "ok": True, "message": ""},
        "archive": {
            "ok": True,
            "last_archived": "2026-11-24T14:29:00Z",
            "failing_since": None,
            "lag_seconds": 0,
            "message": "",
        },
        "restore_check": None,
        "restore": None,
        **changes,
    }


def fleet(**hosts: dict[str, Any]) -> Any:
    """Return the fleet lb1, app1, app2, on which all is well but what is given."""
    found = {"lb1": {"status": lb_status()}, "app1": {"status": app_status()}, "app2": {"status": app_status()}}
    arguments = {
        "hosts": ["lb1", "app1", "app2"],
        "app_hosts": ["app1", "app2"],
        "lb_hosts": ["lb1"],
        "found": found | hosts,
        "limits": LIMITS,
    }
    return report["Fleet"](arguments)


def problems(*, dead: bool = False, **hosts: Any) -> list[str]:
    return [str(problem) for problem in fleet(**hosts).problems(lambda _: dead)]


class TestProblems:
    """What counts as wrong, and how it is said."""

    def test_all_is_well(self) -> None:
        assert problems() == []

    def test_unreachable(self) -> None:
        assert problems(app2={"problem": "cannot be reached: Connection refused"}) == [
            "app2: cannot be reached: Connection refused"
        ]
        assert problems(app2={}) == ["app2: was not asked"]

    def test_more_than_one_release(self) -> None:
        (text,) = problems(app2={"status": app_status(app={"release": "b-c"})})
        assert text.startswith(f"more than one release: {LIVE} on app1; b-c on app2.")

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"nginx": "failed"}, "app2: nginx is failed"),
            ({"app": {"healthy": False, "health": "503 no database"}}, "app2: not healthy: 503 no database"),
            (
                {"app": {"healthy": False, "state": "BACKOFF", "health": "no answer"}},
                "app2: not healthy (Supervisor says BACKOFF): no answer",
            ),
            ({"app": {"workers": 1}}, "app2: 1 of 2 workers run"),
            ({"app": {"configured": False}}, "app2: runs something else than"),
            ({"app": {"pending": {"to": "b-c", "from": LIVE, "who": "kim"}}}, "app2: a deploy of b-c by kim was cut"),
            ({"answer": {"ok": False, "said": "502 Bad Gateway"}}, "app2: does not answer clients: 502 Bad Gateway"),
            ({"maintenance": "2026-11-24T14:00:00Z"}, "app2: maintenance is on since 2026-11-24T14:00:00Z"),
            (
                {"certificates": [{"path": "/c", "days": 20, "ends": "2026-12-14T00:00:00Z", "problem": ""}]},
                "app2: certificate /c ends in 20 days, on 2026-12-14",
            ),
            (
                {"certificates": [{"path": "/c", "days": -1, "ends": "2026-11-24T00:00:00Z", "problem": ""}]},
                "app2: certificate /c ended on 2026-11-24",
            ),
            (
                {"certificates": [{"path": "/c", "days": None, "ends": None, "problem": "is not there"}]},
                "app2: certificate /c is not there",
            ),
            (
                {"disks": [{"directories": ["/", "/srv"], "free_mb": 2047, "free_percent": 50, "inodes_percent": 90}]},
                "app2: 2047 MB (50 %) free for / and /srv",
            ),
            (
                {"disks": [{"directories": ["/"], "free_mb": 9000, "free_percent": 9, "inodes_percent": 90}]},
                "app2: 9000 MB (9 %) free for /",
            ),
            (
                {"disks": [{"directories": ["/"], "free_mb": 9000, "free_percent": 50, "inodes_percent": 3}]},
                "app2: 3 % of the inodes free for /",
            ),
        ],
    )
    def test_one_thing(self, changes: dict[str, Any], text: str) -> None:
        (found,) = problems(app2={"status": app_status(**changes)})
        assert found.startswith(text)

    @pytest.mark.parametrize(
        ("days", "changes", "text"),
        [
            # Renewed at 30 of 90 days, so that status_certificate_days is not its limit; a week without a renewal is.
            (27, {}, None),
            (23, {}, None),
            (22, {}, "ends on 2026-12-16T12:00:00Z and should have been renewed by now"),
            (27, {"failures": 1, "message": "refused"}, None),
            (
                60,
                {"failures": 2, "message": "refused"},
                "is not renewed: 2 attempts have failed, the last that went well was at 2026-11-24T02:00:00Z: refused",
            ),
            (60, {"temporary": True, "message": "refused"}, "is a temporary one that no client trusts: refused"),
            (60, {"missing": ["www.x"], "failures": 1, "message": "no host"}, "does not cover www.x: no host"),
            (60, {"reload_due": True}, "is new, and services do not use it yet"),
            (60, {"checked": "2026-11-22T14:00:00Z"}, "was not looked after since 2026-11-22T14:00:00Z"),
        ],
    )
    def test_a_certificate_that_renews_itself(self, days: int, changes: dict[str, Any], text: str | None) -> None:
        now = datetime(2026, 11, 24, 12, tzinfo=UTC)
        starts, ends = now + timedelta(days=days - 90), now + timedelta(days=days)
        record = {
            "names": ["x"],
            "missing": [],
            "temporary": False,
            "starts": f"{starts:%Y-%m-%dT%H:%M:%SZ}",
            "ends": f"{ends:%Y-%m-%dT%H:%M:%SZ}",
            "checked": "2026-11-24T02:00:00Z",
            "succeeded": "2026-11-24T02:00:00Z",
            "failures": 0,
            "message": "",
            "reload_due": False,
            **changes,
        }
        certificate = {"path": "/ssl/x.crt", "days": days, "ends": record["ends"], "problem": ""}
        found = problems(app2={"status": app_status(certificates=[certificate], renewals={"x": record})})
        assert len(found) == (text is not None)
        assert all(problem.startswith(f"app2: certificate /ssl/x.crt {text}") for problem in found)

    def test_a_certificate_that_was_never_asked_for(self) -> None:
        certificate = {"path": "/ssl/x.crt", "days": 6, "ends": "2026-12-01T00:00:00Z", "problem": ""}
        (found,) = problems(app2={"status": app_status(certificates=[certificate], renewals={"x": {}})})
        assert found == "app2: certificate /ssl/x.crt was never asked for; deploy.yml does"

    def test_the_limits_themselves_are_well(self) -> None:
        certificate = {"path": "/c", "days": 21, "ends": "2026-12-15T00:00:00Z", "problem": ""}
        disk = {"directories": ["/"], "free_mb": 2048, "free_percent": 10, "inodes_percent": 10}
        assert problems(app2={"status": app_status(certificates=[certificate], disks=[disk])}) == []

    def test_drained_new_and_missing_members(self) -> None:
        drained = {"drained": True, "reason": "operator: disk", "since": "2026-11-24T14:00:00Z"}
        found = problems(lb1={"status": lb_status(pool={"app1": drained})})
        assert found == [
            "lb1: sends drained app1 no requests since 2026-11-24T14:00:00Z: operator: disk",
            "lb1: does not have app2 in its pool; deploy.yml adds it",
        ]
        assert problems(lb1={"status": lb_status(pool=None)}) == ["lb1: has no pool yet; deploy.yml makes it"]

    def test_one_lock_on_all_hosts_is_one_line(self) -> None:
        held = {"owner": "kim@laptop", "pid": 12, "since": "2026-11-24T14:00:00Z", "expired": False}
        hosts: dict[str, Any] = {name: {"status": app_status(lock=held)} for name in ("app1", "app2")}
        who = "kim@laptop (pid 12) since 2026-11-24T14:00:00Z"
        assert problems(**hosts) == [f"app1, app2: a deploy is under way: {who}"]
        (text,) = problems(dead=True, **hosts)
        assert text.startswith(f"app1, app2: lock of a deploy that has died: {who}")
        (text,) = problems(app1={"status": app_status(lock={**held, "expired": True})})
        assert text.startswith(f"app1: lock that is too old to count: {who}")
        # While it runs, what it has begun is no news.
        status = app_status(lock=held, app={"pending": {"to": "b-c", "from": LIVE, "who": "kim"}})
        assert len(problems(app1={"status": status})) == 1

    def test_a_failed_deploy_is_told_once_with_its_reason(self) -> None:
        record = {"id": "7", "release": "b-c", "who": "kim", "when": "2026-11-24T14:00:00Z"}
        undone = {**record, "outcome": "failed: undone", "reason": "a step failed"}
        failed = {**record, "outcome": "failed: switch", "reason": "it was not healthy"}
        found = problems(
            app1={"status": app_status(last_deploy=undone)}, app2={"status": app_status(last_deploy=failed)}
        )
        last = "the last deploy, of b-c by kim at 2026-11-24T14:00:00Z,"
        assert found == [f"app1, app2: {last} failed: switch on app2: it was not healthy"]


class TestNotes:
    """What is said of a server's operating system, and is no problem."""

    @staticmethod
    def notes(**changes: Any) -> list[str]:
        status = app_status(system={"reboot": [], "outside": [], "updates": None, **changes})
        found = fleet(app2={"status": status})
        assert found.problems(lambda _: False) == []
        return [str(note) for note in found.notes()]

    def test_nothing(self) -> None:
        assert fleet().notes() == []
        assert self.notes() == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (
                {"reboot": ["kernel 6.12.9", "an update of dbus"]},
                "app2: waits for a reboot, for kernel 6.12.9 and an update of dbus: playbooks/patch.yml",
            ),
            (
                {"outside": ["supervisor.service", "nginx.service"]},
                "app2: supervisor.service and nginx.service started before its sandbox was set up",
            ),
            (
                {"updates": {"last": "2026-11-21T14:29:00Z", "days": 1}},
                "app2: no unattended updates since 2026-11-21T14:29:00Z",
            ),
        ],
    )
    def test_one_thing(self, changes: dict[str, Any], text: str) -> None:
        (found,) = self.notes(**changes)
        assert found.startswith(text)

    @pytest.mark.parametrize("updates", [("2026-11-21T14:31:00Z", 1), ("2026-11-15T14:31:00Z", 7)])
    def test_updates_that_are_not_late(self, updates: tuple[str, int]) -> None:
        assert self.notes(updates={"last": updates[0], "days": updates[1]}) == []

    def test_servers_that_wait_for_the_same_are_one_line(self) -> None:
        waiting: dict[str, Any] = {
            name: {"status": app_status(system={"reboot": ["an update"], "outside": [], "updates": None})}
            for name in ("app1", "app2")
        }
        (found,) = fleet(**waiting).notes()
        assert found.hosts == ("app1", "app2")


class TestData:
    """What is said of PostgreSQL and of backups."""

    @staticmethod
    def said(**changes: Any) -> list[str]:
        """Return what is wrong with a database server, on which all is well but what is given."""
        arguments = {"hosts": ["db1"], "app_hosts": [], "lb_hosts": [], "limits": LIMITS}
        fleet = report["Fleet"]({**arguments, "found": {"db1": {"status": db_status(**changes)}}})
        return [str(problem).removeprefix("db1: ") for problem in fleet.problems(lambda _: False)]

    def test_all_is_well(self) -> None:
        assert self.said() == []

    def test_cells(self) -> None:
        cells = report["row"]("db1", db_status(), NOW)
        assert cells[:3] == ["db1", "(database)", "PostgreSQL 17.6"]
        assert cells[6] == "ok"
        assert report["row"]("bak1", db_status() | {"database": None}, NOW)[1] == "(backup)"

    def test_the_line_on_data(self) -> None:
        tried = {"ok": True, "ended": "2026-11-22T04:00:00Z", "message": "", "started": ""}
        status = db_status(backup=backup_state(restore_check=tried))
        assert report["data_line"]("db1", status, NOW) == (
            "db1: PostgreSQL 17.6; 12 of 100 connections; diff backup 02:00, 3.7 MB, of a database of 2.1 GB in"
            " /var/lib/pgbackrest; WAL archived 14:29; restore tried Nov 22: ok"
        )
        assert report["data_line"]("app1", app_status(), NOW) == ""
        assert (
            report["data_line"]("app1", app_status(backup_note="/x is not backed up"), NOW)
            == "app1: /x is not backed up"
        )

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"database": {"problem": "Connection refused"}}, "PostgreSQL does not answer: Connection refused"),
            ({"database": {"connections": 90}}, "90 of PostgreSQL's 100 connections are in use"),
            (
                {"database": {"pending_restart": ["max_connections"]}},
                "PostgreSQL needs a restart to use what is configured",
            ),
            ({"backup": {}}, "has no backups yet"),
            (
                {"backup": backup_state(last=FAILED_BACKUP)},
                "the last backup, at 2026-11-24T02:00:01Z, failed: the repository /b",
            ),
            ({"backup": backup_state(last=None, last_success=None)}, "there is no backup yet"),
            (
                {"backup": backup_state(max_age_hours=12)},
                "the newest backup is of 2026-11-24T02:00:12Z, and should not",
            ),
            (
                {
                    "backup": backup_state(
                        check={"time": "2026-11-24T14:20:00Z", "ok": False, "message": "archiving fails"}
                    )
                },
                "backups: archiving fails (seen at 2026-11-24T14:20:00Z)",
            ),
            (
                {"backup": backup_state(check={"time": "2026-11-24T13:00:00Z", "ok": True, "message": ""})},
                "nothing has looked after the backups since 2026-11-24T13:00:00Z",
            ),
            ({"backup": backup_state(check=None)}, "nothing has looked after the backups; see"),
            (
                {
                    "backup": backup_state(
                        restore_check={"ok": False, "ended": "2026-11-22T04:00:00Z", "message": "no room"}
                    )
                },
                "the last restore check, at 2026-11-22T04:00:00Z, failed: no room",
            ),
            (
                {"kept": ["/var/lib/postgresql/17/main.before-1"]},
                "keeps what a restore has left in /var/lib/postgresql/17/",
            ),
        ],
    )
    def test_one_thing(self, changes: dict[str, Any], text: str) -> None:
        (said,) = self.said(**changes)
        assert said.startswith(text)

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("/var/lib/postgresql/17/main.before-1", "main.before-1"),
            ("/var/lib/postgresql/hardstand/blog-beside", "beside"),
        ],
    )
    def test_how_to_remove_what_is_kept(self, path: str, name: str) -> None:
        (said,) = self.said(kept=[path])
        assert said.endswith(f"playbooks/restore.yml -e restore_discard={name}")

    def test_what_is_new_need_not_have_a_backup_yet(self) -> None:
        new = backup_state(last=None, last_success=None, check=None, created="2026-11-24T14:29:00Z")
        assert self.said(backup=new) == []

    def test_a_cause_is_told_once(self) -> None:
        check = {"time": "2026-11-24T14:20:00Z", "ok": False, "message": FAILED_BACKUP["message"]}
        assert len(self.said(backup=backup_state(last=FAILED_BACKUP, check=check))) == 1

    def test_a_server_whose_backups_another_makes(self) -> None:
        assert self.said(backup=backup_state(runs_backups=False, last=None, last_success=None)) == []


class TestTable:
    """What people read."""

    def rows(self, **hosts: dict[str, Any]) -> list[list[str]]:
        found = fleet(**hosts)
        return [report["row"](host, found.statuses.get(host), NOW) for host in found.hosts]

    def test_cells(self) -> None:
        lb1, app1, app2 = self.rows(app2={"problem": "gone"})
        assert lb1[:3] == ["lb1", "(balancer)", "2 of 2 members"]
        assert app1 == [
            *("app1", LIVE, "Say hello", "blue", "13:02", "2/2", "ok", "82d", "61% 12G", "live 13:02", "kim")
        ]
        assert app2[:3] == ["app2", "unreachable", "-"]

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({}, "ok"),
            ({"nginx": "inactive"}, "down"),
            ({"app": {"healthy": False, "health": "503 no"}}, "503"),
            ({"app": {"healthy": False, "health": "no answer"}}, "down"),
            ({"answer": {"ok": False, "said": "502 Bad Gateway"}}, "502"),
        ],
    )
    def test_health_in_a_word(self, changes: dict[str, Any], word: str) -> None:
        assert report["health"](app_status(**changes)) == word

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("2026-11-24T14:29:00Z", "14:29"),
            ("2026-11-23T19:00:00Z", "19:00"),
            ("2026-11-23T14:00:00Z", "Nov 23"),
            ("2025-01-02T14:00:00Z", "2025-01"),
            (None, "-"),
        ],
    )
    def test_moments(self, text: str | None, shown: str) -> None:
        assert report["when"](text, NOW) == shown

    def test_it_fits_and_the_subject_gives_way(self) -> None:
        subject = "Explain at length, and with\ta tab and a\nline break, what this commit is for and why it was made"
        deploy = {"outcome": "rolled back", "when": "2026-11-23T14:00:00Z", "who": "somebody-with-a-long-name@machine"}
        status = app_status(app={"subject": subject, "since": "2026-11-23T14:00:00Z"}, last_deploy=deploy)
        text = report["table"](self.rows(app1={"status": status}), 120)
        lines = text.splitlines()
        assert len(lines) == 4
        assert max(map(len, lines)) <= 120
        assert "Explain at le" in lines[2]
        assert "…" in lines[2]
        # Every column begins at the same place in every line.
        for heading, cell in (("slot", "blue"), ("health", "ok"), ("by", "kim")):
            assert lines[0].index(heading) == lines[3].index(cell)
        wide = report["table"](self.rows(app1={"status": status}), 240)
        assert "what this commit is for and why it was made" in wide

    def test_json_is_one_line_with_everything(self) -> None:
        waiting = app_status(system={"reboot": ["an update"], "outside": [], "updates": None})
        found = fleet(app1={"status": waiting}, app2={"problem": "gone"})
        text = report["ActionModule"].document(found, found.problems(lambda _: False), found.notes(), NOW)
        assert "\n" not in text
        document = json.loads(text)
        assert document["ok"] is False
        assert document["problems"] == [{"hosts": ["app2"], "text": "gone"}]
        assert [note["hosts"] for note in document["notes"]] == [["app1"]]
        assert document["hosts"]["app2"] == {"problem": "gone"}
        assert document["hosts"]["app1"]["app"]["release"] == LIVE
        assert document["hosts"]["app1"]["health"] == "ok"


class TestPlaybook:
    """playbooks/status.yml for servers that are all gone: nothing listens on port 1."""

    @pytest.fixture(scope="class")
    @classmethod
    def environment(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("status")
        password = directory / "password"
        password.write_text("open sesame\n")
        password.chmod(0o600)
        settings = {
            "env": "gone",
            "environment_inventories": str(directory),
            "environment_password_file": str(password),
            "environment_host": "127.0.0.1:1,127.0.0.2:1",
            "environment_lb": "127.0.0.3:1",
            "environment_domain": "a.test",
            "environment_database_url": "postgresql://a:{random}@127.0.0.9/a",
        }
        made = cls.play("environment", directory, "-e", json.dumps(settings))
        assert made.returncode == 0, made.stdout + made.stderr
        return directory

    @staticmethod
    def play(name: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HARDSTAND_")}
        return subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), f"playbooks/{name}.yml", *options],
            cwd=PROJECT,
            env=environment
            | {
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
                "HARDSTAND_VAULT_PASSWORD_FILE": str(directory / "password"),
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def test_the_table_has_them_and_it_fails(self, environment: Path) -> None:
        run = self.play("status", environment, "-i", str(environment / "gone"))
        assert run.returncode == 2, run.stdout + run.stderr
        lines = run.stdout.splitlines()
        heading = next(number for number, line in enumerate(lines) if line.startswith("host  "))
        assert [line.split()[:2] for line in lines[heading + 1 : heading + 4]] == [
            ["app1", "unreachable"],
            ["app2", "unreachable"],
            ["lb1", "unreachable"],
        ]
        assert next(line for line in lines if line.startswith("! ")).endswith("Connection refused")

    def test_json_and_no_failure(self, environment: Path) -> None:
        options = ("-e", "status_format=json", "-e", "status_fail=false")
        run = self.play("status", environment, "-i", str(environment / "gone"), *options)
        assert run.returncode == 0, run.stdout + run.stderr
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
        document = json.loads(line)
        assert document["ok"] is False
        assert set(document["hosts"]) == {"app1", "app2", "lb1"}

    def test_settings_first(self, environment: Path) -> None:
        run = self.play("status", environment, "-i", str(environment / "gone"), "-e", "status_certificat_days=3")
        assert run.returncode == 2
        assert "Did you mean status_certificate_days?" in run.stdout + run.stderr
        assert "unreachable=1" not in run.stdout
