"""A change that a server takes back by itself, unless it has been proven in time that one can still get in.

What proves it, on the control node, is plugin_utils/second_connection.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SYSTEMCTL, SYSTEMD_RUN = "/usr/bin/systemctl", "/usr/bin/systemd-run"


class ChangeError(Exception):
    """A change cannot be made or kept; the message says why, and nothing is left half-done."""


def run(*command: str | Path, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command. Raises ChangeError with its own words."""
    words = [str(word) for word in command]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    except FileNotFoundError as error:
        raise ChangeError(f"{words[0]} is missing: install the Debian package it comes with.") from error
    if check and done.returncode != 0:
        raise ChangeError(f"{Path(words[0]).name}: {(done.stderr or done.stdout).strip()}")
    return done


class UndoTimer:
    """The way back from a change, and the timer that takes it.

    Args:
        name: of the timer, a unit of systemd.
        script: what goes back. It removes itself, and is there only while a change is neither kept nor undone.
        setting: the operator's name for the seconds until the timer goes off.
    """

    def __init__(self, name: str, script: Path, setting: str) -> None:
        self.name = name
        self.script = script
        self.setting = setting

    def arm(self, seconds: int) -> None:
        """Start the timer."""
        run(SYSTEMD_RUN, "--quiet", f"--unit={self.name}", f"--on-active={seconds}", "--timer-property=AccuracySec=1s",
            "/bin/sh", self.script)  # fmt: skip

    def disarm(self) -> None:
        """Stop the timer, whether there is one or not."""
        run(SYSTEMCTL, "stop", f"{self.name}.timer", check=False)
        run(SYSTEMCTL, "reset-failed", f"{self.name}.timer", f"{self.name}.service", check=False)

    def stop(self) -> None:
        """Stop the timer, to keep the change. Raises ChangeError when the server has taken it back already."""
        run(SYSTEMCTL, "stop", f"{self.name}.timer", check=False)
        if not self.script.exists():
            raise ChangeError(
                f"the proof took too long, and the server has taken everything back. Raise {self.setting}."
            )

    def undo(self) -> None:
        """Take the change back, now. Does nothing when it is done."""
        self.disarm()
        if self.script.is_file():
            run("/bin/sh", self.script)
