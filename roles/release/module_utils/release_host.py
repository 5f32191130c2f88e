"""What the release modules share on a server: its layout, processes, Supervisor, health checks and records."""

from __future__ import annotations

import ctypes
import fcntl
import grp
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
import typing as t
import urllib.parse
import xmlrpc.client
from contextlib import contextmanager, suppress
from pathlib import Path

from ansible.module_utils.host_files import write_file

SLOTS = ("blue", "green")


class ReleaseError(Exception):
    """A deploy cannot go on; the text is for the operator and says what to do about it."""


class Account(t.NamedTuple):
    """An account of the system, by number."""

    name: str
    uid: int
    gid: int


def account(name: str) -> Account:
    """Return the account called `name`.

    Raises:
        ReleaseError: there is none.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ReleaseError(f"There is no account {name} here; role base makes it: run without --tags first.") from None
    return Account(name, entry.pw_uid, entry.pw_gid)


def group_id(name: str) -> int:
    """Return the id of group `name`; raises ReleaseError when there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ReleaseError(f"There is no group {name} here; nginx's package makes it: run without --tags.") from None


class Layout:
    """The paths of one application on a server."""

    def __init__(self, root: str, app: str, logs: str = "/var/log/supervisor") -> None:
        self.root = Path(root)
        self.app = app
        self.logs = Path(logs)
        self.repository = self.root / "repo.git"
        self.venvs = self.root / "venvs"
        self.releases = self.root / "releases"
        self.shared = self.root / "shared"
        self.cache = self.root / "cache"
        self.run = self.root / "run"
        self.live_socket = self.run / "live.sock"
        self.current = self.root / "current"
        self.records = self.root / "deploys.jsonl"
        self.pending = self.root / ".deploy.json"
        self.busy = self.root / ".busy"

    def socket(self, slot: str) -> Path:
        """Return the path of the socket that gunicorn binds in `slot`."""
        return self.run / f"{slot}.sock"

    def program(self, slot: str) -> str:
        """Return the name of the Supervisor program of `slot`."""
        return f"{self.app}-{slot}"

    def log(self, slot: str) -> Path:
        """Return the path of the log that Supervisor keeps of `slot`."""
        return self.logs / f"{self.program(slot)}.log"

    def live_slot(self) -> str | None:
        """Return the slot that nginx reaches, or None before the first cut-over."""
        try:
            slot = self.live_socket.readlink().name.removesuffix(".sock")
        except FileNotFoundError:
            return None
        return slot if slot in SLOTS else None

    def live_release(self) -> str | None:
        """Return the id of the release that serves, or None."""
        try:
            return self.current.readlink().name
        except FileNotFoundError:
            return None

    def release(self, release_id: str) -> dict[str, t.Any] | None:
        """Return what release.json says, or None when the release is absent or was never finished."""
        try:
            text = (self.releases / release_id / "release.json").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return t.cast("dict[str, t.Any]", json.loads(text))


_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Tie a child's life to this module's: the next run must not meet an installer that an earlier one left behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    command: t.Sequence[str],
    *,
    user: Account | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: t.Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command with a minimal environment, as another account when one is given.

    Args:
        command: the program and its arguments.
        user: the account, ours when there is none.
        cwd: the directory, / when there is none.
        env: variables beside PATH and LANG.
        stdin: what it reads; nothing when there is none.
        timeout: seconds; when they have passed the command and its children are killed.

    Raises:
        ReleaseError: the command is missing or took too long.
    """
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **(env or {})}
    identity: dict[str, t.Any] = {}
    if user is not None:
        identity = {"user": user.uid, "group": user.gid, "extra_groups": [], "umask": 0o022}
    try:
        process = subprocess.Popen(  # noqa: S603 - every caller's command is a list
            command,
            cwd=cwd or "/",
            env=environment,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # After the change of account, which would clear it; we have no other threads.
            **identity,
        )
    except OSError as error:
        raise ReleaseError(f"Cannot run {command[0]}: {error.strerror}.") from None
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        out, err = process.communicate()
        said = (err or out).decode(errors="replace").strip()
        raise ReleaseError(f"{Path(command[0]).name} was stopped after {timeout:g} s.\n{said}") from None
    return subprocess.CompletedProcess(
        command, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )


def last_lines(text: str, count: int) -> str:
    """Return the last `count` lines of a text, without the blank ones at its end."""
    return "\n".join(text.rstrip().splitlines()[-count:])


def remove_tree(path: Path) -> None:
    """Remove a directory, or whatever else is there; a symbolic link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def give_to_root(directory: Path) -> None:
    """Make root the owner of a directory and of all in it, and the only one who may write there."""
    for parent, directories, files in os.walk(directory):
        for name in (".", *directories, *files):
            path = Path(parent) / name
            os.chown(path, 0, 0, follow_symlinks=False)
            mode = path.lstat().st_mode
            if mode & 0o022 and not path.is_symlink():
                path.chmod(stat.S_IMODE(mode) & ~0o022)


