"""The role patch: what it finds due, how it judges health, and that nothing is touched after a failure."""

from __future__ import annotations

import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.role_templates import ROLES, evaluate, load_file

NOTHING: dict[str, list[str]] = {"upgrades": [], "reboot": [], "services": [], "waiting": []}
PLAYBOOK = ROLES.parent / "playbooks/patch.yml"


def load(name: str) -> ModuleType:
    return load_file(ROLES / f"patch/library/{name}.py")


survey, health = load("patch_survey"), load("patch_health")


def test_upgrades_are_those_that_apt_would_install() -> None:
    text = (
        "NOTE: This is only a simulation!\nInst libc6 [2.36-9] (2.36-10 Debian-Security:12 [amd64])\n"
        "Conf libc6 (2.36-10)\nConf half-done (1)\nInst linux-image-6.1.0-30-amd64 (6.1.124-1)\nRemv x\n"
    )
    assert survey.upgrades(text) == ["half-done", "libc6", "linux-image-6.1.0-30-amd64"]
    assert survey.upgrades("") == []


@pytest.mark.parametrize(("state", "due"), [("0", False), ("1", False), ("2", True), ("3", True)])
def test_a_reboot_is_due_for_an_older_kernel(state: str, due: bool) -> None:
    report = f"NEEDRESTART-VER: 3.6\nNEEDRESTART-KCUR: 6.1.0-1\nNEEDRESTART-KEXP: 6.1.0-2\nNEEDRESTART-KSTA: {state}\n"
    assert survey.needs(report) == (["kernel 6.1.0-2"] if due else [], [])


def test_services_are_those_that_needrestart_names() -> None:
    report = "NEEDRESTART-KSTA: 1\nNEEDRESTART-SVC: nginx.service\nNEEDRESTART-SVC: dbus.service\n"
    assert survey.needs(report) == ([], ["dbus.service", "nginx.service"])
    assert survey.needs("") == ([], [])


@pytest.mark.parametrize(
    ("found", "settings", "due"),
    [
        ({}, {}, False),
        ({"upgrades": ["libc6"]}, {}, True),
        ({"services": ["nginx.service"]}, {}, True),
        ({"services": ["nginx.service"]}, {"patch_restart": False}, False),
        ({"reboot": ["an update"]}, {}, True),
        ({"reboot": ["an update"]}, {"patch_reboot": "never"}, False),
        ({"waiting": ["dbus.service"]}, {}, False),
        ({}, {"patch_reboot": "always"}, True),
    ],
)
def test_a_server_with_nothing_to_do_stays_in(
    found: dict[str, list[str]], settings: dict[str, Any], *, due: bool
) -> None:
    assert evaluate("patch", "_patch_due", __patch_survey=NOTHING | found, **settings) is due


def test_outcome_says_what_was_done_and_what_waits() -> None:
    def outcome(**variables: Any) -> str:
        text: str = evaluate("patch", "_patch_outcome", **variables)
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


def test_every_play_for_servers_goes_one_at_a_time_and_none_after_a_failure() -> None:
    plays = {play["name"]: play for play in yaml.safe_load(PLAYBOOK.read_text())}
    updates = [play for name, play in plays.items() if name.startswith("Update")]
    assert [play["hosts"].split(":")[0] for play in updates] == ["app", "lb", "backup", "db"]
    for play in updates:
        assert play["serial"] == 1
        (task,) = play["tasks"]
        assert "not _patch_failed" in task["when"]
        assert task["rescue"]
    # No server is in two of the plays: the later ones exclude the groups of the earlier.
    for number, play in enumerate(updates):
        for earlier in updates[:number]:
            group = earlier["hosts"].split(":")[0]
            assert f"!{group}" in play["hosts"] or (play["hosts"].startswith("db") and group == "backup")


def test_a_failure_of_any_server_is_seen() -> None:
    groups = {"preflight_passed": ["a", "b"]}
    assert evaluate("patch", "_patch_failed", groups=groups, hostvars={"a": {}, "b": {}}) is False
    assert evaluate("patch", "_patch_failed", groups=groups, hostvars={"a": {}, "b": {"__patch_failure": "x"}}) is True
