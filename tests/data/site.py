"""The environments of scenario `data`: an application, its PostgreSQL, and where the backups are."""

from __future__ import annotations

import http.client
import json
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.harness import (
    APP,
    PROJECT,
    ROOT,
    Client,
    Operator,
    Program,
    Server,
    make_environment,
    molecule_inventory,
    wait_for,
)

SCENARIO = PROJECT / "molecule" / "data"
STATE = f"/var/lib/hardstand/backups/{APP}.json"
CHECK_UNIT = f"hardstand-backup-check-{APP}.service"

# Server that is an environment by itself.
SINGLE = "hardstand-data-single"

# Seconds after which PostgreSQL archives what it has; as molecule/data/environment.yml has it.
ARCHIVE_TIMEOUT = 10

BACKUP, RESTORE = "playbooks/backup.yml", "playbooks/restore.yml"
RESTORE_CHECK, STATUS = "playbooks/restore_check.yml", "playbooks/status.yml"

# Runs statements with the driver and the settings of the release that serves, and prints what came of each.
_PROBE = """
import asyncio, json, ssl, sys
import asyncpg
url, encrypted, statements = json.loads(sys.argv[1])

async def main():
    context = False
    if encrypted:
        context = ssl.create_default_context(cafile="/etc/ssl/hardstand/{app}-ca.crt")
    try:
        connection = await asyncpg.connect(url, ssl=context, timeout=10)
    except Exception as error:
        return [type(error).__name__ + ": " + str(error)]
    said = []
    for statement in statements:
        try:
            said.append(str(await connection.fetchval(statement)))
        except Exception as error:
            said.append(type(error).__name__ + ": " + str(error))
    await connection.close()
    return said

print(json.dumps(asyncio.run(main())))
"""


