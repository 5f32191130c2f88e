"""What the programs that make backups on a server share: settings, state file, lock, commands, command line.

Installed beside them in /usr/local/lib/hardstand. A program is called as ``PROGRAM --app NAME COMMAND …``; its settings
are /etc/hardstand/backup/<name>.json, and what it knows of the backups is in the state file, which
playbooks/status.yml shows::

    {"kind": "postgresql",                     or "sqlite"
     "repository": "/var/lib/pgbackrest",      where the backups are, for people
     "runs_backups": true,                     false on a database server whose backups another server makes
     "max_age_hours": 26,                      a newest backup that is older is a problem
     "created": "2026-11-24T01:59:00Z",        since when there is this file
     "last": {…},                              the last attempt: started, ended, ok, label, type, bytes, size, message
     "last_success": {…},                      the last one that succeeded, or null
     "check": {"time", "ok", "message"},       the last look at all this, which a timer takes every few minutes
     "archive": {…},                           PostgreSQL's WAL: ok, last_archived, failing_since, lag_seconds, message
     "restore_check": {…},                     the last proof that the backups can be restored, or null
     "restore": {…}}                           the last restore, or null

Times are UTC. The file is replaced as a whole, so a reader never sees half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
import time
import typing as t
from datetime import UTC, datetime
from pathlib import Path

SETTINGS = Path("/etc/hardstand/backup")
STATES = Path("/var/lib/hardstand/backups")

# Hours after the state file was made in which it is no problem that there is no backup yet.
GRACE_HOURS = 1.0

State = dict[str, t.Any]


class BackupError(Exception):
    """Something is wrong that an operator has to put right; the text says what."""


def stamp(seconds: float | None = None) -> str:
    """Return a moment (seconds since the epoch, now unless given) as the state file spells it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() if seconds is None else seconds))


def seconds_of(text: object) -> float | None:
    """Return a moment of the state file in seconds since the epoch; None when it is none."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def parse_moment(text: str) -> datetime:
    """Return the moment that an operator wrote, such as ``2026-11-24 18:00:00+00``, in UTC.

    Raises:
        BackupError: it is no moment, lies in the future, or does not say how far it is from UTC.
    """
    # Before Python 3.11 fromisoformat took neither of these two.
    spelled = re.sub(r"([+-]\d\d)$", r"\1:00", text.strip().replace("Z", "+00:00"))
    try:
        moment = datetime.fromisoformat(spelled)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        msg = f'"{text}" is no moment with an offset from UTC; write it as 2026-11-24 18:00:00+00, or say latest.'
        raise BackupError(msg)
    moment = moment.astimezone(UTC)
    if moment > datetime.now(UTC):
        msg = f"{text} is in the future."
        raise BackupError(msg)
    return moment


def people_bytes(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def people_seconds(seconds: float) -> str:
    """Return a length of time as people read it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.0f} days"


def say(text: str) -> None:
    """Tell the journal, or whoever watches, at once."""
    print(text, flush=True)


def write_file(path: Path, text: str, mode: int) -> None:
    """Replace a file as a whole; a reader sees the old content or the new."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> State:
    """Return the mapping in a JSON file; empty when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def start_timers(timers: t.Mapping[str, bool]) -> list[str]:
    """Start and enable timers, or stop and disable them, by name without suffix; returns those that it changed."""
    changed = []
    for name, wanted in timers.items():
        unit = f"{name}.timer"
        shown = run(["systemctl", "show", unit, "--property", "ActiveState,UnitFileState,NeedDaemonReload"]).stdout
        state = dict(line.partition("=")[::2] for line in shown.splitlines())
        if state.get("NeedDaemonReload") == "yes":
            run(["systemctl", "daemon-reload"])
        if (state.get("ActiveState") == "active", state.get("UnitFileState") == "enabled") != (wanted, wanted):
            done = run(["systemctl", "enable" if wanted else "disable", "--now", unit])
            if done.returncode:
                msg = f"{unit} cannot be {'started' if wanted else 'stopped'}: {done.stderr.strip()}"
                raise BackupError(msg)
            changed.append(unit)
    return changed


def free_bytes(path: Path) -> int:
    """Return the bytes that accounts other than root may still write on the file system of a path."""
    while not path.is_dir():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


# Commands -------------------------------------------------------------------------------------------------------------


class Account(t.NamedTuple):
    """An account to run commands as."""

    name: str
    uid: int
    gid: int
    home: str


def account(name: str) -> Account:
    """Return an account; raises BackupError when there is none of that name."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        msg = f"There is no account {name} on this server."
        raise BackupError(msg) from None
    return Account(name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def run(
    command: t.Sequence[str],
    *,
    user: Account | None = None,
    env: t.Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a minimal environment.

    Args:
        command: program and arguments.
        user: the account it runs as, when we are root; ours otherwise.
        env: variables beside PATH and LANG.
        stdin: what it reads; nothing when there is none.
        timeout: seconds, after which it is killed.

    Raises:
        BackupError: the program is missing, or took too long.
    """
    identity: dict[str, t.Any] = {}
    if user is not None and os.geteuid() == 0 and user.uid != 0:
        groups = os.getgrouplist(user.name, user.gid)
        identity = {"user": user.uid, "group": user.gid, "extra_groups": groups, "umask": 0o077}
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        **(env or {}),
    }
    if user is not None:
        environment["HOME"] = user.home
    try:
        process = subprocess.Popen(  # noqa: S603 - every caller's command is a list
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            **identity,
        )
    except OSError as error:
        msg = f"Cannot run {command[0]}: {error.strerror}."
        raise BackupError(msg) from None
    try:
        out, err = process.communicate(stdin, timeout)
    except BaseException as error:
        # With the processes that it has started: none of them may go on writing when its files are cleared away.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            msg = f"{Path(command[0]).name} has not ended after {timeout:g} s."
            raise BackupError(msg) from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_all(words: t.Collection[str]) -> None:
    """Kill every process that has all these words in its command line, and return when none is left.

    For what an earlier run has started that was itself killed.
    """
    wanted = {word.encode() for word in words}
    while found := [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.name != str(os.getpid()) and _has(path, wanted)
    ]:
        for path in found:
            with contextlib.suppress(OSError):
                os.kill(int(path.parent.name), signal.SIGKILL)
        time.sleep(0.05)


