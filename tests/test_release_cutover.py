"""Module release_cutover with a real supervisord and real gunicorns: what serves goes on serving, whatever happens."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest

from tests.app_host import Host, InBackground, host, replace_symlink
from tests.release_support import APP, SERVICE, alive, eventually, start_module
from tests.role_modules import result_of


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

    def test_before_the_new_release_is_healthy(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make("import time; time.sleep(1)")
        green = app_host.conf / f"{APP}-green.conf"
        app_host.cut_off(new, lambda: green.exists() and len(app_host.programs()) == 2, "green is started")
        assert app_host.ask()["slot"] == "blue"
        assert app_host.live() == old
        assert app_host.cut_over(new)["changed"]
        app_host.assert_one_slot(new)

    def test_and_then_another_release_is_deployed(self, app_host: Host) -> None:
        app_host.deploy_new()
        abandoned = app_host.make("import time; time.sleep(1)")
        app_host.cut_off(abandoned, lambda: len(app_host.programs()) == 2, "green is started")
        app_host.assert_one_slot(app_host.deploy_new())

    def test_between_the_two_links(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.deploy_new()
        replace_symlink(app_host.root / "current", f"releases/{old}")
        result = app_host.cut_over(new)
        assert (result["changed"], result["slot"], result["previous"]) == (True, "green", old)
        app_host.assert_one_slot(new)

    def test_while_the_old_release_drains(self, app_host: Host) -> None:
        app_host.deploy_new()
        new = app_host.make()
        request = InBackground(lambda: app_host.ask("/slow/2"))
        eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the request is there")
        app_host.cut_off(new, lambda: app_host.live() == new, "the new release is live")
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
        app_host.cut_off(new, stopping, "blue stops", drain_timeout=0)
        assert [file.name for file in app_host.conf.iterdir()] == [f"{APP}-green.conf"], "a reboot starts one slot"
        assert app_host.cut_over(new)["changed"]
        assert request.result()["slot"] == "blue"
        app_host.assert_one_slot(new)

    def test_a_second_run_is_refused_while_the_first_goes_on(self, app_host: Host) -> None:
        app_host.deploy_new()
        new, other = app_host.make("import time; time.sleep(1)"), app_host.make()
        first = start_module("release_cutover", app_host.arguments_for(new))
        eventually(lambda: len(app_host.programs()) == 2, "green is started")
        assert app_host.cut_over(other)["msg"].startswith("Another step of a deploy is under way")
        assert result_of(first)["changed"]
        app_host.assert_one_slot(new)


class TestSteps:
    """What a fleet does: each step on all hosts before the next one."""

    def test_the_old_release_runs_until_it_is_drained(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        before, new = app_host.ask(), app_host.make()

        started = app_host.step("start", new)
        assert (started["done"], started["slot"], started["previous"]) == (False, "green", old)
        assert started["healthy_seconds"] > 0
        assert app_host.ask() == before, "started, and not reached"
        assert app_host.live() == old
        assert len(app_host.programs()) == 2

        assert app_host.step("switch", new)["slot"] == "green"
        assert (app_host.ask()["slot"], app_host.live()) == ("green", new)
        # Supervisor calls a program that only after a second, which a quiet machine does not need to get here.
        eventually(lambda: app_host.programs()[f"{APP}-blue"] == "RUNNING", "the old release runs")
        assert alive(before["pid"]), "going back is a matter of one rename"

        request = InBackground(lambda: app_host.ask("/slow/1", slot="blue"))
        eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the old one has a request")
        drained = app_host.step("drain", new)
        assert (drained["unfinished"], drained["slot"]) == (0, "green")
        assert drained["drain_seconds"] > 0.3
        assert request.result()["slot"] == "blue"
        app_host.assert_one_slot(new)

    def test_each_may_be_repeated(self, app_host: Host) -> None:
        app_host.deploy_new()
        new = app_host.make()
        first = app_host.step("start", new)
        pid = app_host.ask(slot="green")["pid"]
        again = app_host.step("start", new)
        assert (again["done"], again["slot"], again["previous"]) == (False, "green", first["previous"])
        for step in ("switch", "switch", "start", "drain", "drain", "switch"):
            app_host.step(step, new)
            assert (app_host.ask()["pid"], app_host.live()) == (pid, new), f"{step} has started it anew"
        done = app_host.step("start", new)
        assert (done["changed"], done["done"], done["previous"]) == (False, True, new)
        app_host.assert_one_slot(new)

    def test_requests_reach_only_what_was_started(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        before, new = app_host.ask(), app_host.make()
        result = app_host.cut_over(new, step="switch")
        assert result["msg"] == (
            f"Release {new} does not run here, although it was started.\nRelease {old} still serves."
        )
        assert app_host.records()[-1]["outcome"] == "failed: switch"
        assert app_host.ask() == before
        app_host.assert_one_slot(old)

    def test_nothing_is_stopped_before_the_release_serves(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make()
        app_host.step("start", new)
        result = app_host.cut_over(new, step="drain")
        assert result["msg"] == f"Release {new} does not serve here yet.\nRelease {old} still serves."
        assert len(app_host.programs()) == 2
        assert app_host.ask(slot="green")["slot"] == "green"

    def test_one_that_is_live_and_not_healthy_is_a_failure(self, app_host: Host) -> None:
        app_host.deploy_new()
        new = app_host.make()
        app_host.step("start", new)
        (app_host.root / "shared" / "sick").touch()
        message = app_host.cut_over(new, step="switch")["msg"]
        assert message.startswith(f"Release {new} is live and not healthy: 503 Service Unavailable: {{")
        assert message.endswith("It is the live release, and is left as it is.")
        assert app_host.programs().keys() == {f"{APP}-blue", f"{APP}-green"}, "there is something to go back to"

    def test_a_release_that_cannot_serve_does_not_get_beyond_the_first(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        broken = app_host.make("import nowhere")
        result = app_host.cut_over(broken, step="start")
        assert "No module named 'nowhere'" in result["msg"]
        assert result["msg"].endswith(f"\nRelease {old} still serves.")
        assert app_host.records()[-1]["outcome"] == "failed: start"
        app_host.assert_one_slot(old)

    def test_are_foretold_in_check_mode(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make()
        before = app_host.ask()
        foretold = app_host.cut_over(new, check=True, step="start")
        assert (foretold["changed"], foretold["done"], foretold["slot"]) == (True, False, "green")
        for step in ("switch", "drain"):
            assert app_host.cut_over(new, check=True, step=step)["changed"]
        # One that is not even built: a dry run has not built it.
        assert app_host.cut_over("9-9", check=True, step="start")["changed"]
        done = app_host.cut_over(old, check=True, step="start")
        assert (done["changed"], done["done"]) == (False, True)
        assert app_host.ask() == before
        assert app_host.pending() is None
        app_host.assert_one_slot(old)

    def test_each_may_be_cut_off_and_repeated(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        new = app_host.make("import time; time.sleep(0.7)")
        green = app_host.conf / f"{APP}-green.conf"
        app_host.cut_off(
            new, lambda: green.exists() and len(app_host.programs()) == 2, "green is started", step="start"
        )
        app_host.step("start", new)

        # After it has reached the first of its links and nobody has looked whether it answers there.
        (app_host.root / "shared" / "sick").touch()
        assert "failed" in app_host.cut_over(new, step="switch")
        (app_host.root / "shared" / "sick").unlink()
        replace_symlink(app_host.root / "current", f"releases/{old}")
        assert app_host.step("switch", new)["slot"] == "green"
        assert app_host.live() == new

        request = InBackground(lambda: app_host.ask("/slow/1.5", slot="blue"))
        eventually(lambda: host.connections(app_host.root / "run" / "blue.sock") == 1, "the old one has a request")
        stopping = lambda: app_host.programs().get(f"{APP}-blue") == "STOPPING"  # noqa: E731
        app_host.cut_off(new, stopping, "blue stops", step="drain", drain_timeout=0)
        app_host.step("drain", new)
        assert request.result()["slot"] == "blue"
        app_host.assert_one_slot(new)


class TestWhatIsUnderWay:
    """The host remembers what to go back to, whatever becomes of the control node."""

    def test_is_noted_by_the_first_step_and_forgotten_by_the_last(self, app_host: Host) -> None:
        lock = {"path": "/nowhere", "token": "t0ken"}
        first = app_host.make()
        app_host.step("start", first, deploy={**app_host.deploy, "lock": lock})
        pending = app_host.pending()
        assert pending is not None
        assert (pending["from"], pending["to"], pending["deploy"]["id"]) == ("", first, "d1")
        assert "t0ken" not in json.dumps(pending), "everyone may read it"
        for step in ("switch", "drain"):
            app_host.step(step, first)
            assert app_host.pending() == pending
        app_host.finish(first)
        assert app_host.pending() is None

        second = app_host.make()
        app_host.step("start", second)
        assert (app_host.pending() or {}).items() >= {"from": first, "to": second}.items()

    def test_is_noted_before_anything_runs(self, app_host: Host) -> None:
        old = app_host.deploy_new()
        broken = app_host.make("import nowhere")
        app_host.cut_over(broken, step="start")
        assert (app_host.pending() or {}).items() >= {"from": old, "to": broken}.items()

    def test_goes_back_to_what_served_before_the_first_deploy_that_was_cut_off(self, app_host: Host) -> None:
        served = app_host.deploy_new()
        first, second = app_host.make(), app_host.make()
        for step in ("start", "switch"):
            app_host.step(step, first)
        # Its control node died. The next deploy finds this host switched, and others of the fleet not.
        app_host.step("start", second, deploy={**app_host.deploy, "id": "d2"})
        pending = app_host.pending() or {}
        assert (pending["from"], pending["to"], pending["deploy"]["id"]) == (served, second, "d2")
        for step in ("switch", "drain"):
            app_host.step(step, second)
        app_host.assert_one_slot(second)

    def test_is_forgotten_by_a_cut_over_in_one_call(self, app_host: Host) -> None:
        new = app_host.make()
        app_host.step("start", new)
        app_host.step("all", new)
        assert app_host.pending() is None
        app_host.assert_one_slot(new)

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_does_not_count_when_it_cannot_be_read(self, tmp_path: Path, content: str) -> None:
        (tmp_path / ".deploy.json").write_text(content)
        assert host.read_pending(host.Layout(str(tmp_path), APP)) is None


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
