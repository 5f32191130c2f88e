#!/usr/bin/python3 -I
"""What an ssh key of a pusher may do on the control host: push to the one repository, and fetch from it.

The account's authorized_keys names this program, with the pusher's name, as the only command of each key. Settings are
in git_push.json, one directory above this file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

SETTINGS = Path(__file__).resolve().parents[1] / "git_push.json"
ALLOWED = ("receive-pack", "upload-pack")


def service_of(command: str, repository: Path) -> str | None:
    """Return the git service that a client asks for, or None for anything else.

    Args:
        command: what ssh was told to run: ``git-receive-pack 'shop.git'``.
        repository: the one repository. ``shop.git``, ``shop``, ``/~/shop.git`` and its whole path all name it.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if words[:1] == ["git"]:
        words = [f"git-{word}" for word in words[1:2]] + words[2:]
    if len(words) != 2 or words[0].removeprefix("git-") not in ALLOWED:
        return None
    asked = words[1].removeprefix("/~/").removeprefix("~/").removeprefix("./").rstrip("/")
    if asked != str(repository) and asked.lstrip("/").removesuffix(".git") != repository.name.removesuffix(".git"):
        return None
    return words[0].removeprefix("git-")


def main() -> NoReturn:
    """Become git, or say what this account is for."""
    repository = Path(json.loads(SETTINGS.read_text(encoding="utf-8"))["repository"])
    service = service_of(os.environ.get("SSH_ORIGINAL_COMMAND", ""), repository)
    if service is None:
        print(f"This account takes git pushes to {repository.name}, and nothing else:", file=sys.stderr)
        print(f"  git remote add deploy <this account>@<this host>:{repository.name}", file=sys.stderr)
        sys.exit(1)
    # Not from the client: nothing of what it asked for reaches git but the service.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["HARDSTAND_DEPLOY_WHO"] = sys.argv[1]
    # receive-pack outlives the connection while its hook runs, so the hook watches the connection itself.
    environment["HARDSTAND_CONNECTION"] = str(fcntl.fcntl(sys.stdout.fileno(), fcntl.F_DUPFD, 10))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and git would as well
    os.execvpe("git", ["git", service, str(repository)], environment)  # noqa: S606, S607 - git of this account's PATH


if __name__ == "__main__":
    main()
