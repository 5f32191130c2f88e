#!/usr/bin/python3 -I
"""git's pre-receive hook on the control host: deploy what was pushed, and accept it only when it has gone live.

Settings are in git_push.json, one directory above this file. What happens, in this order:

1. Only an update of the one branch is looked at; anything else is refused.
2. One deploy at a time: an exclusive flock. Who waits is told for whom.
3. The pushed objects are copied to a second repository, the mirror. Until this hook has said yes they are in
   quarantine, where nothing but this hook's git sees them; what Ansible deploys must be seen by any git.
4. ansible-playbook runs in a session of its own and writes to the deploy's log, which is shown to the pusher as it
   grows. So neither a pusher who stops reading nor one who is gone ever holds up or breaks a deploy.
5. When the pusher goes away (Ctrl-C, a lost connection), ansible-playbook is interrupted: once, with SIGINT. It puts
   the servers back before it ends, and gets all the time it needs. receive-pack does not help to notice: it waits for
   its hook and keeps its pipe open. So serve.py has left a descriptor of the connection itself.
6. After a deploy that succeeded the branch has to follow, whatever becomes of receive-pack: the mirror's ref `PENDING`
   says so, and a process that outlives this hook sees to it, with the lock in its hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import getpass
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SETTINGS = Path(__file__).resolve().parents[1] / "git_push.json"
# In the mirror: what is being deployed; and what is live while the branch has yet to follow.
DEPLOYING = "refs/hardstand/deploying"
PENDING = "refs/hardstand/pending"
# Seconds between two looks at the log, the lock, the branch.
INTERVAL = 0.2
# Seconds that a pusher who has stopped reading gets for the last lines, when all is done.
PATIENCE = 10.0
# Bytes that are kept for a pusher who reads slower than the deploy writes. The log has it all.
BACKLOG = 4_000_000
PR_SET_PDEATHSIG = 1


class RefusedError(Exception):
    """The push is refused; the message says why, and what to do."""


class GoneError(Exception):
    """The pusher has gone away before anything was deployed."""


class Interruption:
    """Remembers a signal that asks this hook to end."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


class Pusher:
    """The pusher's terminal, as far as this hook sees it. Writing never blocks.

    Args:
        fd: a pipe, of which receive-pack shows the pusher what comes.
        connection: descriptor that the pusher is connected with; it is only watched.
    """

    def __init__(self, fd: int, connection: int) -> None:
        self._fd = fd
        self.connection = connection
        self._waiting = bytearray()
        self.gone = False
        os.set_blocking(fd, False)

    def say(self, text: str) -> None:
        """Show a line."""
        self.write(f"{text}\n".encode())

    def write(self, data: bytes) -> None:
        """Show output as it is."""
        if len(self._waiting) < BACKLOG:
            self._waiting += data
        self._send()

    def _send(self) -> None:
        while self._waiting and not self.gone:
            try:
                del self._waiting[: os.write(self._fd, self._waiting)]
            except BlockingIOError:
                return
            except OSError:
                self.gone = True

    def watch(self, seconds: float) -> None:
        """Wait, and notice meanwhile when the pusher takes more output or goes away."""
        if self.gone:
            time.sleep(seconds)
            return
        poll = select.poll()
        poll.register(self.connection, 0)
        poll.register(self._fd, select.POLLOUT if self._waiting else 0)
        for _, event in poll.poll(seconds * 1000):
            # The other end is closed.
            if event & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                self.gone = True
        self._send()

    def flush(self) -> None:
        """Wait until everything is shown, or the pusher is gone or does not read."""
        deadline = time.monotonic() + PATIENCE
        while self._waiting and not self.gone and time.monotonic() < deadline:
            self.watch(INTERVAL)


def now() -> datetime.datetime:
    """Return the time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def in_hook() -> dict[str, str]:
    """Return git's environment inside the hook: it sees the repository, and what is in quarantine."""
    return dict(os.environ)


