"""What tests against real servers share: a server as its clients and its administrator meet it, a repository to commit
to, and Ansible as the operator runs it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

PROJECT = Path(__file__).resolve().parents[1]
APP = "hardstand"
DOMAIN = "hardstand.test"
ROOT = f"/srv/{APP}"


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.1) -> Any:
    """Return the first true result of `condition`; fail when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(every)


class Repeated:
    """Something that is done again and again, in threads of its own, for as long as a `with` lasts."""

    def __init__(self, threads: int) -> None:
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._repeat) for _ in range(threads)]

    def once(self) -> None:
        """Do it; for a subclass, which keeps what came of it."""
        raise NotImplementedError

    def _repeat(self) -> None:
        while not self._ended.is_set():
            self.once()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


# As a client --------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """An HTTP response, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _Connection(http.client.HTTPSConnection):
    """Speaks to the service by its name, which no DNS knows, on the port that leads to it."""

    def __init__(self, domain: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(domain, timeout=timeout)
        self._published, self._tls = port, context

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self._published), self.timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


class Client:
    """A keep-alive client that verifies the server's certificate against the environment's own CA."""

    def __init__(self, server: Server, domain: str = DOMAIN, timeout: float = 30) -> None:
        self._connection = _Connection(
            domain, server.https_port, ssl.create_default_context(cafile=str(server.ca)), timeout
        )

    def request(self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        body = None if data is None else json.dumps(data)
        sent = {"Content-Type": "application/json", **(headers or {})} if body else dict(headers or {})
        self._connection.request(method, path, body, sent)
        response = self._connection.getresponse()
        return Reply(response.status, response.headers, response.read())

    def close(self) -> None:
        self._connection.close()


@dataclass
class Server:
    """One of the servers. Those that are for the public have ports on this machine."""

    name: str
    https_port: int = 0
    http_port: int = 0
    ca: Path = Path()

    def refresh(self) -> None:
        """Find the ports anew: podman chooses others when a container starts again."""
        self.https_port, self.http_port = published_port(self.name, 443), published_port(self.name, 80)

    def request(
        self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None, domain: str = DOMAIN
    ) -> Reply:
        """Make one request on a connection of its own."""
        client = Client(self, domain)
        try:
            return client.request(method, path, data, headers)
        finally:
            client.close()

    def plain(self, path: str) -> Reply:
        """Make one GET request without TLS."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=10)
        connection.request("GET", path, headers={"Host": DOMAIN})
        response = connection.getresponse()
        try:
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def release(self) -> str:
        """Return the id of the release that answers."""
        return str(self.request("GET", "/api/info").json()["release"])

    def answers(self) -> bool:
        """Return whether the service is there."""
        try:
            return self.request("GET", "/health/ready").status == 200
        except (OSError, http.client.HTTPException):
            return False

    # As root on the server

    def sh(self, command: str, check: bool = True) -> str:
        """Run a shell command on the server and return what it printed."""
        result = subprocess.run(
            ["podman", "exec", self.name, "sh", "-c", command], capture_output=True, text=True, timeout=120
        )
        assert not check or result.returncode == 0, f"{command}: {result.stderr or result.stdout}"
        return result.stdout.strip()

    def pids(self, pattern: str) -> set[int]:
        """Return the processes whose command line matches, zombies apart."""
        # The last one may end, or be a zombie, and that is no failure.
        script = (
            "for d in /proc/[0-9]*; do c=$(tr '\\0' ' ' <$d/cmdline 2>/dev/null); "
            '[ -n "$c" ] && echo ${d#/proc/} $c; done; true'
        )
        lines = (line.partition(" ") for line in self.sh(script).splitlines())
        return {int(pid) for pid, _, command in lines if re.search(pattern, command) and "/proc/[0-9]" not in command}

    def gunicorns(self) -> set[int]:
        """Return all processes of gunicorn, masters and workers."""
        return self.pids(r"bin/gunicorn --config")

    def gunicorn_master(self) -> int:
        """Return the process that Supervisor started."""
        return int(self.sh(f"supervisorctl pid $(supervisorctl status | grep -o '^{APP}-[a-z]*' | head -1)"))

    def programs(self) -> list[str]:
        """Return the programs of the application that Supervisor is configured with."""
        return self.sh(f"cd /etc/supervisor/conf.d && ls {APP}-*.conf", check=False).split()

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of deploys.jsonl."""
        return [json.loads(line) for line in self.sh(f"cat {ROOT}/deploys.jsonl").splitlines()]

    def state(self) -> str:
        """Return a listing of all that a deploy could change, with times and sizes."""
        return self.sh(
            "find /etc /srv /opt -xdev -not -path '*/__pycache__*' -not -name '*.db*' -not -name '*.sqlite3*'"
            " -printf '%p %y %m %u %s %T@\\n' | sort"
        )

    # As the machine that it is

    def running(self) -> bool:
        """Return whether the server is on."""
        command = ["podman", "container", "inspect", "--format", "{{.State.Running}}", self.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "true"

    def kill(self) -> None:
        """Take the power away."""
        subprocess.run(["podman", "kill", self.name], check=True, capture_output=True, timeout=60)
        wait_for(lambda: not self.running(), 30, f"{self.name} is off")

    def boot(self) -> None:
        """Switch the server on, and wait until it has booted."""
        subprocess.run(["podman", "start", self.name], check=True, capture_output=True, timeout=60)
        states = ("running", "degraded")
        wait_for(lambda: self.sh("systemctl is-system-running", check=False) in states, 90, f"{self.name} boots")


def published_port(container: str, port: int) -> int:
    """Return the port of this machine that leads to a port of a container."""
    answer = subprocess.run(["podman", "port", container, f"{port}/tcp"], check=True, capture_output=True, text=True)
    return int(answer.stdout.split(":")[-1])


def curl(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run curl against the server, verifying its certificate."""
    assert shutil.which("curl"), "bin/setup installs curl"
    return subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--cacert", str(server.ca)),
            *("--connect-to", f"{DOMAIN}:443:127.0.0.1:{server.https_port}", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )


# As the operator ----------------------------------------------------------------------------------------------


def molecule_inventory() -> Path:
    """Return the inventory that Molecule made of the scenario's containers."""
    path = os.environ.get("MOLECULE_INVENTORY_FILE")
    if not path:
        pytest.fail("These tests need servers: run `molecule test`, or `molecule converge` and `molecule verify`.")
    return Path(path)


@dataclass
class Deploy:
    """A finished run of Ansible."""

    code: int
    output: str
    seconds: float = 0

    @property
    def changed(self) -> int:
        """Tasks that changed something, over all hosts."""
        return sum(int(number) for number in re.findall(r"\bchanged=(\d+)", self.output))


class Program:
    """A command at work, in a terminal of its own that its output is read from."""

    def __init__(self, command: list[str], directory: Path, **environment: str) -> None:
        self._start = time.monotonic()
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A process group of its own, as a shell makes for a command: Ctrl-C is for all of it, and for nothing else.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output:
            for line in output:
                self._lines.append(line)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process group, as a terminal does."""
        os.killpg(self.process.pid, number)


class Run(Program):
    """Ansible at work."""

    def __init__(self, inventories: list[str], playbook: str, *arguments: str, nice: int = 0, **settings: Any) -> None:
        command = [*(["nice", "-n", str(nice)] if nice else []), "ansible-playbook", playbook]
        for inventory in inventories:
            command += ["-i", inventory]
        if settings:
            command += ["-e", json.dumps(settings)]
        self._looked_at = 0
        environment = {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
        super().__init__([*command, *arguments], PROJECT, **environment)

    def reaches(self, pattern: str, seconds: float = 300) -> None:
        """Wait for a line of output that matches, after those found before; fail when it ends without one."""

        def seen() -> bool:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)
            while self._looked_at < len(self._lines):
                self._looked_at += 1
                if re.search(pattern, self._lines[self._looked_at - 1]):
                    return True
            assert not ended, f"ended before {pattern!r}:\n{self.output}"
            return False

        wait_for(seen, seconds, f"{pattern!r} in the output", every=0.02)

    def wait(self, seconds: float = 900) -> Deploy:
        """Wait until it has ended."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"not finished after {seconds:g} s:\n{self.output}")
        taken = time.monotonic() - self._start
        # Not for ever: a connection that Ansible keeps open may hold the pipe as well.
        self._reader.join(5)
        return Deploy(code, self.output, taken)


@dataclass(kw_only=True)
class Operator:
    """Runs playbooks on an environment; settings are on top of its own."""

    inventories: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, playbook: str, *arguments: str, nice: int = 0, **settings: Any) -> Run:
        """Start a playbook."""
        return Run(self.inventories, playbook, *arguments, nice=nice, **{**self.settings, **settings})

    def play(self, playbook: str, *arguments: str, nice: int = 0, **settings: Any) -> Deploy:
        """Run a playbook to its end, however it ends."""
        return self.run(playbook, *arguments, nice=nice, **settings).wait()

    def expect(self, playbook: str, *arguments: str, **settings: Any) -> Deploy:
        """Run a playbook that has to succeed."""
        done = self.play(playbook, *arguments, **settings)
        assert done.code == 0, done.output
        return done

    def deploy(self, repository: Repository, *arguments: str, **settings: Any) -> Deploy:
        """Roll out a repository's HEAD, and nothing else; has to succeed."""
        return self.expect(
            "deploy.yml", "--tags", "release", *arguments, release_repository=str(repository.path), **settings
        )

    def refuse(self, playbook: str, *arguments: str, **settings: Any) -> Deploy:
        """Run a playbook that has to fail."""
        done = self.play(playbook, *arguments, **settings)
        assert done.code != 0, done.output
        return done


def make_environment(directory: Path, scenario: Path, host: str, key: Path, known_hosts: Path, **more: Any) -> Path:
    """Make the environment of one server as its operator would, with a scenario's settings; returns its directory.

    Root logs in with `key`; the servers' own are in `known_hosts`. `more` are variables of playbooks/environment.yml.
    """
    own = {
        "env": directory.name,
        "environment_inventories": str(directory.parent),
        "environment_host": host,
        "environment_domain": DOMAIN,
        "environment_private_key_file": str(key),
        "environment_known_hosts": known_hosts.read_text().splitlines(),
    }
    options = ["-e", f"@{scenario / 'environment.yml'}", "-e", json.dumps(own | more)]
    Operator(inventories=[]).expect("playbooks/environment.yml", *options)
    return directory


# As the developer ---------------------------------------------------------------------------------------------


class Repository:
    """A clone of this project to commit to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(path)], check=True)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=Tester", "-c", "user.email=tester@localhost"]
        result = subprocess.run(
            ["git", "-C", str(self.path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return result.stdout.strip()

    def commit(self, message: str, files: Mapping[str, str] | None = None) -> str:
        """Commit files, given by path and content, or nothing; returns the commit."""
        for name, content in (files or {}).items():
            (self.path / name).write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def edit(self, message: str, name: str, old: str, new: str) -> str:
        """Commit a replacement in one file; returns the commit."""
        path = self.path / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new, 1))
        return self.commit(message)

    def drop(self) -> str:
        """Take the last commit away, as if it had never been; returns the one before."""
        self.git("reset", "--quiet", "--hard", "HEAD~")
        return self.git("rev-parse", "HEAD")


# Seconds that the slow requests of the tests take.
SLOW_SECONDS = 10

_ROUTES = '''@router.get("/slow")
async def slow(request: Request, seconds: float) -> dict[str, str]:
    """Take long, and say who did."""
    import asyncio

    await asyncio.sleep(seconds)
    return dict(request.app.state.instance)


@router.get("/seen")
async def seen(request: Request) -> dict[str, object]:
    """Say what reached the application of a request."""
    client = request.client.host if request.client else ""
    return {"client": client, "scheme": request.url.scheme, "headers": dict(request.headers)}


'''


def add_routes(repository: Repository) -> str:
    """Commit two routes, /api/posts/slow?seconds=… and /api/posts/seen; returns the commit."""
    before = '@router.get("/{post_id}"'
    return repository.edit("Add routes to test with", "app/posts.py", before, _ROUTES + before)


def migration(head: str, revision: str, message: str, statement: str) -> dict[str, str]:
    """Return the file of a migration after another one."""
    text = _MIGRATION.format(head=head, revision=revision, message=message, statement=statement)
    return {f"app/migrations/versions/{revision}.py": text}


def failing_migration(head: str) -> dict[str, str]:
    """Return the file of a migration after another one that fails in any database."""
    statement = 'op.execute("ALTER TABLE no_such_table ADD COLUMN x INTEGER")'
    return migration(head, "ffffffffffff", "A migration that fails.", statement)


_MIGRATION = '''"""{message}"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {head!r}
branch_labels = None
depends_on = None


def upgrade() -> None:
    {statement}


def downgrade() -> None:
    pass
'''
