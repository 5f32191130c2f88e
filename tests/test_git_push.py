"""Role git_push, with real git and real pushes and a script in place of the deploy; and the workflow that deploys."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret

from tests.release_support import eventually

PROJECT = Path(__file__).resolve().parents[1]
FILES = PROJECT / "roles/git_push/files"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Pipes:
    """Pushes through tests/git_push_ssh.py."""

    def __init__(self, control: Path) -> None:
        self.control = control

    def environment(self, who: str) -> dict[str, str]:
        program = f"{sys.executable} {PROJECT}/tests/git_push_ssh.py {self.control}/bin/serve.py {who}"
        return {"GIT_SSH_COMMAND": program, "GIT_SSH_VARIANT": "simple"}

    def stop(self) -> None:
        pass

    remote = "control:shop.git"


class Push:
    """A push that runs."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def shown(self) -> str:
        """What the pusher's terminal shows up to now."""
        return ANSI.sub("", self._output.read_text(errors="replace"))

    def sees(self, text: str, seconds: float = 20) -> None:
        eventually(lambda: text in self.shown, f"{text!r} in the pusher's terminal", seconds)

    def ends(self, code: int | None = None) -> str:
        """Wait for the end; without a code, of any push that was not accepted."""
        result = self.process.wait(timeout=60)
        assert result == code if code is not None else result != 0, self.shown
        return self.shown

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to git and to ssh."""
        os.killpg(self.process.pid, signal.SIGINT)

    def lose_connection(self) -> None:
        """No process on the pusher's side says good-bye."""
        os.killpg(self.process.pid, signal.SIGKILL)