@dataclass(kw_only=True)
class Site(Operator):
    """An environment with a PostgreSQL of its own."""

    app: Server
    db: Server
    # The server that makes the backups and has them.
    backups: Server
    # The database server's address.
    address: str
    # A server of somebody else, with psql.
    stranger: Server
    # Where settings are kept that hold from some test on, as long as the servers do.
    memory: Path

    def __post_init__(self) -> None:
        if self.memory.exists():
            self.settings.update(json.loads(self.memory.read_text()))

    def remember(self, settings: Mapping[str, str]) -> None:
        """Let settings hold from here on, as if they had been written into the inventory."""
        self.settings.update(settings)
        self.memory.write_text(json.dumps(self.settings))

    # As root on the database server

    def psql(self, statement: str, database: str = APP) -> str:
        """Run SQL as PostgreSQL's superuser and return the bare values."""
        # On standard input, because that is where it may contain anything.
        result = subprocess.run(
            ["podman", "exec", "-i", self.db.name, *self._psql(database)],
            input=statement,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def session(self, statements: str) -> Program:
        """Run SQL in a session that may last."""
        command = ["podman", "exec", self.db.name, *self._psql(APP), *("-c", statements)]
        return Program(command, PROJECT)

    @staticmethod
    def _psql(database: str) -> list[str]:
        return ["runuser", "-u", "postgres", "--", "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", database]

    def titles(self) -> set[str]:
        """Return the titles of all posts that the database has."""
        return set(self.psql("SELECT title FROM posts").splitlines())

    def schema(self) -> str:
        """Return all that defines the schema."""
        dump = f"runuser -u postgres -- pg_dump --schema-only {APP}"
        # A dump is protected with a random word, made anew each time.
        return self.db.sh(f"{dump} | grep -vE '^.(un)?restrict '")

    # As root on the application's server

    def database_url(self) -> str:
        """Return the URL that the release that serves has."""
        code = "from dotenv import dotenv_values; print(dotenv_values('.env')['DATABASE_URL'])"
        return self.app.sh(f'cd {ROOT}/current && .venv/bin/python -c "{code}"')

    def probe(self, *statements: str, url: str = "", encrypted: bool = True) -> list[str]:
        """Run statements from the application's server, as the application unless told otherwise; what came of each."""
        wanted = json.dumps([(url or self.database_url()).partition("?")[0], encrypted, statements])
        python = f"{ROOT}/current/.venv/bin/python"
        script = _PROBE.replace("{app}", APP)
        said: list[str] = json.loads(self.app.sh(f"{python} -c {shlex.quote(script)} {shlex.quote(wanted)}"))
        return said

    # What is known of the backups

    def backup_state(self, server: Server | None = None) -> dict[str, Any]:
        """Return what the server that makes them knows, or another one."""
        state: dict[str, Any] = json.loads((server or self.backups).sh(f"cat {STATE}"))
        return state

    def repository(self) -> str:
        """Return the directory that the backups are in."""
        return str(self.backup_state()["repository"]).partition(" ")[0]

    # As a client

    def post(self, title: str) -> None:
        """Write a post; has to succeed."""
        reply = self.app.request("POST", "/api/posts", {"title": title, "body": "-"})
        assert reply.status == 201, reply.body

    def readiness(self) -> int:
        """Return the status of the health check; 0 without an answer."""
        try:
            return self.app.request("GET", "/health/ready").status
        except (OSError, http.client.HTTPException):
            return 0

    def wait_until_archived(self, segment: str, seconds: float = 30) -> None:
        """Wait until a segment of WAL is in the archive."""
        query = f"SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver"
        wait_for(lambda: self.psql(query) == "t", seconds, f"{segment} is archived", every=0.5)

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Wait until the application can serve."""
        wait_for(lambda: self.readiness() == 200, seconds, "the application is ready")


class Writers:
    """Clients that write numbered posts, each as fast as it can, and remember what was acknowledged."""

    def __init__(self, site: Site, prefix: str, clients: int = 6) -> None:
        self._site, self._prefix = site, prefix
        self._stop = threading.Event()
        self._lock = threading.Lock()
        # When each was, as time.monotonic() has it.
        self.acknowledged: dict[str, float] = {}
        self.statuses: dict[int, int] = {}
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client finish what it is at."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def written(self) -> int:
        """Return how many posts have been acknowledged so far."""
        return len(self.acknowledged)

    def _write(self, number: int) -> None:
        client, count = Client(self._site.app, timeout=60), 0
        while not self._stop.is_set():
            title = f"{self._prefix}-{number}-{count}"
            count += 1
            try:
                status = client.request("POST", "/api/posts", {"title": title, "body": "-"}).status
            except (OSError, http.client.HTTPException):
                status = 0
                client.close()
            with self._lock:
                self.statuses[status] = self.statuses.get(status, 0) + 1
                if status == 201:
                    self.acknowledged[title] = time.monotonic()
            if status != 201:
                self._stop.wait(0.1)
        client.close()


def make_fleet(directory: Path) -> Site:
    """Return the environment that Molecule has made."""
    inventory = molecule_inventory()
    hosts = yaml.safe_load((SCENARIO / "inventory" / "hosts.yml").read_text())
    (app, _), (db, db_variables), (backup, _) = (
        next(iter(hosts[group]["hosts"].items())) for group in ("app", "db", "backup")
    )
    made = Site(
        inventories=[str(inventory), str(SCENARIO / "inventory")],
        app=Server(app, ca=inventory.parent / "pki" / "ca.crt"),
        db=Server(db),
        backups=Server(backup),
        address=db_variables["internal_address"],
        stranger=Server(SINGLE),
        memory=directory / "debian13.json",
    )
    made.app.refresh()
    return made


def make_single_server(directory: Path) -> Site:
    """Return the environment of the server that stands by itself, still to be deployed to."""
    single = make_single(directory)
    hosts = yaml.safe_load((SCENARIO / "inventory" / "hosts.yml").read_text())
    made = Site(
        inventories=[str(single)],
        app=Server(SINGLE, ca=single / "pki" / "ca.crt"),
        db=Server(SINGLE),
        backups=Server(SINGLE),
        address=address_of(SINGLE),
        stranger=Server(next(iter(hosts["db"]["hosts"]))),
        memory=directory / "debian12.json",
    )
    made.app.refresh()
    return made


def make_single(directory: Path) -> Path:
    """Make the environment of the single server as its operator would, and return its directory."""
    access, address = SCENARIO / "inventory" / ".ssh", address_of(SINGLE)
    return make_environment(
        directory / "single",
        SCENARIO,
        address,
        access / "key",
        access / "known_hosts",
        environment_db=address,
        environment_backup="",
    )


def address_of(name: str) -> str:
    """Return the address of a server of the scenario."""
    platforms = yaml.safe_load((SCENARIO / "molecule.yml").read_text())["platforms"]
    return next(str(platform["ip"]) for platform in platforms if platform["name"] == name)
