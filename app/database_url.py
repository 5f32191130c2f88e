"""From the URL that people and providers write to the one that SQLAlchemy's async drivers take."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    # libpq's own spelling, which providers hand out and SQLAlchemy refuses.
    "postgres": "postgresql+asyncpg",
}

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

# Parameters that asyncpg takes under the same name. It fails at the first connection over any other, so those that
# are not translated below are refused at start.
_ASYNCPG_PARAMETERS = {"host", "port", "prepared_statement_cache_size"}


@dataclass(frozen=True, slots=True)
class DatabaseTarget:
    """A database: its URL with an async driver, and what the driver takes beside it."""

    url: URL
    connect_args: dict[str, Any] = field(default_factory=dict)

    @property
    def is_sqlite(self) -> bool:
        """True for SQLite, False for PostgreSQL."""
        return self.url.get_backend_name() == "sqlite"


def parse_database_url(raw: str, base: Path) -> DatabaseTarget:
    """Normalise a database URL.

    Any driver suffix is replaced by the async driver's; libpq's `sslmode`, `sslrootcert`, `connect_timeout` and
    `application_name` are translated to what asyncpg calls them.

    Args:
        raw: `sqlite:///file`, `postgresql://…` or `postgres://…`, with or without a driver suffix.
        base: directory that a relative SQLite path starts from, so that it does not depend on the working directory.

    Raises:
        ValueError: the URL cannot be used. The message holds no part of the URL that could be a secret.
    """
    try:
        url = make_url(raw)
    except (ArgumentError, ValueError):
        msg = "is not a database URL; it should look like sqlite:///app.db or postgresql://user:password@host/name"
        raise ValueError(msg) from None
    backend = url.drivername.partition("+")[0]
    if backend not in _DRIVERS:
        msg = "must begin with sqlite:// or postgresql://"
        raise ValueError(msg)
    url = url.set(drivername=_DRIVERS[backend])
    return _sqlite(url, base) if backend == "sqlite" else _postgresql(url)


def _sqlite(url: URL, base: Path) -> DatabaseTarget:
    path = url.database or ""
    if path in ("", ":memory:") or path.startswith("file:"):
        # Every worker process would have a database of its own, and the migrations yet another.
        msg = "must name a file, as in sqlite:///app.db: a database in memory cannot be shared by processes"
        raise ValueError(msg)
    return DatabaseTarget(url.set(database=str(base / path)))


def _postgresql(url: URL) -> DatabaseTarget:
    query = {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items()}
    connect_args: dict[str, Any] = {}

    mode = query.pop("sslmode", None) or query.pop("ssl", None)
    root = query.pop("sslrootcert", None)
    if mode is not None and mode not in _SSL_MODES:
        msg = f"has an sslmode that is not one of {', '.join(_SSL_MODES)}"
        raise ValueError(msg)
    if mode == "require" and root:
        mode = "verify-ca"  # as libpq does it
    if mode in ("verify-ca", "verify-full"):
        connect_args["ssl"] = _verifying_context(root, check_host=mode == "verify-full")
    elif mode:
        connect_args["ssl"] = mode

    if timeout := query.pop("connect_timeout", None):
        if not timeout.isdecimal():
            msg = "has a connect_timeout that is not a number of seconds"
            raise ValueError(msg)
        connect_args["timeout"] = int(timeout)
    if name := query.pop("application_name", None):
        connect_args["server_settings"] = {"application_name": name}

    unknown = sorted(query.keys() - _ASYNCPG_PARAMETERS)
    if unknown:
        msg = f"has parameters that the driver asyncpg does not take: {', '.join(unknown)}"
        raise ValueError(msg)
    # A host may be given more than once; so what stays comes from the original.
    kept = {name: value for name, value in url.query.items() if name in _ASYNCPG_PARAMETERS}
    return DatabaseTarget(url.set(query=kept), connect_args)


def _verifying_context(root: str | None, *, check_host: bool) -> ssl.SSLContext:
    """TLS that verifies the server, against `root` or else the system's certificate authorities."""
    try:
        context = ssl.create_default_context(cafile=None if root in (None, "system") else root)
    except (OSError, ssl.SSLError):
        msg = "names an sslrootcert that cannot be read as PEM certificates"
        raise ValueError(msg) from None
    context.check_hostname = check_host
    return context
