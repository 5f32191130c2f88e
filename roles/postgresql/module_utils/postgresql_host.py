"""Debian's PostgreSQL on this host: which cluster it is, SQL as its superuser, and password verifiers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import subprocess
import typing as t
from pathlib import Path

CONFIGURATION = Path("/etc/postgresql")
SOCKET_DIRECTORY = "/var/run/postgresql"
PORT = 5432
# PostgreSQL's own (SCRAM_SHA_256_DEFAULT_ITERATIONS) and its salt's length; RFC 7677 asks for no less.
ITERATIONS = 4096
SALT_BYTES = 16

# For every session: no statement of ours may reach the log with what it says about passwords.
QUIET = (
    "SET log_statement = 'none'; SET log_min_duration_statement = -1; SET log_min_error_statement = 'panic';"
    " SET client_min_messages = 'warning';"
)


class PostgresqlError(Exception):
    """PostgreSQL, or one of Debian's tools for it, says no; the text says why."""


class Cluster(t.NamedTuple):
    """One of Debian's clusters: a data directory with its server, named by version and name."""

    version: str
    name: str
    port: int
    running: bool
    data: Path

    @property
    def configuration(self) -> Path:
        """Directory of its configuration."""
        return CONFIGURATION / self.version / self.name

    @property
    def unit(self) -> str:
        """Its systemd unit."""
        return f"postgresql@{self.version}-{self.name}.service"

    def program(self, name: str) -> str:
        """Return the path of one of PostgreSQL's own programs of this version."""
        return f"/usr/lib/postgresql/{self.version}/bin/{name}"


def run(command: list[str], stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a directory that every account may read."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"}
    return subprocess.run(  # noqa: S603
        command, input=stdin, capture_output=True, text=True, check=False, cwd="/", env=environment, timeout=timeout
    )


def parse_clusters(listing: str) -> list[Cluster]:
    """Return the clusters that `pg_lsclusters --no-header` lists."""
    clusters = []
    for line in listing.splitlines():
        # version, name, port, status (may be "online,recovery"), owner, data directory, log file
        fields = line.split()
        if len(fields) >= 6:
            version, name, port, status, _, data = fields[:6]
            clusters.append(Cluster(version, name, int(port), status.startswith("online"), Path(data)))
    return clusters


def find_cluster() -> Cluster | None:
    """Return the cluster at port 5432, whichever version it is; None where PostgreSQL is not installed.

    After an upgrade of Debian the old version goes on serving at this port, with the data, until the operator moves
    it with pg_upgradecluster. The port, and not the newest version, says which one that is.

    Raises PostgresqlError where there are clusters and none has the port.
    """
    if not Path("/usr/bin/pg_lsclusters").exists():
        return None
    clusters = parse_clusters(run(["/usr/bin/pg_lsclusters", "--no-header"]).stdout)
    found = [cluster for cluster in clusters if cluster.port == PORT]
    if found:
        return found[0]
    if clusters:
        known = ", ".join(f"{cluster.version}/{cluster.name} at port {cluster.port}" for cluster in clusters)
        raise PostgresqlError(
            f"No cluster of PostgreSQL has port {PORT}; there is {known}. Give one of them the port"
            " (postgresql.conf), or drop what is not needed (pg_dropcluster)."
        )
    return None


def psql(sql: str, database: str = "postgres", timeout: float = 120) -> str:
    """Run SQL as the superuser `postgres` over the local socket and return its output. Stops at the first error.

    The SQL travels on standard input: an argument list can be read by everyone on the host.

    Raises PostgresqlError with what the server says; never with the statement.
    """
    command = [
        "psql",
        "--no-psqlrc",
        "--quiet",
        "--no-align",
        "--tuples-only",
        "--no-password",
        "--set=ON_ERROR_STOP=1",
    ]
    # Terse: without the piece of the statement that the error is about.
    command += [f"--host={SOCKET_DIRECTORY}", f"--port={PORT}", f"--dbname={database}", "--set=VERBOSITY=terse"]
    if os.geteuid() == 0:
        command = ["/usr/sbin/runuser", "--user", "postgres", "--", *command]
    done = run(command, f"{QUIET}\n{sql}\n", timeout)
    if done.returncode != 0:
        raise PostgresqlError(done.stderr.strip() or f"psql ended with code {done.returncode}")
    return done.stdout


def query(sql: str, database: str = "postgres") -> t.Any:
    """Return what a statement answers with, one JSON value."""
    return json.loads(psql(sql, database))


def identifier(name: str) -> str:
    """Return a name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL takes it, whatever standard_conforming_strings says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _keys(password: str, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return hashlib.sha256(client_key).digest(), hmac.digest(salted, b"Server Key", "sha256")


def scram_verifier(password: str, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    """Return what PostgreSQL stores for a password, so that the password itself need not be sent.

    RFC 5802 and 7677, in PostgreSQL's notation: SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>.

    Args:
        password: printable ASCII, to which SASLprep does nothing.
        salt: random unless given.
        iterations: of PBKDF2.

    Raises ValueError for another password.
    """
    if not (password.isascii() and password.isprintable()):
        raise ValueError("a password must consist of printable ASCII characters")
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    stored, server = (base64.b64encode(key).decode() for key in _keys(password, salt, iterations))
    return f"SCRAM-SHA-256${iterations}:{base64.b64encode(salt).decode()}${stored}:{server}"


def verifies(password: str, verifier: str) -> bool:
    """Tell whether a stored verifier is this password's. False for one that is empty or of another kind."""
    try:
        kind, parameters, _ = verifier.split("$")
        iterations, salt = parameters.split(":")
        if kind != "SCRAM-SHA-256":
            return False
        return hmac.compare_digest(verifier, scram_verifier(password, base64.b64decode(salt), int(iterations)))
    except ValueError:
        return False
