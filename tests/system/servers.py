"""What the tests of this directory share: the servers that Molecule made, as a client and as an operator meets them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
SCENARIO = PROJECT / "molecule" / "default"
APP = "hardstand"
DOMAIN = "hardstand.test"
ROOT = f"/srv/{APP}"


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the first true result of `condition`; fail when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


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
class Deploy:
    """A finished run of Ansible."""

    code: int
    output: str

    @property
    def changed(self) -> int:
        """Tasks that changed something, over all hosts."""
        return sum(int(number) for number in re.findall(r"\bchanged=(\d+)", self.output))


@dataclass
class Server:
    """One of the servers."""

    name: str
    https_port: int
    http_port: int
    ca: Path
    inventories: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def refresh(self) -> None:
        """Find the ports anew: podman chooses others when a container starts again."""
        self.https_port, self.http_port = published_port(self.name, 443), published_port(self.name, 80)

    # As a client

    def request(
        self, method: str, path: str, data: Any = None, headers: Mapping[str, str] | None = None, domain: str = DOMAIN
    ) -> Reply:
        """Make one request on a connection of its own."""
        client = Client(self, domain)
        try:
            return client.request(method, path, data, headers)
        finally:
            client.close()

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
        script = (
            "for d in /proc/[0-9]*; do c=$(tr '\\0' ' ' <$d/cmdline 2>/dev/null); "
            '[ -n "$c" ] && echo ${d#/proc/} $c; done'
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

    # As the operator

    def ansible(self, playbook: str, *arguments: str, **settings: Any) -> Deploy:
        """Run a playbook against this server alone, with settings on top of the inventory's."""
        command = ["ansible-playbook", playbook, "--limit", self.name]
        for inventory in self.inventories:
            command += ["-i", inventory]
        merged = {**self.settings, **settings}
        if merged:
            command += ["-e", json.dumps(merged)]
        result = subprocess.run(
            [*command, *arguments],
            cwd=PROJECT,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return Deploy(result.returncode, result.stdout)

    def deploy(self, *arguments: str, **settings: Any) -> Deploy:
        """Run deploy.yml and expect it to succeed."""
        run = self.ansible("deploy.yml", *arguments, **settings)
        assert run.code == 0, run.output
        return run

    def refuse(self, *arguments: str, **settings: Any) -> Deploy:
        """Run deploy.yml and expect it to fail."""
        run = self.ansible("deploy.yml", *arguments, **settings)
        assert run.code != 0, run.output
        return run


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


@dataclass
class Load:
    """What clients saw while something happened to the server."""

    requests: int = 0
    releases: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


@contextmanager
def load(server: Server, clients: int = 8) -> Iterator[Load]:
    """Keep clients busy, reading and writing on keep-alive connections, and check every answer's content."""
    seen, lock, stop = Load(), threading.Lock(), threading.Event()

    def work(number: int) -> None:
        client = Client(server)
        count = 0
        while not stop.is_set():
            count += 1
            title = f"load {number}-{count}"
            try:
                info = client.request("GET", "/api/info")
                assert info.status == 200, f"GET /api/info: {info.status}"
                if count % 5 == 0:
                    made = client.request("POST", "/api/posts", {"title": title, "body": "x"})
                    assert made.status == 201, f"POST: {made.status}"
                    read = client.request("GET", f"/api/posts/{made.json()['id']}")
                    assert read.json()["title"] == title, "another post came back"
            except Exception as error:  # Whatever it is, a client saw it.
                with lock:
                    seen.failures.append(f"{type(error).__name__}: {error}")
                client.close()
                client = Client(server)
            else:
                with lock:
                    seen.requests += 1
                    seen.releases.add(info.json()["release"])
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


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
