"""The role patch: what it finds due, how it judges health, and that nothing is touched after a failure."""

from __future__ import annotations

import base64
import http.server
import json
import os
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader

from tests.role_templates import ROLES, evaluate, load_file

ROLE = ROLES / "patch"
NOTHING: dict[str, Any] = {"upgrades": [], "interrupted": False, "reboot": [], "services": [], "waiting": []}
PLAYBOOK = ROLES.parent / "playbooks/patch.yml"
REASON = "updates of its operating system"

# The role's modules import it from here, as on a server, where Ansible brings it along.
ansible.module_utils.__path__.append(str(ROLE / "module_utils"))
survey, health = (load_file(ROLE / f"library/{name}.py") for name in ("patch_survey", "patch_health"))
host = load_file(ROLE / "module_utils/patch_host.py")


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages ask for a reboot."""
    path = tmp_path / "reboot-required"
    monkeypatch.setattr(host, "REBOOT_REQUIRED", path)
    return path


def test_upgrades_are_those_that_apt_would_install() -> None:
    text = (
        "NOTE: This is only a simulation!\nInst libc6 [2.36-9] (2.36-10 Debian-Security:12 [amd64])\n"
        "Conf libc6 (2.36-10)\nConf half-done (1)\nInst linux-image-6.1.0-30-amd64 (6.1.124-1)\nRemv x\n"
    )
    assert survey.upgrades(text) == ["half-done", "libc6", "linux-image-6.1.0-30-amd64"]
    assert survey.upgrades("") == []


def test_dpkg_was_cut_off_where_its_journal_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "JOURNAL", tmp_path)
    (tmp_path / "tmp.i").touch()
    assert not survey.interrupted()
    (tmp_path / "0001").touch()
    assert survey.interrupted()


@pytest.mark.usefixtures("flag")
@pytest.mark.parametrize(("state", "due"), [("0", False), ("1", False), ("2", True), ("3", True)])
def test_a_reboot_is_due_for_an_older_kernel(state: str, due: bool) -> None:
    report = f"NEEDRESTART-VER: 3.6\nNEEDRESTART-KCUR: 6.1.0-1\nNEEDRESTART-KEXP: 6.1.0-2\nNEEDRESTART-KSTA: {state}\n"
    assert host.reboot(report) == (["kernel 6.1.0-2"] if due else [])


def test_a_reboot_is_due_where_packages_ask_for_it(flag: Path) -> None:
    assert host.reboot("") == []
    flag.touch()
    assert host.reboot("") == ["an update"]
    Path(f"{flag}.pkgs").write_text("libc6\ndbus\nlibc6\n")
    assert host.reboot("NEEDRESTART-KSTA: 2\n") == ["a newer kernel", "an update of dbus, libc6"]


def test_services_are_those_that_needrestart_names() -> None:
    report = "NEEDRESTART-KSTA: 1\nNEEDRESTART-SVC: nginx.service\nNEEDRESTART-SVC: dbus.service\n"
    assert host.services(report) == ["dbus.service", "nginx.service"]
    assert host.services("") == []


@pytest.mark.parametrize(
    ("unit", "sandboxed", "outside"),
    [
        ("ActiveState=active\nNoNewPrivileges=yes", False, True),
        ("ActiveState=active\nNoNewPrivileges=yes", True, False),
        ("ActiveState=active\nNoNewPrivileges=no", False, False),
        ("ActiveState=inactive\nNoNewPrivileges=yes", False, False),
        ("", False, False),
    ],
)
def test_outside_its_sandbox_is_a_process_from_before_it(
    monkeypatch: pytest.MonkeyPatch, unit: str, sandboxed: bool, outside: bool
) -> None:
    command = ["setpriv", "--no-new-privs", "cat"] if sandboxed else ["cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # It answers, so it runs as what it is to be.
        os.write(process.stdin.fileno(), b"x")
        process.stdout.read(1)
        monkeypatch.setattr(host, "output", lambda _: f"MainPID={process.pid}\n{unit}\n")
        assert host.outside("nginx.service") is outside
        process.stdin.close()


@pytest.mark.parametrize(
    ("settings", "days"),
    [
        ("days='1'", 1),
        ("enabled='1'\ndays='7'", 7),
        ("enabled='0'\ndays='1'", None),
        ("days='0'", None),
        ("", None),
    ],
)
def test_updates_come_by_themselves_where_apt_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, days: int | None
) -> None:
    program, stamp = tmp_path / "unattended-upgrade", tmp_path / "stamp"
    monkeypatch.setattr(host, "UNATTENDED", program)
    monkeypatch.setattr(host, "UNATTENDED_STAMP", stamp)
    monkeypatch.setattr(host, "output", lambda _: settings)
    assert host.unattended() is None
    program.touch()
    assert host.unattended() == (days and (program.stat().st_ctime, days))
    stamp.touch()
    os.utime(stamp, (1_700_000_000, 1_700_000_000))
    assert host.unattended() == (days and (1_700_000_000, days))


def pools(**members: dict[str, Any]) -> dict[str, Any]:
    """Return what was read at load balancers, each with what it knows of app1."""
    text = {name: json.dumps({"members": {"app1": member} if member else {}}) for name, member in members.items()}
    return {
        "results": [{"item": name, "content": base64.b64encode(said.encode()).decode()} for name, said in text.items()]
    }


@pytest.mark.parametrize(
    ("member", "told", "left_out"),
    [
        ({"drained": False, "reason": ""}, True, False),
        ({"drained": True, "reason": REASON}, True, True),
        ({"drained": True, "reason": "operator: disk"}, False, False),
        ({"drained": True, "reason": "left out of a deploy"}, False, False),
        ({}, False, False),
    ],
)
def test_only_what_an_earlier_run_has_drained_is_let_in(member: dict[str, Any], told: bool, left_out: bool) -> None:
    serving = {"drained": False, "reason": ""}
    variables = {
        "__patch_pools": pools(lb1=serving, lb2=member),
        "inventory_hostname": "app1",
        "patch_reason": REASON,
        "__patch_survey": NOTHING,
    }
    assert sorted(evaluate("patch", "_patch_balancers", **variables)) == ["lb1", *(["lb2"] if told else [])]
    assert evaluate("patch", "_patch_left_out", **variables) == (["lb2"] if left_out else [])
    assert evaluate("patch", "_patch_due", **variables) is left_out


@pytest.mark.parametrize(
    ("found", "settings", "due"),
    [
        ({}, {}, False),
        ({"upgrades": ["libc6"]}, {}, True),
        ({"interrupted": True}, {}, True),
        ({"services": ["nginx.service"]}, {}, True),
        ({"services": ["nginx.service"]}, {"patch_restart": False}, False),
        # As the command line says it.
        ({"services": ["nginx.service"]}, {"patch_restart": "false"}, False),
        ({"reboot": ["an update"]}, {}, True),
        ({"reboot": ["an update"]}, {"patch_reboot": "never"}, False),
        ({"waiting": ["dbus.service"]}, {}, False),
        ({}, {"patch_reboot": "always"}, True),
    ],
)
def test_a_server_with_nothing_to_do_stays_in(
    found: dict[str, list[str]], settings: dict[str, Any], *, due: bool
) -> None:
    assert evaluate("patch", "_patch_due", __patch_survey=NOTHING | found, __patch_pools=pools(), **settings) is due


def test_outcome_says_what_was_done_and_what_waits() -> None:
    def outcome(**variables: Any) -> str:
        text: str = evaluate("patch", "_patch_outcome", **{"__patch_pools": pools(), **variables})
        return text

    assert outcome() == "not touched"
    assert outcome(__patch_survey={"changed": False, "skipped": True}) == "not touched"
    assert outcome(__patch_survey=NOTHING) == "nothing to do"
    assert outcome(__patch_survey=NOTHING, __patch_failure="no") == "FAILED: no"
    before = NOTHING | {"upgrades": ["libc6"]}
    after = {"upgrades": [], "reboot": ["kernel 2"], "services": ["nginx.service"], "waiting": ["dbus.service"]}
    text = outcome(__patch_survey=before, __patch_after=after, patch_reboot="never")
    assert text.startswith("1 updated: libc6; restarted nginx.service; a reboot is due for kernel 2; until")
    text = outcome(__patch_survey=before, __patch_after=after, __patch_reboot={"rebooted": True})
    assert text == "1 updated: libc6; rebooted"
    found = pools(lb1={"drained": True, "reason": REASON})
    names = {"inventory_hostname": "app1", "patch_reason": REASON}
    assert outcome(__patch_survey=NOTHING, __patch_pools=found, **names) == "let in again"


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """A server on a unix socket that answers with each status of a list, the last one for ever."""
    statuses = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.end_headers()
            self.wfile.write(b"schema current")

        def address_string(self) -> str:
            return "local"

        def log_message(self, *_: Any) -> None:
            pass

    path = str(tmp_path / "live.sock")
    with socketserver.UnixStreamServer(path, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path, statuses
        server.shutdown()


def test_health_is_an_answer_2xx(answers: tuple[str, list[int]]) -> None:
    path, statuses = answers
    connection = health.Connection(path, None, None)
    assert health.ask(connection, "/health/ready", "blog.example") == (True, "200 schema current")
    statuses[:] = [503]
    assert health.ask(connection, "/health/ready", "blog.example") == (False, "503 schema current")
    healthy, detail = health.ask(health.Connection(f"{path}.no", None, None), "/", "x")
    assert not healthy
    assert "No such file" in detail


@pytest.mark.parametrize(
    ("groups", "order"),
    [
        (
            {"backup": ["bak"], "db": ["db"], "lb": ["lb1", "lb2"], "app": ["app1", "app2"]},
            ["app1", "app2", "lb1", "lb2", "bak", "db"],
        ),
        ({"db": ["one"], "lb": ["one"], "app": ["one", "two"], "backup": ["two"]}, ["one", "two"]),
        ({"app": ["app1"], "db": ["db"], "backup": ["db"]}, ["app1", "db"]),
        ({"app": ["app1"]}, ["app1"]),
    ],
)
def test_servers_are_updated_one_at_a_time_that_of_the_database_last(
    tmp_path: Path, groups: dict[str, list[str]], order: list[str]
) -> None:
    groups = {**groups, "preflight_passed": sorted({name for names in groups.values() for name in names})}
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(
        yaml.safe_dump({group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()}, sort_keys=False)
    )
    (play,) = (play for play in yaml.safe_load(PLAYBOOK.read_text()) if "serial" in play)
    assert play["serial"] == 1
    manager = InventoryManager(loader=DataLoader(), sources=[str(inventory)])
    assert [str(server) for server in manager.get_hosts(play["hosts"])] == order


UNREACHABLE = {
    "unreachable": True,
    "msg": "Data could not be sent. Make sure this host can be reached over ssh: ",
}


@pytest.mark.parametrize(
    ("step", "said", "text"),
    [
        ("__patch_packages", UNREACHABLE, "cannot be reached: the connection was lost"),
        (
            "__patch_survey",
            {"unreachable": True, "msg": f"Warning\n{UNREACHABLE['msg']}ssh: connect to host x port 22: No route"},
            "cannot be reached: connect to host x port 22: No route",
        ),
        (
            "__patch_pools",
            {"results": [*pools(lb1={"drained": False})["results"], {"item": "lb2", **UNREACHABLE}]},
            "lb2 cannot be reached: the connection was lost",
        ),
    ],
)
def test_a_server_that_is_gone_is_named(step: str, said: dict[str, Any], text: str) -> None:
    variables = {"__patch_pools": pools(), "__patch_survey": NOTHING, "inventory_hostname": "app1"}
    assert evaluate("patch", "_patch_gone", **variables) == []
    variables |= {step: said}
    assert evaluate("patch", "_patch_gone", **variables) == [text]
    told = evaluate("patch", "_patch_failure_report", **variables, __patch_failure=text, patch_balancers=["lb1", "lb2"])
    assert told.startswith(f"app1: {text}\n")
    assert "run playbooks/patch.yml again" in told
    # By then the load balancers had been told.
    assert ("resume_host=app1" in told) is (step == "__patch_packages")


def test_the_failure_is_what_the_task_says_or_its_first_item_that_failed() -> None:
    def failure(result: dict[str, Any]) -> Any:
        return evaluate("patch", "_patch_failure_found", ansible_failed_result=result)

    assert failure({"msg": "no space"}) == "no space"
    items = [{"failed": False, "item": "lb1", "msg": "a"}, {"failed": True, "item": "lb2", "msg": "b"}]
    assert failure({"msg": "One or more items failed", "results": items}) == "lb2: b"
    assert failure({}) == "see above"


def test_a_failure_of_any_server_is_seen() -> None:
    groups = {"preflight_passed": ["a", "b"]}
    assert evaluate("patch", "_patch_failed", groups=groups, hostvars={"a": {}, "b": {}}) is False
    assert evaluate("patch", "_patch_failed", groups=groups, hostvars={"a": {}, "b": {"__patch_failure": "x"}}) is True
