"""Callback deploy_guard: however a run that holds locks ends, the fleet is recovered once, and unlocked."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.local_project import LOCK, PROJECT, UNLOCK, LocalProject, Run
from tests.release_support import alive, eventually, load

guard: Any = load("callback_plugins/deploy_guard.py")


@pytest.fixture
def project(tmp_path: Path) -> LocalProject:
    return LocalProject(tmp_path)


def recoveries(project: LocalProject) -> list[tuple[str, str]]:
    """Return what each recovery was told: forward, and the reason."""
    return [(note["forward"], note["reason"]) for note in project.notes() if "forward" in note]


class TestCommand:
    """What a recovery is started with, as a pure function."""

    def command(self, **cliargs: Any) -> list[str]:
        found: list[str] = guard.recovery_command(cliargs, "m/1/2", "no", "it's over", {"id": "d1"})
        assert found[:3] == [sys.executable, sys.argv[0], str(PROJECT / "playbooks/recover.yml")]
        return found[3:]

    def test_says_what_there_is_to_do(self) -> None:
        option, value = self.command()
        assert option == "--extra-vars"
        assert json.loads(value) == {
            "preflight_takeover_token": "m/1/2",
            "recover_forward": "no",
            "recover_reason": "it's over",
            "recover_deploy": {"id": "d1"},
        }

    def test_reaches_the_same_servers_in_the_same_way(self) -> None:
        command = self.command(
            inventory=("inventories/a", "inventories/b"),
            vault_ids=["x@y"],
            vault_password_files=("one", "two"),
            extra_vars=("a=1", "@b.yml"),
            subset="app1,app2",
            remote_user="deploy",
            private_key_file="key",
            timeout=10,
            ssh_common_args="-o A=b",
            become_method="sudo",
            become_password_file="become",
            forks=25,
            # Neither what the run was to do, nor what was not given.
            tags=["release"],
            start_at_task="x",
            become_user=None,
            connection="",
            check=False,
        )
        assert shlex.join(command[:-2]) == (
            "--inventory inventories/a --inventory inventories/b --vault-id x@y --vault-password-file one "
            "--vault-password-file two --user deploy --private-key key --timeout 10 --ssh-common-args '-o A=b' "
            "--become-method sudo --become-password-file become --forks 25 --limit app1,app2 "
            "--extra-vars a=1 --extra-vars @b.yml"
        )
        assert "preflight_takeover_token" in command[-1], "the last one wins"


@pytest.mark.parametrize("check", [False, True])
def test_a_lock_that_may_have_been_taken_counts(monkeypatch: pytest.MonkeyPatch, check: bool) -> None:
    """The run ended before the server's answer was here; a dry run takes none."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(guard, "subprocess", SimpleNamespace(run=run, DEVNULL=-3))
    monkeypatch.setattr(guard.signal, "signal", lambda *_: None)
    callback = guard.CallbackModule()
    callback.v2_playbook_on_task_start(SimpleNamespace(action="preflight_host", check_mode=check, args={}), False)
    callback.at_exit()
    assert len(commands) == (0 if check else 1)
    if commands:
        told = json.loads(commands[0][-1])
        assert told["recover_forward"] == "unlock"
        assert told["preflight_takeover_token"] == guard.own_token()


class TestARunThatEndsByItself:
    def test_is_left_alone_when_it_has_unlocked(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True)
        project.hosts(["app1", "app2"], ["lb1"])
        switch = project.task("release_cutover", step="drain")
        locked = project.task(locked="{{ lookup('ansible.builtin.fileglob', '" + str(project.locks) + "/*') }}")
        code, output = project.run(LOCK + project.play(switch, locked) + UNLOCK)
        assert code == 0, output
        assert recoveries(project) == []
        assert "did not end by itself" not in output
        assert project.locked() == []
        assert [note["locked"].count(".lock") for note in project.notes() if "locked" in note] == [3, 3]

    def test_is_recovered_when_it_has_forgotten_to(self, project: LocalProject) -> None:
        project.watch_recovery()
        code, output = project.run(LOCK + project.play(project.task("release_build")))
        assert recoveries(project) == [("no", "the run ended early")], output
        assert project.locked() == []
        assert code == 0

    def test_does_nothing_in_a_dry_run(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True)
        failing = project.task("release_cutover", step="drain", fails=["app1"])
        code, output = project.run(LOCK + project.play(failing), "--check")
        assert code == 2, output
        assert recoveries(project) == []
        assert "did not end by itself" not in output

    def test_nor_where_no_lock_was_taken(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True)
        failing = project.task("release_build", fails=["app1"])
        code, output = project.run(project.play(failing, hosts="app"))
        assert code == 2, output
        assert recoveries(project) == []


