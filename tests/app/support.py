"""Helpers for the application's tests: databases, settings, processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx2 as httpx

from app.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]
SECRET_KEY = "0123456789abcdef0123456789abcdef"

# Hard for everything that it passes on its way to the database: URLs, ini files, .env files.
DATABASE_PASSWORD = 'p%40 100%s@:/?#&"x${HOME}'


def make_settings(database_url: str, **values: Any) -> Settings:
    """Settings from these values alone."""
    arguments: dict[str, Any] = {"_env_file": None, "database_url": database_url, "secret_key": SECRET_KEY, **values}
    return Settings(**arguments)


def environment(**values: str) -> dict[str, str]:
    """The environment of a process: these values, and nothing that the developer happens to have set."""
    return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **values}


def run(project: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of the application's commands to its end, in the project's directory."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def alembic(project: Path, database_url: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Alembic as the documentation says."""
    env = {"DATABASE_URL": database_url, "SECRET_KEY": SECRET_KEY, **env}
    return run(project, "alembic", "-c", "app/alembic.ini", *arguments, **env)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 15) -> Any:
    """Wait until the condition holds; returns what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    msg = f"after {seconds} s still not: {what}"
    raise AssertionError(msg)


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    client: httpx.Client
    log: Path
    socket: Path

    def wait(self) -> None:
        """Wait until it answers: gunicorn listens before it has a worker."""
        eventually(self._listens, "listening")
        assert self.client.get("/health/live").status_code == 200

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        # A bare socket: httpx forgets to close one that cannot connect.
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(self.socket))
            return True
        return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@contextmanager
def server(project: Path, tmp_path: Path, *command: str, **env: str) -> Iterator[Server]:
    """A server that listens on the socket `web.sock` in tmp_path; in the command, SOCKET stands for its path."""
    path, log = tmp_path / "web.sock", tmp_path / "server.log"
    arguments = [argument.replace("SOCKET", str(path)) for argument in command]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=project,
            env=environment(**env),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://test", timeout=20)
    try:
        with client:
            yield Server(process, client, log, path)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class PostgreSQL:
    """A PostgreSQL server of the tests' own, reached by a socket in its directory and with a password."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bin = _postgresql_programs()
        # PostgreSQL refuses to run as root.
        self._prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._count = 0

    def create(self) -> None:
        if self._prefix:
            shutil.chown(self.directory, "postgres")
        password_file = self.directory / "password"
        password_file.write_text(DATABASE_PASSWORD)
        password_file.chmod(0o644)
        data = str(self.directory / "data")
        options = ["-U", "app", "--auth=scram-sha-256", f"--pwfile={password_file}", "-E", "UTF8", "--locale=C", "-N"]
        self._program("initdb", "-D", data, *options)
        self.start()

    def start(self) -> None:
        options = f"-k {self.directory} -c listen_addresses='' -c fsync=off -c max_connections=50"
        log = str(self.directory / "log")
        self._program("pg_ctl", "start", "-w", "-D", str(self.directory / "data"), "-l", log, "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop it: `fast` says goodbye to clients, `immediate` is as a crash."""
        self._program("pg_ctl", "stop", "-w", "-m", mode, "-D", str(self.directory / "data"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nobody answers, and no connection breaks: what a server's disk or network that hangs looks like."""
        parent = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
        children = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        pids = (parent, *children)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def url(self, database: str, scheme: str = "postgresql", user: str = "app") -> str:
        return f"{scheme}://{user}:{quote(DATABASE_PASSWORD, safe='')}@/{database}?host={self.directory}"

    def create_database(self, template: str = "template1") -> str:
        """Make a database and return its name."""
        self._count += 1
        name = f"test_{self._count}"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    async def connect(self, database: str, user: str = "app") -> asyncpg.Connection:
        return await asyncpg.connect(host=str(self.directory), user=user, password=DATABASE_PASSWORD, database=database)

    def fetch(self, database: str, query: str) -> list[tuple[Any, ...]]:
        async def work() -> list[tuple[Any, ...]]:
            connection = await self.connect(database)
            try:
                return [tuple(row) for row in await connection.fetch(query)]
            finally:
                await connection.close()

        return asyncio.run(work())

    def execute(self, database: str, *statements: str, user: str = "app") -> None:
        async def work() -> None:
            connection = await self.connect(database, user)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(work())

    def _program(self, name: str, *arguments: str) -> None:
        # Its output goes to a file: the server that pg_ctl starts keeps what it inherits open.
        with (self.directory / "output").open("a+") as output:
            command = [*self._prefix, str(self._bin / name), *arguments]
            result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=self.directory, check=False)
            output.seek(0)
            assert result.returncode == 0, f"{name} failed:\n{output.read()}"


def _postgresql_programs() -> Path:
    """Directory of PostgreSQL's server programs; Debian keeps them off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    if path := shutil.which("initdb"):
        return Path(path).resolve().parent
    msg = "PostgreSQL's server programs are missing. Run `bin/setup --tests`, or `apt-get install postgresql`."
    raise AssertionError(msg)
