"""Stands in for ansible-playbook in tests/test_git_push.py: does what file `behaviour` of the commit says.

Its first argument is a directory: it notes there what it was given, and waits for a file there where told to. It also
stands in for `ansible`, asked which commit the servers run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

notes = Path(sys.argv[1])
servers = notes / "servers"
servers.mkdir(exist_ok=True)
if sys.argv[2:3] == ["ask"]:
    # What ansible's option --tree leaves: a file for each server.
    for file in servers.iterdir():
        result = {"stdout": json.dumps({"commit": file.read_text()})}
        Path(sys.argv[-1], file.name).write_text(json.dumps(result))
    Path(sys.argv[-1], "gone").write_text(json.dumps({"unreachable": True}))
    sys.exit(4)
release = json.loads(sys.argv[sys.argv.index("-e") + 1])
sha = release["release_version"]
git = ["git", "-C", release["release_repository"]]


def note(**what: object) -> None:
    """Add a line to what the test reads."""
    with (notes / "deploys.jsonl").open("a") as file:
        file.write(json.dumps({"sha": sha, **what}) + "\n")


def switch(*names: str) -> None:
    """Have servers run the commit."""
    for name in names:
        (servers / name).write_text(sha)


def wait_for(name: str) -> None:
    """Wait for the test."""
    while not (notes / name).exists():
        time.sleep(0.02)


interrupts = 0


def interrupted(_number: int, _frame: FrameType | None) -> None:
    """Put everything back, which takes a while."""
    global interrupts
    interrupts += 1
    if interrupts > 1:
        note(event="interrupted twice")
        return
    print("putting the servers back", flush=True)
    if behaviour == "too late":
        return
    time.sleep(1)
    if behaviour == "finish":
        switch("app1", "app2")
    note(event="put back", stdin=sys.stdin.read())
    print("the servers are back", flush=True)
    sys.exit(99)


behaviour = subprocess.run([*git, "show", f"{sha}:behaviour"], capture_output=True, text=True, check=True).stdout
signal.signal(signal.SIGINT, interrupted)
hidden = [name for name in os.environ if name.startswith(("GIT_", "SSH_"))]
variables = {name: os.environ.get(name) for name in ("HARDSTAND_DEPLOY_WHO", "EXTRA", "HOME", "LANG")}
note(event="start", cwd=str(Path.cwd()), arguments=sys.argv[2:], hidden=hidden, variables=variables)
print(f"deploying {behaviour}", flush=True)
if behaviour in ("wait", "too late", "finish"):
    wait_for("go")
if behaviour == "verbose":
    for number in range(200_000):
        print(f"line {number} of a long deploy that nobody reads", flush=True)
note(event="end")
switch(*{"fail": [], "fail mixed": ["app1"]}.get(behaviour, ["app1", "app2"]))
if behaviour.startswith("fail"):
    print("fatal: app2: not healthy")
    sys.exit(2)
print("all hosts are on the new release")