def outside() -> dict[str, str]:
    """Return an environment in which git is not in a hook, where it would see the quarantine and update no ref."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def git(*arguments: str, env: dict[str, str], path: Path | None = None, stdin: bytes = b"", check: bool = True) -> str:
    """Run git and return what it printed; an empty string when it failed and `check` is false.

    Raises:
        RefusedError: git failed, with what it said.
    """
    where = ["-C", str(path)] if path else []
    result = subprocess.run(["git", *where, *arguments], env=env, input=stdin, capture_output=True, check=False)  # noqa: S603, S607
    if result.returncode:
        if not check:
            return ""
        said = result.stderr.decode(errors="replace").strip()
        raise RefusedError(f"git {arguments[0]} failed on the control host: {said}")
    return result.stdout.decode(errors="replace").strip()


class Hook:
    """One push."""

    def __init__(self, settings: dict[str, Any], pusher: Pusher, interruption: Interruption) -> None:
        self.settings = settings
        self.pusher = pusher
        self.interruption = interruption
        self.repository = Path(settings["repository"])
        self.mirror = Path(settings["mirror"])
        self.logs = Path(settings["logs"])
        self.branch: str = settings["branch"]
        self.ref = f"refs/heads/{self.branch}"
        self.who = os.environ.get("HARDSTAND_DEPLOY_WHO") or os.environ.get("SUDO_USER") or getpass.getuser()
        # Resolved now: the project may be replaced meanwhile, and this deploy stays with the one it began with.
        self.directory = Path(settings["directory"]).resolve()
        self.environment = {
            "HOME": os.environ.get("HOME", "/"),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",  # Ansible insists on UTF-8, and sshd may have set nothing
            "PYTHONUNBUFFERED": "1",
            **{name: str(value) for name, value in settings["environment"].items()},
            "HARDSTAND_DEPLOY_WHO": self.who,
        }
        # git's own process. Held by a descriptor, because a number may come to name another process.
        self.receive_pack = os.pidfd_open(os.getppid())
        self.lock = -1

    def run(self, updates: str) -> None:
        """Deploy what was pushed.

        Args:
            updates: what git tells the hook: lines of old value, new value and name of a ref.

        Raises:
            RefusedError: it is not live, and the branch stays as it is.
            GoneError: nobody waits for an answer, and nothing was deployed.
        """
        self.pusher.watch(0)
        if self.pusher.gone:  # then the descriptor above may be that of some other process
            raise GoneError
        old, new = self.only_update(updates)
        self.take_lock(new)
        self.settle()
        if self.current() != old:
            raise RefusedError(
                f"{self.branch} has moved meanwhile: it is {self.current()[:12]} now. Fetch, and push again."
            )
        self.copy_objects(new)
        if self.pusher.gone or self.interruption.name:
            raise GoneError
        self.deploy(old, new)
        git("update-ref", PENDING, new, env=outside(), path=self.mirror)
        git("update-ref", self.ref, new, env=outside(), path=self.mirror)
        git("update-ref", "-d", DEPLOYING, env=outside(), path=self.mirror)
        self.outlive()

    def only_update(self, updates: str) -> tuple[str, str]:
        """Return the branch's old value, empty when there is none yet, and its new value.

        Raises:
            RefusedError: the push is anything else than one update of the one branch.
        """
        lines = [line.split(" ", 2) for line in updates.splitlines()]
        others = [ref for _, _, ref in lines if ref != self.ref]
        if others:
            names = ", ".join(ref.removeprefix("refs/heads/") for ref in others[:5])
            raise RefusedError(
                f"only {self.branch} is deployed from here, not {names}. "
                f"Push that branch alone, without tags: git push <remote> <your branch>:{self.branch}"
            )
        ((old, new, _),) = lines
        old = old if old.strip("0") else ""
        if not new.strip("0"):
            raise RefusedError(f"{self.branch} cannot be deleted: it is what runs.")
        if git("cat-file", "-t", new, env=in_hook()) != "commit":
            raise RefusedError(f"{self.branch} must be a commit, and {new[:12]} is none.")
        if old and not self.settings["allow_rewind"]:
            base = git("merge-base", old, new, env=in_hook(), check=False)
            if base != old:
                raise RefusedError(
                    f"{new[:12]} does not contain {old[:12]}, which {self.branch} is. Merge it and push again "
                    "(or allow such pushes: git_push_allow_rewind)."
                )
        return old, new

    def take_lock(self, new: str) -> None:
        """Become the one deploy, or wait for it.

        Raises:
            RefusedError: another one runs for longer than this one is to wait.
            GoneError: the pusher does not wait any more.
        """
        self.lock = os.open(self.settings["lock"], os.O_RDWR | os.O_CREAT, 0o600)
        wait = float(self.settings["wait"])
        deadline = time.monotonic() + wait
        announced = ""
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if self.pusher.gone or self.interruption.name:
                raise GoneError
            holder = self.holder()
            if time.monotonic() >= deadline:
                raise RefusedError(f"{holder}. Push again when that has ended.")
            if holder != announced:
                announced = holder
                self.pusher.say(f"==> {holder}. Waiting for it, for {wait:.0f} s at most.")
            self.pusher.watch(INTERVAL)
        note = {"who": self.who, "since": now().strftime("%H:%M:%S UTC"), "commit": new}
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, json.dumps(note).encode(), 0)
        # Held until the last process of this deploy has ended, should something kill this hook.
        os.set_inheritable(self.lock, True)

    def holder(self) -> str:
        """Return who holds the lock, as a sentence."""
        try:
            note = json.loads(os.pread(self.lock, 10_000, 0))
            return f"{note['who']} has been deploying {note['commit'][:12]} since {note['since']}"
        except (ValueError, KeyError):
            return "Another push is being deployed"

    def current(self) -> str:
        """Return what the branch is; an empty string while there is none."""
        return git("rev-parse", "--verify", "--quiet", self.ref, env=outside(), path=self.repository, check=False)

    def settle(self) -> None:
        """Make the branch what runs, where the end of an earlier push was cut off after its deploy."""
        live = git("rev-parse", "--verify", "--quiet", PENDING, env=outside(), path=self.mirror, check=False)
        if not live:
            return
        was = self.current()
        if was != live:
            fetch = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(self.mirror), PENDING)
            git(*fetch, env=outside(), path=self.repository)
            reason = f"{self.who}: live, although the push was cut off"
            git("update-ref", "-m", reason, self.ref, live, was or "0" * 40, env=outside(), path=self.repository)
        git("update-ref", "-d", PENDING, live, env=outside(), path=self.mirror)

    def copy_objects(self, new: str) -> None:
        """Bring the pushed commit to the mirror."""
        known = []
        for sha in git("for-each-ref", "--format=%(objectname)", env=outside(), path=self.mirror).split():
            if git("cat-file", "-t", sha, env=in_hook(), check=False) == "commit":
                known.append(sha)
        for have in (known, []):
            wanted = "\n".join([new, *(f"^{sha}" for sha in have)]) + "\n"
            self.pipe_pack(wanted)
            # Looks at every object that the commit needs and the refs do not have. A mirror that lacks some gets all.
            check = ("rev-list", "--objects", "--quiet", new, *(f"^{sha}" for sha in have))
            command = ["git", "-C", str(self.mirror), *check]
            if subprocess.run(command, env=outside(), capture_output=True, check=False).returncode == 0:  # noqa: S603
                break
        git("update-ref", DEPLOYING, new, env=outside(), path=self.mirror)

    def pipe_pack(self, wanted: str) -> None:
        """Copy objects, from what the hook sees to the mirror.

        Raises:
            RefusedError: one of the two gits failed.
        """
        pack = ["git", "pack-objects", "--revs", "--thin", "--stdout", "--quiet", "--delta-base-offset"]
        unpack = ["git", "-C", str(self.mirror), "index-pack", "--stdin", "--fix-thin"]
        with subprocess.Popen(pack, env=in_hook(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:  # noqa: S603
            assert sender.stdin  # noqa: S101
            sender.stdin.write(wanted.encode())
            sender.stdin.close()
            receiver = subprocess.run(unpack, env=outside(), stdin=sender.stdout, capture_output=True, check=False)  # noqa: S603
        if sender.returncode or receiver.returncode:
            said = receiver.stderr.decode(errors="replace").strip()
            raise RefusedError(f"the commit could not be copied for the deploy: {said or 'git pack-objects failed'}")

    def deploy(self, old: str, new: str) -> None:
        """Run the deploy, and show it.

        Raises:
            RefusedError: it failed or was interrupted.
        """
        start = time.monotonic()
        subject = git("log", "-1", "--format=%s", new, env=in_hook())
        self.pusher.say(f"==> Deploying {new[:12]} {subject}")
        with self.open_log(new) as log:
            log.write(f"{new} {subject}\npushed by {self.who}, {now():%Y-%m-%d %H:%M:%S} UTC\n\n".encode())
            code = self.run_command(log.name, new)
            # One that is interrupted near its end is finished rather than undone.
            serving = {new} if code == 0 else self.ask_servers(log)
            took = f"{time.monotonic() - start:.0f} s"
            where = f"{socket.gethostname()}:{log.name}"
            if serving == {new}:
                ending = f"{self.branch} is live: {new[:12]} {subject} ({took})"
                ending += f". Its deploy did not end well, though (exit code {code}). Log: {where}" if code else ""
            else:
                what = f"was interrupted ({self.interruption.name or 'the pusher is gone'})"
                if not (self.pusher.gone or self.interruption.name):
                    what = f"failed (exit code {code})"
                stays = f"stays at {old[:12]}" if old else "is not made"
                ending = f"the deploy of {new[:12]} {what} after {took}. {self.branch} {stays}. Log: {where}"
                if len(serving) > 1:
                    ending += ". The servers run different commits: " + ", ".join(sha[:12] for sha in sorted(serving))
            log.seek(0, os.SEEK_END)
            log.write(f"\n{ending}\n".encode())
        if serving != {new}:
            raise RefusedError(ending)
        self.pusher.say(f"==> {ending}")

    def open_log(self, new: str) -> Any:
        """Return the deploy's log, open, and remove the oldest ones."""
        who = re.sub(r"[^\w.@+-]", "_", self.who)
        log = (self.logs / f"{now():%Y%m%dT%H%M%S.%f}Z-{new[:12]}-{who}.log").open("w+b", buffering=0)
        for file in sorted(self.logs.glob("*.log"))[: -self.settings["keep_logs"]]:
            file.unlink(missing_ok=True)
        return log

    def ask_servers(self, log: Any) -> set[str]:
        """Return the commits that the servers run, as far as they can be reached."""
        commits = set()
        with tempfile.TemporaryDirectory() as directory:
            log.seek(0, os.SEEK_END)
            subprocess.run(  # noqa: S603
                [*self.settings["question"], "--tree", directory],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,
            )
            for answer in Path(directory).iterdir():
                with contextlib.suppress(ValueError, KeyError):
                    commits.add(str(json.loads(json.loads(answer.read_text())["stdout"])["commit"]))
        return commits

    def run_command(self, log: str, new: str) -> int:
        """Run ansible-playbook until it ends, and return its exit code."""
        release = json.dumps({"release_repository": str(self.mirror), "release_version": new})
        with open(log, "ab", buffering=0) as writer, open(log, "rb", buffering=0) as reader:  # noqa: PTH123
            reader.seek(0, os.SEEK_END)
            process = subprocess.Popen(  # noqa: S603
                [*self.settings["command"], "-e", release],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                start_new_session=True,
                pass_fds=[self.lock],
                preexec_fn=interrupt_when_orphaned,
            )
            interrupted = False
            while process.poll() is None:
                self.pusher.watch(INTERVAL)
                self.pusher.write(reader.read())
                if (self.pusher.gone or self.interruption.name) and not interrupted:
                    interrupted = True
                    self.pusher.say("==> Interrupting the deploy; the servers go back to where they were")
                    # To Ansible alone, and once: it tidies up after the first, and a second would cut that short.
                    process.send_signal(signal.SIGINT)
            self.pusher.write(reader.read())
            return process.returncode

    def outlive(self) -> None:
        """Leave a process that sees the branch follow, keeps the lock till then, and ends by itself."""
        self.pusher.flush()
        if os.fork():
            return
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            # receive-pack waits for the end of this hook's output, and sshd for the end of receive-pack's.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2, self.pusher.connection):
                os.dup2(null, fd)
            live = git("rev-parse", PENDING, env=outside(), path=self.mirror)
            poll = select.poll()
            poll.register(self.receive_pack, select.POLLIN)
            while self.current() != live and not poll.poll(INTERVAL * 1000):
                pass
            self.settle()
            git("gc", "--auto", "--quiet", env=outside(), path=self.mirror, check=False)
            git("gc", "--auto", "--quiet", env=outside(), path=self.repository, check=False)
            status = 0
        finally:
            os._exit(status)


def interrupt_when_orphaned() -> None:
    """Have the kernel interrupt the deploy, should this hook be killed (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


@contextlib.contextmanager
def answers(pusher: Pusher) -> Iterator[None]:
    """Turn what went wrong into the hook's last words and its exit code."""
    try:
        yield
    except RefusedError as error:
        leave(pusher, f"==> Refused: {error}")
    except GoneError:
        leave(pusher, "==> Refused: interrupted before anything was deployed")
    except (OSError, KeyError, ValueError) as error:
        leave(pusher, f"==> Refused: the control host is not set up: {error}. Run playbooks/git_push.yml again.")


def leave(pusher: Pusher, last_words: str) -> NoReturn:
    """End the hook, and with it the push."""
    pusher.say(last_words)
    pusher.flush()
    sys.exit(1)


def main() -> None:
    """Run the hook."""
    error = sys.stderr.fileno()
    # A push from the control host itself has none; Ctrl-C reaches this hook there.
    pusher = Pusher(error, int(os.environ.pop("HARDSTAND_CONNECTION", error)))
    with answers(pusher):
        hook = Hook(json.loads(SETTINGS.read_text(encoding="utf-8")), pusher, Interruption())
        hook.run(sys.stdin.read())


if __name__ == "__main__":
    main()