# One step at a time ---------------------------------------------------------------------------------------------------


@contextmanager
def busy(layout: Layout) -> t.Iterator[None]:
    """Be the only step of a deploy that works on this host; the kernel ends it however we end.

    Raises:
        ReleaseError: another one is under way.
    """
    # In root's directory, not among the sockets: the application owns that one, and could plant a link there.
    with _busy_file(layout) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReleaseError(
                "Another step of a deploy is under way on this host; wait for it, or see who deploys."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _busy_file(layout: Layout) -> t.TextIO:
    layout.root.mkdir(mode=0o755, parents=True, exist_ok=True)
    return layout.busy.open("a+", encoding="ascii")


def interrupt(layout: Layout, patience: float = 10) -> bool:
    """End the step of a deploy that is still under way here, although nobody listens to it any more.

    What it has started ends with it. Every step may be cut off anywhere.

    Args:
        layout: the application.
        patience: seconds between asking it to end and killing it.

    Returns:
        Whether there was one.
    """
    found = False
    deadline = time.monotonic() + patience
    with _busy_file(layout) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                # Whoever holds the lock wrote its pid right after taking it.
                with suppress(ValueError, ProcessLookupError):
                    os.kill(int(file.read()), signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
                found = True
                time.sleep(0.05)
            else:
                return found


def read_pending(layout: Layout) -> dict[str, t.Any] | None:
    """Return the deploy that began to start a release here and has not ended, or None.

    `to` is the release, `from` the one that served before it (empty: none did), `deploy` says who deploys what.
    """
    try:
        pending = json.loads(layout.pending.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return pending if isinstance(pending, dict) else None


# .env -----------------------------------------------------------------------------------------------------------------

_DOTENV_LINE = re.compile(r'^([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"$')
_ESCAPED = re.compile(r"\\(.)")


def parse_dotenv(text: str) -> dict[str, str]:
    """Read a .env that action plugin release_build wrote (not any .env)."""
    values = {}
    for line in text.split("\n"):
        if match := _DOTENV_LINE.match(line):
            raw = match[2].replace("${__:-$}{", "${")
            values[match[1]] = _ESCAPED.sub(lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), raw)
    return values


def url_credentials(url: str) -> set[str]:
    """Return what must not be shown of a URL: its password, or the token in a password's place, decoded or not."""
    if not (match := re.search(r"://([^/@\s]+)@", url)):
        return set()
    user, colon, password = match[1].partition(":")
    word = password if colon else user
    return {word, urllib.parse.unquote(word)}


class Mask:
    """Removes the secrets of a release from text that is about to be shown.

    Give it the whole text and shorten the result: of a secret cut in two it would not know the halves.
    """

    # Shorter ones are left: masking every "true" or "1" would make any text unreadable.
    SHORTEST = 6

    def __init__(self, values: t.Iterable[str], urls: t.Iterable[str] = ()) -> None:
        words = set()
        for value in values:
            words.add(value)
            # A key of many lines may be shown line by line.
            lines = [line.strip() for line in value.splitlines()]
            words.update(line for line in lines if len(lines) > 1 and len(line) >= 2 * self.SHORTEST)
        # A URL's password turns up alone in drivers' messages.
        for url in (*words, *urls):
            words |= url_credentials(url)
        self._words = sorted((w for w in words if len(w) >= self.SHORTEST), key=len, reverse=True)

    @classmethod
    def of_release(cls, directory: Path, more: t.Iterable[str] = ()) -> Mask:
        """Return the mask for a finished release, from its own .env, and for `more` secrets."""
        try:
            names = json.loads((directory / "release.json").read_text(encoding="utf-8"))["secret_names"]
            values = parse_dotenv((directory / ".env").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(more)
        return cls([*(values[name] for name in names if name in values), *more])

    def __call__(self, text: str) -> str:
        """Return a text without the secrets, also where they stand quoted as JSON or Python would."""
        for word in self._words:
            for shape in (word, json.dumps(word)[1:-1], repr(word)[1:-1]):
                text = text.replace(shape, "********")
        return text


# Supervisor -----------------------------------------------------------------------------------------------------------


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: t.Any) -> http.client.HTTPConnection:
        if self._connection is None or self._connection[1] is None:
            self._connection = host, _UnixConnection(self._path, 30.0)
        return t.cast("http.client.HTTPConnection", self._connection[1])


class Supervisor:
    """Supervisor's XML-RPC interface: what supervisorctl speaks, without starting a Python for each word.

    Only ever touches the one group it is asked about; see http://supervisord.org/api.html.
    """

    UP = ("STARTING", "RUNNING")
    DOWN = ("STOPPED", "EXITED", "FATAL", "UNKNOWN")

    def __init__(self, socket_path: str, directory: str) -> None:
        self._directory = Path(directory)
        # The transport ignores the host; the name only has to parse.
        self._transport = _UnixTransport(socket_path)
        self._rpc: t.Any = xmlrpc.client.ServerProxy("http://localhost", transport=self._transport).supervisor

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._transport.close()

    def _call(self, method: str, *args: t.Any) -> t.Any:
        try:
            return getattr(self._rpc, method)(*args)
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise ReleaseError(f"supervisord does not answer ({error}): see `systemctl status supervisor`.") from None

    def file(self, program: str) -> Path:
        """Return the path of the program's configuration."""
        return self._directory / f"{program}.conf"

    def state(self, program: str) -> str | None:
        """Return the state of a program by Supervisor's name for it, or None when it does not know the program."""
        try:
            return t.cast("str", self._call("getProcessInfo", program)["statename"])
        except xmlrpc.client.Fault as fault:
            if "BAD_NAME" in fault.faultString:
                return None
            raise ReleaseError(f"Supervisor does not tell the state of {program}: {fault.faultString}.") from None

    def _reread(self) -> None:
        try:
            self._call("reloadConfig")
        except xmlrpc.client.Fault as fault:
            raise ReleaseError(
                f"Supervisor cannot read its configuration: {fault.faultString}. "
                f"A file in {self._directory} that is not ours is broken; mend it, then deploy again."
            ) from None

    def start(self, program: str, configuration: bytes) -> None:
        """Make a program known and start it, without waiting for it to run."""
        write_file(self.file(program), configuration, 0o644)
        self._reread()
        try:
            self._call("addProcessGroup", program)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_ADDED" not in fault.faultString:
                raise ReleaseError(f"Supervisor does not take {program}: {fault.faultString}.") from None
        self.resume(program)

    def resume(self, program: str) -> None:
        """Start a program that Supervisor knows; nothing happens when it is up."""
        try:
            self._call("startProcess", program, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                raise ReleaseError(f"Supervisor cannot start {program}: {fault.faultString}.") from None

    def remove(self, program: str, timeout: float) -> None:
        """Stop a program, wait until it is gone, and forget it.

        Args:
            program: Supervisor's name for it; it may be unknown.
            timeout: seconds to wait for the end; Supervisor kills it after its own stopwaitsecs.

        Raises:
            ReleaseError: it did not end in time.
        """
        # The file first: whenever the server goes down from here on, it does not come up with this program.
        self.file(program).unlink(missing_ok=True)
        deadline = time.monotonic() + timeout
        while not self._forget(program):
            if time.monotonic() > deadline:
                raise ReleaseError(f"Supervisor could not stop {program} within {timeout:g} s.")
            time.sleep(0.02)

    def _forget(self, program: str) -> bool:
        """Make Supervisor forget a program that is down, tell it to stop one that is not; returns whether it forgot."""
        state = self.state(program)
        if state is None:
            return True
        # What has just ended by itself is about to be started again, hence the attempt and not a look at the state.
        with suppress(xmlrpc.client.Fault):  # STILL_RUNNING
            if state in self.DOWN:
                self._call("removeProcessGroup", program)
                return True
        if state != "STOPPING":
            with suppress(xmlrpc.client.Fault):  # NOT_RUNNING
                self._call("stopProcess", program, False)
        return False


# Health and connections -----------------------------------------------------------------------------------------------


class Answer(t.NamedTuple):
    """What a health check saw: the status (0 when nobody answered) and what to tell about it."""

    status: int
    text: str

    @property
    def healthy(self) -> bool:
        """Whether the release can serve."""
        return 200 <= self.status < 300


def check_health(path: Path, url: str, host: str, timeout: float = 5.0) -> Answer:
    """Ask the application behind a unix socket whether it can serve.

    Args:
        path: the socket.
        url: the path to request.
        host: the Host header, for applications that check it.
        timeout: seconds that the application may be silent.
    """
    connection = _UnixConnection(str(path), timeout)
    try:
        connection.request("GET", url, headers={"Host": host, "X-Forwarded-Proto": "https", "Connection": "close"})
        response = connection.getresponse()
        body = response.read(2000).decode(errors="replace")
        return Answer(response.status, f"{response.status} {response.reason}: {body}".strip(": "))
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, f"no answer on {path.name} ({str(error) or type(error).__name__})")
    finally:
        connection.close()


def connections(path: Path) -> int:
    """Return how many connections the kernel holds on a listening unix socket, the ones not yet accepted included.

    /proc/net/unix names the server's end of a connection by its listener's path (proc_net_unix(5)). Its state is 03,
    SS_CONNECTED, once it is accepted, and 02, SS_CONNECTING, while it waits for that with the client's request in it.
    """
    count = 0
    name = str(path).encode()
    with Path("/proc/net/unix").open("rb") as table:
        for line in table:
            fields = line.split()
            if len(fields) == 8 and fields[5] in (b"02", b"03") and fields[7] == name:
                count += 1
    return count


# Records --------------------------------------------------------------------------------------------------------------


def append_record(layout: Layout, record: t.Mapping[str, t.Any]) -> None:
    """Add a line to deploys.jsonl."""
    data = (json.dumps(record) + "\n").encode()
    descriptor = os.open(layout.records, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # A crash cut the last line short; it must not take this one along.
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(layout: Layout) -> list[dict[str, t.Any]]:
    """Return the deploys on record, oldest first; a line that a crash cut short is passed over."""
    records = []
    with suppress(FileNotFoundError):
        for line in layout.records.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records


def record_failure(layout: Layout, deploy: t.Mapping[str, t.Any], release_id: str, phase: str, reason: str) -> None:
    """Record a deploy that did not succeed. Never hides the failure it records."""
    with suppress(OSError):
        if layout.root.is_dir():
            append_record(layout, deploy_record(deploy, release_id, f"failed: {phase}", reason.splitlines()[0]))


def deploy_record(deploy: t.Mapping[str, t.Any], release_id: str, outcome: str, reason: str = "") -> dict[str, t.Any]:
    """Return the line of deploys.jsonl for a deploy that ends now."""
    now = time.time()
    return {
        "id": deploy["id"],
        "release": release_id,
        "commit": deploy["commit"],
        "who": deploy["who"],
        "from": deploy["from"],
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "seconds": round(max(now - deploy["started"], 0), 1),  # The control node's clock may be ahead of ours.
        "outcome": outcome,
        "reason": reason,
    }


def free_lock(lock: t.Mapping[str, t.Any]) -> bool:
    """Remove the deploy lock if it is this run's; returns whether it was."""
    path = lock.get("path")
    if not path:
        return False
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(held, dict) or not lock.get("token") or held.get("token") != lock["token"]:
        return False
    Path(path).unlink(missing_ok=True)
    return True