class TestAFailure:
    def test_goes_back(self, project: LocalProject) -> None:
        """With the real recovery: a host on which nothing is half-done is left as it is, and unlocked."""
        project.watch_recovery()
        project.hosts(["app1", "app2"], ["lb1"])
        steps = [
            project.task("release_build"),
            project.task("release_cutover", step="switch", fails=["app2"]),
            project.task("release_cutover", step="drain"),
        ]
        code, output = project.run(LOCK + project.play(*steps))
        assert code == 2, output
        assert recoveries(project) == [("no", "app2 failed")]
        assert project.locked() == []
        text = "The run did not end by itself (app2 failed): going back to the release that served before, and"
        assert f"\n{text} unlocking. Please wait.\n" in output
        table = output.partition("outcome")[2]
        assert table.count("unchanged") == 2, output
        assert output.index("as told") < output.index(text), "the cause comes first"

    def test_goes_forward_after_the_old_releases_have_begun_to_stop(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True)
        steps = [project.task("release_cutover", step=step) for step in ("start", "switch")]
        code, output = project.run(
            LOCK + project.play(*steps, project.task("release_cutover", step="drain", fails=["app1"]))
        )
        assert code == 2, output
        assert recoveries(project) == [("yes", "app1 failed")]
        assert "(app1 failed): finishing it, and unlocking." in output

    def test_only_unlocks_when_nothing_was_begun(self, project: LocalProject) -> None:
        project.watch_recovery()
        project.hosts(["app1", "app2"])
        code, output = project.run(LOCK + project.play(project.task("note", fails=["app1"])))
        assert code == 2, output
        assert recoveries(project) == [("unlock", "app1 failed")]
        assert "(app1 failed): unlocking. Please wait." in output
        assert project.locked() == []
        assert "could not be brought back" not in output

    def test_keeps_the_locks_of_another_run(self, project: LocalProject) -> None:
        """It holds the first server; what it was about to take on the second is somebody else's."""
        project.watch_recovery()
        project.hosts(["app1", "app2"])
        project.lock_of_another("app2")
        code, output = project.run(LOCK)
        assert code == 2, output
        assert "app2 is being deployed to by ann@laptop" in output
        assert project.locked() == ["app2"]

    def test_says_so_when_the_fleet_could_not_be_recovered(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True, fails=["localhost"])
        code, output = project.run(LOCK + project.play(project.task("release_build", fails=["app1"])))
        assert code == 2, output
        assert "The fleet could not be brought back to one release." in output
        assert "ansible-playbook playbooks/recover.yml -i" in output

    def test_is_recovered_with_the_runs_own_options(self, project: LocalProject, tmp_path: Path) -> None:
        project.hosts(["app1", "app2"])
        project.write("more/hosts.yml", "more: {hosts: {elsewhere: {}}}")
        project.write("vars.yml", "one: from-a-file")
        project.write("password", "x")
        where = "{{ one }} {{ two }} {{ groups['all'] | sort | join('+') }} {{ ansible_limit }}"
        project.watch_recovery(instead=True, told=where)
        options = ["-i", "more/hosts.yml", "-e", "@vars.yml", "-e", '{"two": "a b"}', "--limit", "app1,localhost"]
        options += ["-u", "deploy", "--vault-password-file", str(tmp_path / "password"), "-e", "preflight_without=app2"]
        code, output = project.run(LOCK + project.play(project.task("release_build", fails=["app1"])), *options)
        assert code == 2, output
        (note,) = [note for note in project.notes() if "told" in note]
        assert note["told"] == "from-a-file a b app1+app2+elsewhere app1,localhost"
        assert project.locked() == ["app1"], "the stand-in does not unlock"
        holder = json.loads((project.locks / "app1-blog.lock").read_text())
        assert note["token"] == holder["token"], "with the lock that is to be taken over"


def long_task(project: LocalProject) -> str:
    """Return a task that lasts as long as it is let."""
    script = f"echo $$ >{project.directory}/reached.new; mv {project.directory}/reached.new {project.directory}/reached"
    return f"    - ansible.builtin.command: {json.dumps({'argv': ['sh', '-c', f'{script}; exec sleep 60']})}\n"


