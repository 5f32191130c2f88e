"""The project's playbooks as an operator runs them, on servers that are this machine: nothing is installed, and locks,
records and releases are below a temporary directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml

PROJECT = Path(__file__).resolve().parents[1]
APP = "blog"

# Stands in for whatever a deploy does on a server: writes a line, waits for a file, fails.
ACTION = """
import json, time
from pathlib import Path
from ansible.plugins.action import ActionBase

class ActionModule(ActionBase):
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        with open(self._task.args["file"], "a") as file:
            file.write(json.dumps({"host": task_vars["inventory_hostname"], **self._task.args}) + "\\n")
        while "until" in self._task.args and not Path(self._task.args["until"]).exists():
            time.sleep(0.02)
        return {"failed": task_vars["inventory_hostname"] in self._task.args.get("fails", []), "msg": "as told"}
"""

# The first play of a deploy: it takes the locks.
LOCK = """
- hosts: app:lb
  gather_facts: false
  any_errors_fatal: true
  vars: {__preflight_settings: {sources: {app1: "hosts.yml:1", app2: "hosts.yml:2", app3: "x:3", lb1: "hosts.yml:4"}}}
  tasks:
    - ansible.builtin.import_role: {name: preflight, tasks_from: hosts, rolespec_validate: false}
"""
UNLOCK = """
- hosts: app:lb:&preflight_passed
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: preflight, tasks_from: unlock, rolespec_validate: false}
"""


class Run:
    """A run of ansible-playbook at a terminal of its own."""

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str], nohup: bool = False) -> None:
        self.terminal, end = os.openpty()
        self.log = cwd / "output"

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdin=end, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=take_terminal,
            )  # fmt: skip
        os.close(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.close_terminal()

    def press_ctrl_c(self) -> None:
        """The kernel sends SIGINT to what is in the foreground."""
        os.write(self.terminal, b"\x03")

    def close_terminal(self) -> None:
        """The kernel sends SIGHUP to what is in the foreground."""
        with suppress(OSError):
            os.close(self.terminal)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def code(self) -> int:
        """Return the exit code, when it has ended."""
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.output()}") from None


class LocalProject:
    """A copy of the project, with an inventory of servers on this machine."""

    def __init__(self, directory: Path, srv: Path | None = None) -> None:
        self.directory = directory
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("roles", "playbooks", "group_vars"):
            shutil.copytree(PROJECT / name, directory / name, symlinks=True, ignore=ignored)
        shutil.copy(PROJECT / "ansible.cfg", directory)
        self.locks = directory / "locks"
        self.locks.mkdir()
        self.notes_file = directory / "notes"

        # This machine need not be a server, nor we root, and each "server" has a lock of its own.
        system = platform.freedesktop_os_release()
        module = "roles/preflight/library/preflight_host.py"
        self.replace(module, '"/run/systemd/system"', '"/"')
        self.replace(module, "os.geteuid() != 0", "False")
        variables = "roles/preflight/vars/main.yml"
        self.replace(variables, "/run/lock/hardstand-", f"{self.locks}/{{{{ inventory_hostname }}}}-")
        this = f"{system['ID']}-{system.get('VERSION_ID', 'unknown')}"
        if this not in (directory / variables).read_text():
            self.replace(variables, "_preflight_platforms:\n", f"_preflight_platforms:\n  {this}: tested\n")
        self.replace("group_vars/all.yml", "/srv/", f"{srv or directory / 'srv' / '{{ inventory_hostname }}'}/")
        self.replace("ansible.cfg", "vault_password_file = bin/vault-password\n", "")

        for name in ("note", "release_build", "release_cutover"):
            self.write(f"action_plugins/{name}.py", ACTION)
        self.write("playbooks/action_plugins/note.py", ACTION)
        self.hosts()

    def replace(self, path: str, old: str, new: str) -> None:
        """Change a file of the copy."""
        text = (self.directory / path).read_text()
        assert old in text, f"{path} no longer has {old}"
        (self.directory / path).write_text(text.replace(old, new))

    def write(self, path: str, text: str) -> Path:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def hosts(self, app: Iterable[str] = ("app1",), lb: Iterable[str] = (), **changes: Mapping[str, Any]) -> None:
        """Write the inventory; `changes` are variables of single hosts."""
        variables = {
            "app_name": APP,
            "app_domains": ["blog.example"],
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "ansible_become": False,
            "preflight_min_free_mb": 0,
            "release_module": "service:app",
        }
        groups = {"app": app, **({"lb": lb} if lb else {})}
        inventory: dict[str, Any] = {
            group: {"hosts": {name: dict(changes.get(name, {})) for name in names}} for group, names in groups.items()
        }
        self.write("hosts.yml", yaml.safe_dump({"all": {"vars": variables}, **inventory}))

    def task(self, action: str = "note", **arguments: Any) -> str:
        """Return a task of a play: one that leaves a note."""
        return f"    - {action}: {json.dumps({'file': str(self.notes_file), **arguments})}\n"

    def watch_recovery(self, *, instead: bool = False, **arguments: Any) -> None:
        """Let playbooks/recover.yml leave a note of what it was told; `instead` of all that it does."""
        told = {name: f"{{{{ recover_{name} }}}}" for name in ("forward", "reason")}
        watch = self.play(self.task(**told, token="{{ preflight_takeover_token }}", **arguments), hosts="localhost")
        file = self.directory / "playbooks/recover.yml"
        file.write_text(watch + ("" if instead else file.read_text().removeprefix("---\n")))

    def play(self, *tasks: str, hosts: str = "app:&preflight_passed") -> str:
        """Return a play."""
        return f"- hosts: {hosts}\n  gather_facts: false\n  any_errors_fatal: true\n  tasks:\n" + "".join(tasks)

    def start(self, playbook: str, *arguments: str, nohup: bool = False) -> Run:
        """Start ansible-playbook with the text of a playbook, or the path of one of the project's."""
        if "\n" in playbook:
            self.write("play.yml", playbook)
            playbook = "play.yml"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "HARDSTAND_"))}
        env |= {"ANSIBLE_CONFIG": str(self.directory / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        command = [str(Path(sys.executable).with_name("ansible-playbook")), playbook, "-i", "hosts.yml", *arguments]
        return Run(command, self.directory, env, nohup)

    def run(self, playbook: str, *arguments: str) -> tuple[int, str]:
        """Run ansible-playbook; returns its exit code and what it says."""
        with self.start(playbook, *arguments) as run:
            return run.code(), run.output()

    def notes(self) -> list[dict[str, Any]]:
        """Return the notes that were left."""
        if not self.notes_file.exists():
            return []
        return [json.loads(line) for line in self.notes_file.read_text().splitlines()]

    def lock_of_another(self, host: str, token: str = "theirs") -> None:  # noqa: S107 - no password
        """Let a run from elsewhere hold a server's lock."""
        lock = {"token": token, "expires": 1e12, "owner": "ann@laptop", "pid": 1, "machine": "another"}
        (self.locks / f"{host}-{APP}.lock").write_text(json.dumps(lock))

    def locked(self) -> list[str]:
        """Return the servers that are locked."""
        return sorted(path.name.removesuffix(f"-{APP}.lock") for path in self.locks.iterdir())
