"""Somebody who pushes to a control host."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from tests.harness import APP, Program, Repository, wait_for
from tests.ssh_login import ssh_options


class Push(Program):
    """A push under way."""

    def shows(self, text: str) -> None:
        """Wait until the pusher sees a text."""

        def seen() -> bool:
            assert text in self.output or self.process.poll() is None, self.output
            return text in self.output

        wait_for(seen, 240, f"{text!r} in the pusher's terminal", every=0.05)

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        code = self.process.wait(300)
        self._reader.join(10)
        return code


class Pusher:
    """Somebody with a key of their own, and a clone to commit to.

    The control host takes pushes at `address` and `port`; its own key is in the file `known_hosts`.
    """

    def __init__(
        self, name: str, repository: Repository, directory: Path, address: str, port: int, known_hosts: Path
    ) -> None:
        self.name, self.repository = name, repository
        self.address, self.port = address, port
        key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)], check=True)
        self.key = key.with_suffix(".pub").read_text().strip()
        self.ssh = ["ssh", *ssh_options(key, known_hosts)]
        self.url = f"ssh://deploy@{address}:{port}/{APP}.git"

    @property
    def settings(self) -> dict[str, object]:
        """What lets this person push, and nobody else."""
        return {"git_push_keys": [{"name": self.name, "key": self.key}]}

    def push(self, refspec: str = "HEAD:main", *options: str) -> Push:
        """Start a push."""
        command = ["git", "push", *options, self.url, refspec]
        return Push(command, self.repository.path, GIT_SSH_COMMAND=shlex.join(self.ssh))

    def branch(self) -> str:
        """Return the commit that the remote branch is; empty when there is none."""
        listed = subprocess.run(
            ["git", "ls-remote", self.url, "refs/heads/main"],
            env={**os.environ, "GIT_SSH_COMMAND": shlex.join(self.ssh)},
            check=True,
            capture_output=True,
            text=True,
        )
        return listed.stdout.partition("\t")[0]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Try to run a command on the control host instead of pushing."""
        login = [*self.ssh, "-p", str(self.port), f"deploy@{self.address}"]
        return subprocess.run([*login, command], check=False, capture_output=True, text=True, timeout=30)