class Control:
    """A control host, as the role makes it, and people who push to it."""

    def __init__(self, directory: Path, transport: type[Pipes]) -> None:
        self.home = directory / "home"
        self.control = directory / "control"
        self.notes = directory / "notes"
        self.project = directory / "project-1"
        for path in (self.home, self.control / "bin", self.notes, self.project, self.home / "logs"):
            path.mkdir(parents=True)
        (directory / "project").symlink_to("project-1")
        for file in ("pre_receive.py", "serve.py"):
            shutil.copy2(FILES / file, self.control / "bin" / file)
        self.repository, self.mirror = self.home / "shop.git", self.home / "mirror.git"
        for path in (self.repository, self.mirror):
            subprocess.run(["git", "init", "-q", "--bare", "-b", "main", path], check=True)
        subprocess.run(["git", "-C", self.repository, "config", "receive.keepAlive", "1"], check=True)
        hook = self.repository / "hooks/pre-receive"
        hook.unlink(missing_ok=True)
        hook.symlink_to(self.control / "bin/pre_receive.py")
        self.settings: dict[str, Any] = {
            "repository": str(self.repository),
            "mirror": str(self.mirror),
            "logs": str(self.home / "logs"),
            "lock": str(self.home / "deploy.lock"),
            "branch": "main",
            "allow_rewind": True,
            "wait": 60,
            "keep_logs": 50,
            "directory": str(directory / "project"),
            "command": [sys.executable, str(PROJECT / "tests/git_push_deploy.py"), str(self.notes)],
            "question": [sys.executable, str(PROJECT / "tests/git_push_deploy.py"), str(self.notes), "ask"],
            "environment": {"EXTRA": "extra"},
        }
        self.set()
        self.transport = transport(self.control)
        self.directory = directory
        self.pushes: list[Push] = []
        self.work = self.clone("work")

    def set(self, **settings: Any) -> None:
        self.settings |= settings
        (self.control / "git_push.json").write_text(json.dumps(self.settings))

    def clone(self, name: str) -> Path:
        path = self.directory / name
        subprocess.run(["git", "init", "-q", "-b", "main", path], check=True)
        for key, value in {"user.name": name, "user.email": "x@y", "commit.gpgsign": "false"}.items():
            subprocess.run(["git", "-C", path, "config", key, value], check=True)
        subprocess.run(["git", "-C", path, "remote", "add", "deploy", self.transport.remote], check=True)
        return path

    def commit(self, behaviour: str = "ok", work: Path | None = None) -> str:
        """Make a commit whose deploy does what `behaviour` says."""
        work = work or self.work
        (work / "behaviour").write_text(behaviour)
        (work / "other").write_text(os.urandom(3000).hex())
        self.git("add", ".", path=work)
        self.git("commit", "-qm", f"Now {behaviour}", path=work)
        return self.git("rev-parse", "HEAD", path=work)

    @staticmethod
    def git(*arguments: str, path: Path) -> str:
        result = subprocess.run(["git", "-C", path, *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    def client(self, who: str) -> dict[str, str]:
        return {**os.environ, **self.transport.environment(who)}

    def start(self, *arguments: str, who: str = "alice", work: Path | None = None) -> Push:
        output = self.directory / f"terminal{len(self.pushes)}"
        with output.open("w") as terminal:
            process = subprocess.Popen(
                ["git", "-C", work or self.work, "push", "deploy", *(arguments or ["main"])],
                env=self.client(who),
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pushes.append(Push(process, output))
        return self.pushes[-1]

    def push(self, *arguments: str, code: int | None = 0, who: str = "alice", work: Path | None = None) -> str:
        return self.start(*arguments, who=who, work=work).ends(code)

    def deploys(self, event: str = "start") -> list[dict[str, Any]]:
        file = self.notes / "deploys.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["event"] == event]

    def branch(self) -> str:
        """Return what the branch is, asked as a pusher would."""
        command = ["git", "ls-remote", self.transport.remote, "refs/heads/main"]
        answer = subprocess.run(command, env=self.client("bob"), capture_output=True, text=True, check=True)
        return answer.stdout.partition("\t")[0]

    def go(self) -> None:
        """Let a deploy that waits go on."""
        (self.notes / "go").touch()

    def free(self) -> bool:
        """Tell whether no process holds the deploy's lock any more."""
        lock = self.home / "deploy.lock"
        return subprocess.run(["flock", "--nonblock", lock, "true"], check=False).returncode == 0

    def log(self) -> str:
        return sorted((self.home / "logs").iterdir())[-1].read_text()

    def stop(self) -> None:
        self.go()
        for push in self.pushes:
            if push.process.poll() is None:
                push.lose_connection()
            push.process.wait()
        eventually(self.free, "the end of the last deploy")
        self.transport.stop()


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    host = Control(tmp_path, Pipes)
    yield host
    host.stop()


def test_a_push_deploys_and_shows_it(control: Control) -> None:
    sha = control.commit()
    shown = control.push()
    assert "remote: deploying ok" in shown
    assert re.search(rf"remote: ==> main is live: {sha[:12]} Now ok \(\d+ s\)", shown)
    assert control.branch() == sha
    (deploy,) = control.deploys()
    assert deploy["hidden"] == []
    assert deploy["cwd"] == str(control.project)
    assert deploy["variables"]["HARDSTAND_DEPLOY_WHO"] == "alice"
    assert deploy["variables"]["EXTRA"] == "extra"
    assert f"{sha} Now ok\npushed by alice" in control.log()
    assert "all hosts are on the new release" in control.log()

    # What is there already is git's own matter.
    assert "Everything up-to-date" in control.push()
    assert len(control.deploys()) == 1


def test_output_arrives_while_the_deploy_runs(control: Control) -> None:
    control.commit("wait")
    push = control.start()
    push.sees("remote: deploying wait")
    assert push.process.poll() is None
    control.go()
    push.ends(0)


def test_a_failed_deploy_refuses_the_push(control: Control) -> None:
    good = control.commit()
    control.push()
    bad = control.commit("fail")
    shown = control.push(code=None)
    assert "remote: fatal: app2: not healthy" in shown
    assert f"==> Refused: the deploy of {bad[:12]} failed (exit code 2)" in shown
    assert f"main stays at {good[:12]}" in shown
    log = re.search(rf"Log: {socket.gethostname()}:(\S+)", shown)
    assert log
    assert "not healthy" in Path(log[1]).read_text()
    assert control.branch() == good

    # Mended on top of the refused commit, it goes live.
    mended = control.commit()
    control.push()
    assert control.branch() == mended
    assert [deploy["sha"] for deploy in control.deploys()] == [good, bad, mended]


def test_a_failed_first_push_leaves_no_branch(control: Control) -> None:
    control.commit("fail")
    assert "main is not made" in control.push(code=None)
    assert control.branch() == ""


def test_only_the_branch_is_taken(control: Control) -> None:
    good = control.commit()
    control.push()
    control.git("tag", "v1", path=control.work)
    control.commit()
    assert "only main is deployed from here, not feature" in control.push("main:feature", code=None)
    assert "not refs/tags/v1" in control.push("main", "v1", code=None)
    assert "main cannot be deleted: it is what runs" in control.push(":main", code=None)
    assert control.branch() == good
    assert len(control.deploys()) == 1


def test_a_forced_push_goes_back_unless_that_is_forbidden(control: Control) -> None:
    first = control.commit()
    control.push()
    second = control.commit()
    control.push()
    control.set(allow_rewind=False)
    shown = control.push("--force", f"{first}:main", code=None)
    assert f"{first[:12]} does not contain {second[:12]}" in shown
    assert "git_push_allow_rewind" in shown
    control.set(allow_rewind=True)
    control.push("--force", f"{first}:main")
    assert control.branch() == first
    assert [deploy["sha"] for deploy in control.deploys()] == [first, second, first]


def test_a_second_push_waits_and_finds_the_branch_moved(control: Control) -> None:
    control.commit()
    control.push()
    bobs = control.clone("bobs")
    subprocess.run(["git", "pull", "-q", "deploy", "main"], cwd=bobs, env=control.client("bob"), check=True)
    control.commit("wait")
    first = control.start()
    first.sees("deploying wait")
    control.commit(work=bobs)
    second = control.start(who="bob", work=bobs)
    second.sees("==> alice has been deploying")
    assert len(control.deploys()) == 2
    control.go()
    first.ends(0)
    assert "main has moved meanwhile" in second.ends()
    assert len(control.deploys()) == 2
    subprocess.run(
        ["git", "pull", "-q", "--rebase", "-X", "theirs", "deploy", "main"],
        cwd=bobs,
        env=control.client("bob"),
        check=True,
    )
    control.push(who="bob", work=bobs)
    assert control.branch() == control.git("rev-parse", "HEAD", path=bobs)


def test_a_second_push_deploys_when_the_first_has_failed(control: Control) -> None:
    good = control.commit()
    control.push()
    control.commit("wait")
    first = control.start()
    first.sees("deploying wait")
    control.git("reset", "-q", "--hard", good, path=control.work)
    other = control.commit()
    second = control.start(who="bob")
    second.sees("==> alice has been deploying")
    first.interrupt()
    second.ends(0)
    assert control.branch() == other


def test_a_second_push_waits_no_longer_than_told(control: Control) -> None:
    control.commit("wait")
    control.set(wait=0)
    first = control.start()
    first.sees("deploying wait")
    control.commit()
    shown = control.push(who="bob", code=None)
    assert re.search(r"Refused: alice has been deploying \w{12} since [\d:]+ UTC", shown)
    assert len(control.deploys()) == 1


def test_who_waits_may_go_away(control: Control) -> None:
    sha = control.commit("wait")
    first = control.start()
    first.sees("deploying wait")
    control.commit()
    second = control.start(who="bob")
    second.sees("Waiting for it")
    second.interrupt()
    second.ends()
    control.go()
    first.ends(0)
    eventually(control.free, "the lock")
    assert control.branch() == sha
    assert len(control.deploys()) == 1


@pytest.mark.parametrize("how", ["interrupt", "lose_connection"])
def test_a_deploy_whose_pusher_is_gone_is_put_back(control: Control, how: str) -> None:
    good = control.commit()
    control.push()
    control.commit("wait")
    push = control.start()
    push.sees("deploying wait")
    getattr(push, how)()
    push.ends()
    eventually(lambda: control.deploys("put back"), "the interruption")
    eventually(control.free, "the lock")
    assert control.deploys("interrupted twice") == []
    assert control.branch() == good
    assert "the servers are back" in control.log()
    assert "was interrupted (the pusher is gone) after" in control.log()

    mended = control.commit()
    control.push()
    assert control.branch() == mended


def test_a_deploy_that_succeeds_although_its_pusher_is_gone_moves_the_branch(control: Control) -> None:
    control.commit()
    control.push()
    sha = control.commit("too late")
    push = control.start()
    push.sees("deploying too late")
    push.lose_connection()
    eventually(lambda: "putting the servers back" in control.log(), "the interruption")
    control.go()
    eventually(control.free, "the lock")
    assert control.branch() == sha
    assert "too late" in control.git("show", f"{sha}:behaviour", path=control.repository)
    after = control.commit()
    control.push()
    assert control.branch() == after


@pytest.mark.parametrize("how", ["fail finished", "finish"])
def test_a_deploy_that_is_finished_although_it_did_not_end_well_moves_the_branch(control: Control, how: str) -> None:
    """Once the whole fleet has switched, the playbooks finish what was interrupted, and say that it was."""
    control.commit()
    control.push()
    sha = control.commit(how)
    push = control.start()
    push.sees(f"deploying {how}")
    if how == "finish":
        push.lose_connection()
    else:
        shown = push.ends(0)
        assert re.search(rf"main is live: {sha[:12]} .* Its deploy did not end well, though \(exit code 2\)", shown)
    eventually(lambda: (control.home / "deploy.lock").exists() and control.free(), "the lock")
    assert control.branch() == sha


def test_servers_on_different_commits_are_named(control: Control) -> None:
    good = control.commit()
    control.push()
    bad = control.commit("fail mixed")
    shown = control.push(code=None)
    assert "The servers run different commits: " + ", ".join(sorted([good[:12], bad[:12]])) in shown
    assert control.branch() == good


def test_a_branch_that_was_left_behind_follows_at_the_next_push(control: Control) -> None:
    """A power cut between the end of a deploy and the update of the branch."""
    first = control.commit()
    control.push()
    second = control.commit()
    control.push()
    eventually(control.free, "the lock")
    control.git("update-ref", "refs/heads/main", first, path=control.repository)
    control.git("update-ref", "refs/hardstand/pending", second, path=control.mirror)
    control.commit()
    assert "main has moved meanwhile" in control.push(code=None)
    assert control.branch() == second
    control.push()


def test_a_killed_hook_leaves_no_deploy_behind(control: Control) -> None:
    control.commit("wait")
    push = control.start()
    push.sees("deploying wait")
    hooks = subprocess.run(
        ["pgrep", "-f", f"{control.control}/bin/pre_receive|hooks/pre-receive"],
        capture_output=True,
        text=True,
        check=False,
    )
    mine = [
        int(pid) for pid in hooks.stdout.split() if str(control.repository) == str(Path(f"/proc/{pid}/cwd").readlink())
    ]
    os.kill(mine[0], signal.SIGKILL)
    push.ends()
    eventually(lambda: control.deploys("put back"), "the interruption")
    eventually(control.free, "the lock")


def test_a_pusher_who_does_not_read_holds_nothing_up(control: Control) -> None:
    sha = control.commit("verbose")
    push = control.start()
    push.sees("remote: line 1 of")
    os.killpg(push.process.pid, signal.SIGSTOP)
    eventually(lambda: control.deploys("end"), "the end of the deploy")
    os.killpg(push.process.pid, signal.SIGCONT)
    push.process.wait(timeout=60)
    eventually(control.free, "the lock")
    assert control.branch() == sha


def test_old_logs_go(control: Control) -> None:
    control.set(keep_logs=2)
    for _ in range(3):
        control.commit()
        control.push()
    assert len(list((control.home / "logs").iterdir())) == 2


def test_a_mirror_that_lacks_objects_gets_them(control: Control) -> None:
    control.commit()
    control.push()
    eventually(control.free, "the lock")
    shutil.rmtree(control.mirror / "objects")
    (control.mirror / "objects").mkdir()
    sha = control.commit()
    control.push()
    assert control.branch() == sha
    assert len(control.git("rev-list", "--objects", sha, path=control.mirror).splitlines()) == 7


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash",
        "git-receive-pack",
        "git-receive-pack '/etc'",
        "git-receive-pack 'other.git'",
        "git-receive-pack '../shop.git'",
        "git-receive-pack 'shop.git'; id",
        "git-upload-archive 'shop.git'",
        "rm 'shop.git'",
        "'",
    ],
)
def test_a_key_does_nothing_else(control: Control, command: str) -> None:
    result = subprocess.run(
        [control.control / "bin/serve.py", "alice"],
        env={"PATH": os.environ["PATH"], "SSH_ORIGINAL_COMMAND": command},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "This account takes git pushes to shop.git, and nothing else" in result.stderr


@pytest.mark.parametrize("path", ["shop.git", "shop", "/~/shop.git", "~/shop.git", "/shop.git", "shop.git/"])
def test_the_repository_has_these_names(control: Control, path: str) -> None:
    result = subprocess.run(
        [control.control / "bin/serve.py", "alice"],
        env={"PATH": os.environ["PATH"], "SSH_ORIGINAL_COMMAND": f"git-upload-pack '{path}'"},
        input="0000",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


class Workflow:
    """The shell steps of .github/workflows/deploy.yml, run as a runner does; ansible-playbook only looks."""

    def __init__(self, directory: Path) -> None:
        self.document = yaml.safe_load((PROJECT / ".github/workflows/deploy.yml").read_text())
        (self.job,) = self.document["jobs"].values()
        self.directory = directory
        for path in ("bin", "temp", "home", "inventories/prod"):
            (directory / path).mkdir(parents=True)
        (directory / "inventories/prod/hosts.yml").touch()
        shutil.copy2(PROJECT / "tests/git_push_playbook.sh", directory / "bin/ansible-playbook")
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-C", "robot", "-f", directory / "key"], check=True)
        self.values = {
            "vars.HARDSTAND_ENVIRONMENT": "prod",
            "vars.HARDSTAND_KNOWN_HOSTS": "192.0.2.1 ssh-ed25519 AAAA",
            "vars.HARDSTAND_DEPLOY_ARGUMENTS || '--tags release'": "--tags release",
            "secrets.HARDSTAND_SSH_KEY": (directory / "key").read_text().strip(),
            "secrets.HARDSTAND_VAULT_PASSWORD": "open $sesame",
            "github.actor": "octocat",
            "runner.temp": str(directory / "temp"),
        }

    def command(self, step: dict[str, Any]) -> dict[str, Any]:
        """Return how a runner starts a step: with bash -e, and the values of its expressions in the environment."""

        def value(text: str) -> str:
            return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: self.values[found[1]], text)

        assert "${{" not in step["run"], "an expression in a script is not quoted for the shell"
        script = self.directory / "temp/step.sh"
        script.write_text(step["run"])
        environment = {name: value(text) for name, text in (step.get("env") or {}).items()}
        basic = {"PATH": f"{self.directory}/bin:{os.environ['PATH']}", "HOME": str(self.directory / "home")}
        runner = {"RUNNER_TEMP": str(self.directory / "temp"), "GITHUB_SHA": "0123456789abcdef0123456789abcdef01234567"}
        return {
            "args": ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", script],
            "env": {**basic, **runner, **environment},
            "cwd": self.directory,
        }

    def run(self, name: str, code: int = 0, **variables: str) -> str:
        (step,) = (step for step in self.job["steps"] if step.get("name") == name)
        command = self.command(step)
        command["env"] |= variables
        result = subprocess.run(**command, capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stdout + result.stderr
        return str(result.stdout + result.stderr)

    def prepare(self) -> None:
        self.run("Check what the repository provides")
        self.run("Write the vault password and the servers' host keys")


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    return Workflow(tmp_path)


def test_the_workflow_does_nothing_unless_asked_to_and_cancels_no_deploy(workflow: Workflow) -> None:
    assert workflow.document["on"]["push"] == {"branches": ["main"]}
    assert workflow.job["if"] == "vars.HARDSTAND_ENVIRONMENT != ''"
    assert workflow.document["concurrency"]["cancel-in-progress"] is False
    assert workflow.document["permissions"] == {"contents": "read"}


def test_the_workflow_deploys_the_pushed_commit(workflow: Workflow) -> None:
    workflow.prepare()
    known_hosts = workflow.directory / "home/.ssh/known_hosts"
    assert known_hosts.read_text() == "192.0.2.1 ssh-ed25519 AAAA\n"
    shown = workflow.run("Deploy").splitlines()
    arguments = [line.removeprefix("argument ") for line in shown if line.startswith("argument")]
    commit = "release_version=0123456789abcdef0123456789abcdef01234567"
    assert arguments == ["deploy.yml", "-i", "inventories/prod", "-e", commit, "--tags", "release"]
    assert [line for line in shown if line.startswith("key")] == [line for line in shown if "robot (ED25519)" in line]
    assert "who octocat" in shown
    assert "password 600 open $sesame" in shown
    assert "the key is in the environment" not in shown
    workflow.run("Deploy", code=2, CODE="2")
    workflow.run("Remove the vault password")
    assert not (workflow.directory / "temp/vault-password").exists()


def test_a_signal_to_the_workflows_step_reaches_ansible(workflow: Workflow) -> None:
    workflow.prepare()
    (step,) = (step for step in workflow.job["steps"] if step.get("name") == "Deploy")
    command = workflow.command(step)
    started = workflow.directory / "started"
    command["env"]["WAIT"] = str(started)
    with subprocess.Popen(**command, stdout=subprocess.PIPE, text=True) as process:
        eventually(started.exists, "ansible-playbook")
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert process.returncode == 99
    assert f"pid {process.pid}" in shown
    assert "interrupted" in shown


@pytest.mark.parametrize("missing", ["secrets.HARDSTAND_SSH_KEY", "secrets.HARDSTAND_VAULT_PASSWORD"])
def test_the_workflow_names_what_is_missing(workflow: Workflow, missing: str) -> None:
    workflow.values[missing] = ""
    shown = workflow.run("Check what the repository provides", code=1)
    assert f"::error::The secret {missing.removeprefix('secrets.')} is not set for prod." in shown


class TestWhatIsShipped:
    """The action plugin git_push_project."""

    plugin: Any = SimpleNamespace(**runpy.run_path(str(PROJECT / "roles/git_push/action_plugins/git_push_project.py")))

    @staticmethod
    def secret(password: str) -> tuple[str, VaultSecret]:
        return "default", VaultSecret(password.encode())

    def test_tracked_files_as_they_are_now(self, tmp_path: Path) -> None:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        for name in ("deploy.yml", "gone.yml", "roles/a/tasks/main.yml", "inventories/other/hosts.yml", "tests/t.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        (tmp_path / "group_vars").symlink_to("roles")
        subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
        (tmp_path / "gone.yml").unlink()
        (tmp_path / "untracked").touch()
        assert list(map(str, self.plugin.tracked(tmp_path))) == ["deploy.yml", "group_vars", "roles/a/tasks/main.yml"]

    def test_no_checkout_no_project(self, tmp_path: Path) -> None:
        with pytest.raises(AnsibleActionFail, match="is no git checkout"):
            self.plugin.tracked(tmp_path)

    def test_the_environment_without_private_keys(self, tmp_path: Path) -> None:
        for name in (
            "prod/hosts.yml",
            "prod/pki/ca.crt",
            "prod/pki/ca.key",
            "prod/group_vars/all/vault.yml",
            "more.yml",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("-----BEGIN EC PRIVATE KEY-----" if name.endswith("key") else "x")
        files, names = self.plugin.environment_of([str(tmp_path / "prod")])
        assert names == ["inventories/prod"]
        assert set(files) == {
            f"inventories/prod/{file}" for file in ("hosts.yml", "pki/ca.crt", "group_vars/all/vault.yml")
        }
        assert self.plugin.environment_of([str(tmp_path / "prod/hosts.yml")])[1] == ["inventories/prod/hosts.yml"]
        with pytest.raises(AnsibleActionFail, match="is no file or directory"):
            self.plugin.environment_of(["localhost,"])

    def test_two_directories_of_one_name(self, tmp_path: Path) -> None:
        for place in ("one", "other"):
            (tmp_path / place / "prod").mkdir(parents=True)
            (tmp_path / place / "prod/hosts.yml").write_text(place)
        sources = [str(tmp_path / "one/prod"), str(tmp_path / "other/prod"), str(tmp_path / "one/prod/hosts.yml")]
        files, names = self.plugin.environment_of(sources)
        assert names == ["inventories/prod", "inventories/prod-2", "inventories/prod/hosts.yml"]
        assert files["inventories/prod-2/hosts.yml"].read_text() == "other"

    def test_the_password_that_opens_everything(self) -> None:
        right = VaultLib([self.secret("right")])
        whole = right.encrypt("a: 1").decode()
        inline = "key: !vault |\n" + "".join(f"    {line}\n" for line in right.encrypt("b").decode().splitlines())
        both = [self.secret("wrong"), self.secret("right")]
        assert self.plugin.password_for([whole, f"{inline}other: 1\n"], both) == "right"
        assert self.plugin.password_for(["plain: 1"], both) == "wrong"
        other = VaultLib([self.secret("wrong")]).encrypt("a: 1").decode()
        with pytest.raises(AnsibleActionFail, match="No single password"):
            self.plugin.password_for([whole, other], both)
