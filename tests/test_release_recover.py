"""Module release_recover: wherever a deploy was cut off, the host is back on one release, and no request is lost."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.app_host import Host, InBackground, host, replace_symlink
from tests.harness import Repeated
from tests.local_project import LOCK, LocalProject
from tests.release_support import APP, ROLE, alive, eventually, start_module
from tests.role_modules import result_of
from tests.role_templates import evaluate

# Works on the host as a step of a deploy does, and does not mind being asked to end.
STUBBORN = """
import signal, sys, time
import ansible.module_utils
ansible.module_utils.__path__.append(sys.argv[1])
from ansible.module_utils.release_host import Layout, busy
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with busy(Layout(sys.argv[2], "blog")):
    print("busy", flush=True)
    time.sleep(60)
"""


class Clients(Repeated):
    """Two clients that ask all the time, each time on a new connection; use as a context manager."""

    def __init__(self, app_host: Host) -> None:
        super().__init__(threads=2)
        self.host = app_host
        self.answers: list[str] = []
        self.errors: list[Exception] = []

    def once(self) -> None:
        try:
            self.answers.append(self.host.ask()["slot"])
        except (OSError, http.client.HTTPException) as error:
            self.errors.append(error)


def with_id(app_host: Host, number: str) -> dict[str, Any]:
    return {**app_host.deploy, "id": number}


@pytest.fixture
def served(app_host: Host) -> str:
    """A release that serves and is on record."""
    release_id = app_host.deploy_new()
    app_host.finish(release_id)
    return release_id


def begin(app_host: Host, *steps: str) -> str:
    """Take the first steps of a deploy; returns the new release."""
    new = app_host.make()
    for step in steps:
        app_host.step(step, new, deploy=with_id(app_host, "d2"))
    return new


def assert_undone(app_host: Host, old: str, new: str) -> None:
    """The old release serves alone, and the deploy is on record as one that was undone."""
    app_host.assert_one_slot(old)
    assert app_host.pending() is None
    record = app_host.records()[-1]
    expected = {"id": "d2", "release": new, "outcome": "failed: undone", "reason": "somebody pressed Ctrl-C"}
    assert record.items() >= expected.items()
    again = app_host.recover()
    assert (again["changed"], again["outcome"], again["release"]) == (False, "unchanged", old)
    assert app_host.records()[-1] == record


class TestAHostOnWhichNothingIsHalfDone:
    def test_is_left_alone(self, app_host: Host, served: str) -> None:
        before = app_host.ask()
        result = app_host.recover()
        assert result.items() >= {"changed": False, "outcome": "unchanged", "release": served, "slot": "blue"}.items()
        assert result["pending"] == ""
        assert app_host.ask() == before
        assert len(app_host.records()) == 1

    def test_has_the_deploy_on_record_that_got_nowhere(self, app_host: Host, served: str) -> None:
        """It was built here, or another host has failed before this one began."""
        deploy = {**with_id(app_host, "d2"), "commit": "0123456789abcdef"}
        for _ in range(2):
            result = app_host.recover(deploy=deploy, reason="app2 failed")
            assert (result["changed"], result["outcome"], result["release"]) == (False, "unchanged", served)
        first, record = app_host.records()
        assert first["release"] == served
        expected = {"id": "d2", "release": "01234567", "outcome": "failed: undone", "reason": "app2 failed"}
        assert record.items() >= expected.items()

    @pytest.mark.parametrize("number", ["d1", "d2"])
    def test_has_not_been_undone_when_the_fleet_goes_forward(self, app_host: Host, served: str, number: str) -> None:
        """It has finished, in this deploy or in one before that was cut off."""
        app_host.recover(forward=True, deploy=with_id(app_host, number))
        assert [record["outcome"] for record in app_host.records()] == ["live"]
        app_host.assert_one_slot(served)

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_or_that_nothing_was_deployed_to(self, app_host: Host, tmp_path: Path, name: str) -> None:
        result = app_host.recover(root=str(tmp_path / name))
        assert result.items() >= {"changed": False, "outcome": "unchanged", "release": "", "slot": ""}.items()
        assert not (tmp_path / "nowhere").exists()


class TestGoingBack:
    @pytest.mark.parametrize(
        ("steps", "outcome"),
        [
            (["start"], "unchanged"),
            (["start", "switch"], "switched back"),
            (["start", "switch", "drain"], "switched back"),
        ],
        ids=["started", "switched", "drained"],
    )
    def test_to_the_release_before(self, app_host: Host, served: str, steps: list[str], outcome: str) -> None:
        old_pid = app_host.ask()["pid"]
        new = begin(app_host, *steps)
        result = app_host.recover(reason="somebody pressed Ctrl-C")
        assert result.items() >= {"changed": True, "outcome": outcome, "release": served, "pending": new}.items()
        assert (app_host.ask()["pid"] == old_pid) == ("drain" not in steps), "it runs still, unless it was stopped"
        assert_undone(app_host, served, new)

    @pytest.mark.usefixtures("served")
    def test_and_the_next_deploy_starts_from_there(self, app_host: Host) -> None:
        new = begin(app_host, "start", "switch")
        app_host.recover()
        for step in ("start", "switch", "drain"):
            app_host.step(step, new)
        app_host.finish(new)
        app_host.assert_one_slot(new)
        assert app_host.pending() is None

    def test_after_a_release_that_could_not_start(self, app_host: Host, served: str) -> None:
        broken = app_host.make("import nowhere")
        assert "failed" in app_host.cut_over(broken, step="start", deploy=with_id(app_host, "d2"))
        result = app_host.recover(reason="app1 failed")
        assert (result["outcome"], result["release"]) == ("unchanged", served)
        assert app_host.records()[-1]["outcome"] == "failed: start", "the host that failed has recorded why"
        assert len(app_host.records()) == 2
        app_host.assert_one_slot(served)

    def test_between_the_two_links(self, app_host: Host, served: str) -> None:
        new = begin(app_host, "start", "switch")
        replace_symlink(app_host.root / "current", f"releases/{served}")
        app_host.recover(reason="somebody pressed Ctrl-C")
        assert_undone(app_host, served, new)

    @pytest.mark.usefixtures("served")
    def test_is_foretold_in_check_mode(self, app_host: Host) -> None:
        new = begin(app_host, "start", "switch")
        result = app_host.recover(check=True)
        assert result.items() >= {"changed": True, "pending": new, "release": new, "slot": "green"}.items()
        assert app_host.live() == new
        assert app_host.pending() is not None

    def test_loses_no_request(self, app_host: Host, served: str) -> None:
        new = begin(app_host, "start", "switch")
        request = InBackground(lambda: app_host.ask("/slow/1"))
        green = app_host.root / "run" / "green.sock"
        eventually(lambda: host.connections(green) == 1, "the new release has a request")
        with Clients(app_host) as clients:
            eventually(lambda: len(clients.answers) > 20, "there is some load")
            app_host.recover(reason="somebody pressed Ctrl-C")
            eventually(lambda: "blue" in clients.answers, "the old release serves")
        assert clients.errors == []
        assert set(clients.answers) == {"blue", "green"}
        assert request.result()["slot"] == "green", "a request that runs is answered by the release that has it"
        assert_undone(app_host, served, new)

    def test_of_two_deploys_that_were_cut_off_to_what_served_before_both(self, app_host: Host, served: str) -> None:
        begin(app_host, "start", "switch")
        second = begin(app_host, "start", "switch")
        app_host.recover(reason="somebody pressed Ctrl-C")
        assert_undone(app_host, served, second)


class TestTheFirstRelease:
    @pytest.mark.parametrize(
        ("steps", "outcome"), [(["start"], "not in service yet"), (["start", "switch"], "taken out of service")]
    )
    def test_has_none_before_it(self, app_host: Host, steps: list[str], outcome: str) -> None:
        new = begin(app_host, *steps)
        result = app_host.recover(reason="app2 failed")
        assert (
            result.items() >= {"changed": True, "outcome": outcome, "release": "", "slot": "", "pending": new}.items()
        )
        assert app_host.programs() == {}
        assert app_host.gunicorns() == set()
        assert list(app_host.conf.iterdir()) == [], "a reboot starts nothing"
        assert list((app_host.root / "run").iterdir()) == []
        assert not (app_host.root / "current").is_symlink()
        assert app_host.pending() is None
        assert app_host.records()[-1]["outcome"] == "failed: undone"
        # It is still built, and the next deploy begins anew.
        app_host.cut_over(new)
        app_host.assert_one_slot(new)


class TestGoingForward:
    """The whole fleet had switched: no host may be on the old release now."""

    @pytest.mark.parametrize("steps", [["start", "switch"], ["start", "switch", "drain"]])
    def test_finishes_what_is_left(self, app_host: Host, served: str, steps: list[str]) -> None:
        new = begin(app_host, *steps)
        result = app_host.recover(forward=True, reason="app2 was not reachable")
        assert result.items() >= {"changed": True, "outcome": "finished", "release": new, "slot": "green"}.items()
        app_host.assert_one_slot(new)
        assert app_host.pending() is None
        record = app_host.records()[-1]
        assert record.items() >= {"id": "d2", "release": new, "outcome": "live", "slot": "green"}.items()
        assert served in {record["release"] for record in app_host.records()}


class TestAStepThatIsStillUnderWay:
    """Its control node is gone: nobody waits for it, and it must not go on beside the recovery."""

    def test_a_start_that_waits_for_health_is_ended(self, app_host: Host, served: str) -> None:
        new = app_host.make()
        (app_host.root / "shared" / "sick").touch()
        arguments = app_host.arguments_for(new, step="start", health_timeout=60, deploy=with_id(app_host, "d2"))
        waiting = start_module("release_cutover", arguments)
        eventually(lambda: len(app_host.programs()) == 2, "it waits for the new release")
        (app_host.root / "shared" / "sick").unlink()
        result = app_host.recover(reason="somebody pressed Ctrl-C")
        assert result["outcome"] == "unchanged"
        waiting.communicate(timeout=10)
        assert waiting.returncode != 0 or app_host.live() == served
        assert_undone(app_host, served, new)

    def test_so_is_a_build_and_the_installer_that_it_runs(self, app_host: Host, served: str) -> None:
        reached = app_host.directory / "reached"
        reached.touch()
        reached.chmod(0o666)
        uv = app_host.directory / "sleeping-uv"
        uv.write_text(f"#!/bin/sh\necho $$ >{reached}\nexec sleep 60\n")
        uv.chmod(0o755)
        files = {"requirements.txt": "gunicorn\nuvicorn-worker\nnever-asked-for\n"}
        arguments = app_host.arguments(app_host.repository.commit(files), "9-9", uv=str(uv))
        build = start_module("release_build", arguments)
        eventually(lambda: reached.read_text().strip() or build.poll() is not None, "the installer runs")
        pid = int(reached.read_text())
        result = app_host.recover()
        assert (result["changed"], result["outcome"]) == (False, "unchanged")
        build.communicate(timeout=10)
        assert build.returncode == -signal.SIGTERM
        eventually(lambda: not alive(pid), "the installer ends with the module")
        assert not app_host.release("9-9").exists()
        app_host.assert_one_slot(served)

    def test_one_that_does_not_listen_is_killed(self, tmp_path: Path) -> None:
        layout = host.Layout(str(tmp_path), APP)
        command: list[str | Path] = [sys.executable, "-c", STUBBORN, ROLE / "module_utils", tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"busy\n"
            started = time.monotonic()
            assert host.interrupt(layout, 0.3)
            assert 0.3 <= time.monotonic() - started < 5
            assert process.wait(5) == -signal.SIGKILL
        assert not host.interrupt(layout), "there is none any more"

    def test_only_one_works_on_a_host(self, app_host: Host, served: str) -> None:
        new = begin(app_host, "start", "switch")
        request = InBackground(lambda: app_host.ask("/slow/2"))
        green = app_host.root / "run" / "green.sock"
        eventually(lambda: host.connections(green) == 1, "the new release has a request")
        recovery = InBackground(lambda: app_host.recover(reason="somebody pressed Ctrl-C"))
        eventually(lambda: app_host.live() == served, "it has switched back and drains")
        result = app_host.cut_over(new, step="switch")
        assert result["msg"].startswith("Another step of a deploy is under way on this host; wait for it")
        assert recovery.result()["outcome"] == "switched back"
        assert request.result()["slot"] == "green"


class TestWhatCannotBeMended:
    def refused(self, app_host: Host, **changes: Any) -> str:
        result = app_host.recover(**changes)
        assert result.get("failed"), result
        assert result["msg"].endswith("\nThis host is not on the release that the others are on. Deploy, or roll back.")
        assert app_host.pending() is not None, "there is still something to recover"
        return str(result["msg"])

    def test_the_release_before_is_gone(self, app_host: Host, served: str) -> None:
        begin(app_host, "start", "switch")
        (app_host.release(served) / "release.json").unlink()
        assert f"Release {served} is not built here." in self.refused(app_host)
        assert app_host.ask()["slot"] == "green", "what serves goes on serving"

    def test_it_can_no_longer_start(self, app_host: Host, served: str) -> None:
        new = begin(app_host, "start", "switch", "drain")
        (app_host.release(served) / "service.py").write_text("import nowhere\n")
        message = self.refused(app_host)
        assert message.startswith(f"Release {served} ended while it started (")
        assert "No module named 'nowhere'" in message
        app_host.assert_one_slot(new)

    def test_supervisord_is_down(self, app_host: Host, served: str) -> None:
        begin(app_host, "start")
        message = self.refused(app_host, supervisor_socket="/nowhere.sock")
        assert message.startswith("supervisord does not answer (")
        assert app_host.recover()["outcome"] == "unchanged"
        app_host.assert_one_slot(served)


def test_a_recovery_that_is_cut_off_may_be_repeated(app_host: Host, served: str) -> None:
    new = begin(app_host, "start", "switch")
    request = InBackground(lambda: app_host.ask("/slow/2"))
    green = app_host.root / "run" / "green.sock"
    eventually(lambda: host.connections(green) == 1, "the new release has a request")
    arguments = app_host.arguments_to_recover(reason="somebody pressed Ctrl-C")
    first = start_module("release_recover", arguments)
    eventually(lambda: app_host.live() == served, "it has switched back and drains")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    result = result_of(start_module("release_recover", arguments))
    assert (result["changed"], result["release"]) == (True, served)
    assert request.result()["slot"] == "green"
    assert_undone(app_host, served, new)


class TestWhichWay:
    """What a recovery by hand finds out from the servers, when the run that knew is gone."""

    @pytest.mark.parametrize(
        ("servers", "forward"),
        [
            ({"app1": ("new", "old"), "app2": ("new", "old")}, False),
            # app1 has finished, so the whole fleet had switched.
            ({"app1": ("", "new"), "app2": ("new", "new")}, True),
            ({"app1": ("new", "new"), "app2": ("new", "new")}, False),
            # app1 took no part, or the deploy had not come to it.
            ({"app1": ("", "old"), "app2": ("new", "new")}, False),
            ({"app1": ("", "old"), "app2": ("", "old")}, False),
            ({"app1": ("", ""), "app2": ("new", "")}, False),
            ({"app1": None, "app2": ("new", "new")}, False),
            ({"app1": None, "app2": ("new", "new"), "app3": ("", "new")}, True),
        ],
    )
    def test_is_asked_of_all_servers(self, servers: dict[str, tuple[str, str] | None], forward: bool) -> None:
        hostvars = {
            name: {"__release_pending": {"pending": said[0], "release": said[1]} if said else {"unreachable": True}}
            for name, said in servers.items()
        }
        variables = {"ansible_play_hosts_all": list(servers), "hostvars": hostvars}
        assert evaluate("release", "_release_recover_forward", **variables) is forward
        for told, way in (("yes", True), ("no", False)):
            told_so = evaluate("release", "_release_recover_forward", **variables, release_recover_forward=told)
            assert told_so is way


class TestARealRun:
    """The project's playbooks against a host with releases that run: locks, cutover.yml, and recover.yml by itself."""

    @pytest.fixture
    def project(self, app_host: Host, tmp_path: Path) -> LocalProject:
        made = LocalProject(tmp_path, app_host.root.parent)
        shutil.rmtree(tmp_path / "action_plugins")  # nothing stands in for a module here
        variables = "roles/release/vars/main.yml"
        made.replace(variables, "/run/supervisor.sock", str(app_host.socket))
        made.replace(variables, "/etc/supervisor/conf.d", str(app_host.conf))
        return made

    @staticmethod
    def roll_out(app_host: Host, release_id: str) -> str:
        """Return a playbook that makes a release live which is built."""
        plan = {"release_id": release_id, "deploy": {**with_id(app_host, "d2"), "started": time.time()}}
        task = f"    - ansible.builtin.set_fact: {json.dumps({'__release_plan': plan})}\n"
        play = "- hosts: app:&preflight_passed\n  gather_facts: false\n  tasks:\n"
        return f"{LOCK}{play}{task}- ansible.builtin.import_playbook: playbooks/cutover.yml\n"

    def test_that_is_interrupted_before_it_has_switched_and_then_repeated(
        self, app_host: Host, served: str, project: LocalProject
    ) -> None:
        new, sick = app_host.make(), app_host.root / "shared" / "sick"
        before = app_host.ask()
        sick.touch()
        with project.start(self.roll_out(app_host, new)) as run:
            eventually(lambda: len(app_host.programs()) == 2 or run.process.poll() is not None, "it waits", 30)
            assert project.locked() == ["app1"], run.output()
            run.press_ctrl_c()
            eventually(lambda: "Please wait" in run.output(), "the recovery begins", 30)
            sick.unlink()
            assert run.code() != 0
            output = run.output()
        assert "(interrupted (SIGINT)): going back to the release that served before" in output
        assert app_host.ask() == before, output
        app_host.assert_one_slot(served)
        assert (project.locked(), app_host.pending()) == ([], None)
        record = app_host.records()[-1]
        assert record.items() >= {"outcome": "failed: undone", "reason": "interrupted (SIGINT)"}.items(), (
            app_host.records()
        )

        code, output = project.run(self.roll_out(app_host, new))
        assert code == 0, output
        assert "did not end by itself" not in output
        app_host.assert_one_slot(new)
        assert (project.locked(), app_host.pending()) == ([], None)
        assert app_host.records()[-1].items() >= {"id": "d2", "release": new, "outcome": "live"}.items()

    @pytest.mark.usefixtures("served")
    def test_that_is_killed_when_it_drains(self, app_host: Host, project: LocalProject) -> None:
        new = app_host.make()
        connection = app_host.connection()
        connection.connect()  # in use, until it is closed
        with project.start(self.roll_out(app_host, new)) as run:
            last_play = "PLAY [Stop the release before it]"
            eventually(lambda: last_play in run.output() or run.process.poll() is not None, "it comes to drain", 30)
            busy = app_host.root / ".busy"
            eventually(lambda: alive(int(busy.read_text() or 0)), "it drains")
            run.process.send_signal(signal.SIGTERM)
            eventually(lambda: "Please wait" in run.output(), "the recovery begins", 30)
            connection.close()
            assert run.code() != 0
            output = run.output()
        assert "(interrupted (SIGTERM)): finishing it, and unlocking." in output
        assert "finished" in output.partition("outcome")[2]
        app_host.assert_one_slot(new)
        assert (project.locked(), app_host.pending()) == ([], None)
        assert app_host.records()[-1].items() >= {"id": "d2", "release": new, "outcome": "live"}.items()