def reach(project: LocalProject, run: Run) -> int:
    """Wait until the long task runs; returns its process."""
    reached = project.directory / "reached"
    eventually(lambda: reached.exists() or run.process.poll() is not None, "the long task runs", 30)
    assert reached.exists(), run.output()
    return int(reached.read_text())


class TestAnInterruption:
    @pytest.mark.parametrize(
        ("interrupt", "name"),
        [
            (Run.press_ctrl_c, "SIGINT"),
            (lambda run: run.process.send_signal(signal.SIGTERM), "SIGTERM"),
            (Run.close_terminal, "SIGHUP"),
        ],
        ids=["ctrl-c", "kill", "closed-terminal"],
    )
    def test_recovers_once_and_unlocks(
        self, project: LocalProject, interrupt: Callable[[Run], None], name: str
    ) -> None:
        project.watch_recovery()
        begun = project.task("release_cutover", step="start")
        with project.start(LOCK + project.play(begun, long_task(project))) as run:
            pid = reach(project, run)
            assert project.locked() == ["app1"]
            interrupt(run)
            code = run.code()
        assert code != 0
        assert recoveries(project) == [("no", f"interrupted ({name})")], run.output()
        assert project.locked() == []
        eventually(lambda: not alive(pid), "the task has ended as well")

    def test_recovers_as_well_when_ansible_itself_never_ends(self, project: LocalProject) -> None:
        """A worker that dies while it hands over a result leaves a lock that Ansible waits for."""
        dying = (
            "from ansible.plugins.action import ActionBase\n"
            "from ansible.utils.display import Display\n"
            "class ActionModule(ActionBase):\n"
            "    def run(self, tmp=None, task_vars=None):\n"
            "        Display()._final_q._wlock.acquire()\n"
            f"        open({str(project.directory / 'reached')!r}, 'w').write('0')\n"
            "        __import__('time').sleep(60)\n"
        )
        project.write("action_plugins/dying.py", dying)
        project.replace("roles/release/callback_plugins/deploy_guard.py", "_END_SECONDS = 20", "_END_SECONDS = 1")
        project.watch_recovery()
        begun = project.task("release_cutover", step="start")
        with project.start(LOCK + project.play(begun, "    - dying:\n")) as run:
            eventually((project.directory / "reached").exists, "the worker holds the lock", 30)
            run.press_ctrl_c()
            assert run.code() == 99, run.output()
        assert recoveries(project) == [("no", "interrupted (SIGINT)")], run.output()
        assert project.locked() == []

    def test_is_none_when_the_terminal_goes_and_the_run_is_to_survive_it(self, project: LocalProject) -> None:
        project.watch_recovery(instead=True)
        go_on = project.directory / "go-on"
        waiting = project.task("release_build", until=str(go_on))
        with project.start(LOCK + project.play(waiting) + UNLOCK, nohup=True) as run:
            eventually(lambda: project.notes() or run.process.poll() is not None, "the task runs", 30)
            run.close_terminal()
            run.process.send_signal(signal.SIGHUP)
            go_on.touch()
            assert run.code() == 0, run.output()
        assert recoveries(project) == []

    def test_that_is_repeated_does_not_end_the_recovery(self, project: LocalProject) -> None:
        go_on = project.directory / "go-on"
        project.watch_recovery(until=str(go_on))
        begun = project.task("release_cutover", step="start")
        with project.start(LOCK + project.play(begun, long_task(project))) as run:
            reach(project, run)
            run.press_ctrl_c()
            eventually(lambda: recoveries(project), "the recovery has begun", 30)
            run.press_ctrl_c()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.killpg(run.process.pid, number)
            go_on.touch()
            code = run.code()
        assert code != 0
        assert len(recoveries(project)) == 1
        assert project.locked() == [], run.output()

    def test_while_it_waits_for_the_locks_of_another_run(self, project: LocalProject) -> None:
        """It holds one lock and waits for another: the one is given back, the other is not its own."""
        project.hosts(["app1", "app2"])
        project.lock_of_another("app2")
        project.watch_recovery()
        with project.start(LOCK, "-e", "preflight_lock_wait=60") as run:
            eventually(lambda: "app2: waiting 60 s for the deploy of ann@laptop" in run.output(), "it waits", 30)
            assert project.locked() == ["app1", "app2"]
            run.press_ctrl_c()
            code = run.code()
        assert code != 0
        assert recoveries(project) == [("unlock", "interrupted (SIGINT)")]
        assert project.locked() == ["app2"], run.output()