def _has(path: Path, words: set[bytes]) -> bool:
    try:
        return words <= set(path.read_bytes().split(b"\0"))
    except OSError:
        return False


def next_elapse(calendar: str, after: float) -> float:
    """Return when a schedule (OnCalendar, systemd.time(7)) comes round next after a moment, in seconds since the epoch.

    Raises:
        BackupError: systemd does not understand the schedule.
    """
    done = run(["systemd-analyze", "calendar", f"--base-time=@{int(after)}", calendar], env={"TZ": local_zone()})
    # In the server's own time zone, and in UTC when that is another.
    found = re.findall(
        r"(?:Next elapse|\(in UTC\)): \w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.\d+)? (\S+)", done.stdout
    )
    if done.returncode or not found or found[-1][1] != "UTC":
        msg = f'The schedule "{calendar}" does not come round: {(done.stderr or done.stdout).strip()}'
        raise BackupError(msg)
    return datetime.strptime(found[-1][0], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()


def local_zone() -> str:
    """Return the server's time zone, in which systemd's timers count, as TZ takes it."""
    return os.environ.get("TZ") or ":/etc/localtime"


# The state file -------------------------------------------------------------------------------------------------------


class StateFile:
    """What is known of the backups of one application on this server."""

    def __init__(self, path: Path, fixed: t.Mapping[str, t.Any]) -> None:
        self.path = path
        self.fixed = dict(fixed)

    def read(self) -> State:
        """Return the state; of a file that is not there, the state before the first backup."""
        empty: State = dict.fromkeys(("last", "last_success", "check", "archive", "restore_check", "restore"))
        return {**empty, "created": stamp(), **read_json(self.path), **self.fixed}

    def update(self, **parts: t.Any) -> State:
        """Replace parts of the state, and return all of it. Raises BackupError when it cannot be written."""
        try:
            descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # One program may make a backup while another looks whether all is well.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                state = {**self.read(), **parts}
                write_file(self.path, json.dumps(state, indent=1) + "\n", 0o644)
            finally:
                os.close(descriptor)
        except OSError as error:
            msg = f"Cannot write {self.path}: {error.strerror}."
            raise BackupError(msg) from None
        return state


def freshness_problem(state: t.Mapping[str, t.Any], newest: float | None, now: float) -> str:
    """Return what is wrong with the age of the newest backup; empty when nothing is.

    Args:
        state: the state file's content.
        newest: when the newest backup ended, in seconds since the epoch; None when there is none.
        now: the present, likewise.
    """
    if newest is None:
        created = seconds_of(state.get("created")) or now
        last = state.get("last")
        if last and not last["ok"]:
            return f"there is no backup yet, and the first one failed: {last['message']}"
        return "there is no backup yet" if now - created > GRACE_HOURS * 3600 else ""
    hours = (now - newest) / 3600
    if hours > float(state["max_age_hours"]):
        age = people_seconds(3600 * hours)
        return f"the newest backup is {age} old, and should be younger than {state['max_age_hours']} h"
    return ""


@contextlib.contextmanager
def exclusive(path: Path) -> t.Iterator[None]:
    """Be the only one who makes, restores or tries the backups of an application on this server; wait for the turn.

    Raises:
        BackupError: the lock's file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    except OSError as error:
        msg = f"Cannot open {path}: {error.strerror}."
        raise BackupError(msg) from None
    try:
        # Root may be the first to make it, and the database's account is to use it as well.
        if os.geteuid() == 0:
            os.fchown(descriptor, 0, path.parent.stat().st_gid)
            os.fchmod(descriptor, 0o660)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another backup or restore of this application is under way; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# The command line -----------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal ends the program; what is half done is undone on the way out."""


def leave_in_order() -> None:
    """Turn the signals that end a program into an exception, so that whatever is to be put back is."""

    def leave(signum: int, _frame: object) -> t.NoReturn:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(signal.Signals(signum).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)


def parser(description: str) -> tuple[argparse.ArgumentParser, t.Any]:
    """Return a command line with the arguments that all programs have, and where to add commands."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--app", required=True, help="name of the application")
    found.add_argument("--settings", type=Path, help=f"settings file; {SETTINGS}/<app>.json unless given")
    return found, found.add_subparsers(dest="command", required=True)


def settings_of(arguments: argparse.Namespace) -> dict[str, t.Any]:
    """Return the settings; raises BackupError when they cannot be read."""
    path = arguments.settings or SETTINGS / f"{arguments.app}.json"
    try:
        return t.cast("dict[str, t.Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"Cannot read the settings in {path}: {error}"
        raise BackupError(msg) from None


def call(work: t.Callable[[], str]) -> t.NoReturn:
    """Do the work of a command, print what it returns, and exit with 0, or with 1 and the problem on standard error."""
    leave_in_order()
    try:
        if text := work():
            say(text)
    except (BackupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Stopped as signalled:
        print(f"error: stopped by {signalled}", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(0)
