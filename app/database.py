"""The engine, the sessions, and the one dependency that owns a request's transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Connection, ExceptionContext, NullPool, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from app.settings import Settings

_log = logging.getLogger(__name__)

# Seconds. Well below the 60 that a request may take, with the other limits in the settings: a client gets an answer and
# not a closed connection.
_CONNECT_TIMEOUT = 5
# Seconds to say goodbye to a database that may be gone.
_CLOSE_TIMEOUT = 3

# SQLSTATEs, or classes of them, for which SQLAlchemy has no class of its own: lost connection, ended for being idle,
# refused login, no such database, no resources left, stopped by an operator; and of a transaction that succeeds when
# tried again: two that were in each other's way, a lock that was not granted in time.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_UNAVAILABLE = ("08", "25P", "28", "3D", "40", "53", "55P03", "57")

# A server that has become a standby goes on answering, but takes no rows.
_READ_ONLY = "25006"

# Methods that only read, and so do not have to wait for SQLite's one write lock.
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class DatabaseUnavailableError(Exception):
    """The database cannot be reached, or could not answer in time. The message holds no address and no secret."""


class Database:
    """The application's engine and session factories. Made when the application starts, closed when it stops."""

    def __init__(self, settings: Settings) -> None:
        self.engine = make_engine(
            settings,
            # Never more: preflight has counted them against what the server allows.
            pool_size=settings.database_pool_size,
            max_overflow=0,
            pool_timeout=settings.database_pool_timeout,
            pool_recycle=settings.database_pool_recycle,
            # A restart of the database between two requests goes unnoticed.
            pool_pre_ping=True,
        )
        self._read = async_sessionmaker(self.engine, expire_on_commit=False)
        self._write = async_sessionmaker(writing(self.engine), expire_on_commit=False)

    @asynccontextmanager
    async def session(self, *, write: bool) -> AsyncIterator[AsyncSession]:
        """A session inside a transaction: committed at the end of the block, rolled back if an exception leaves it.

        Raises:
            DatabaseUnavailableError: the database cannot be reached or does not answer.
        """
        make_session = self._write if write else self._read
        with unavailable():
            async with make_session.begin() as session:
                yield session

    async def close(self) -> None:
        """Close all connections. Ends in seconds, whether or not the database is still there to hear of it."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self.engine.dispose()
        except (TimeoutError, OSError, DBAPIError) as error:
            _log.warning("the database's connections could not be closed in order (%s)", type(error).__name__)


def make_engine(settings: Settings, *, for_migrations: bool = False, **options: Any) -> AsyncEngine:
    """Make an engine for the configured database.

    Args:
        settings: name the database.
        for_migrations: one connection without a pool and without a limit on how long a statement may take.
        **options: for SQLAlchemy's `create_async_engine`.
    """
    target = settings.database
    connect_args = dict(target.connect_args)
    if for_migrations:
        options["poolclass"] = NullPool
    if not target.is_sqlite:
        connect_args.setdefault("timeout", _CONNECT_TIMEOUT)
        # For whoever looks at pg_stat_activity and wonders.
        name = "migrations" if for_migrations else settings.hardstand_slot
        connect_args.setdefault("server_settings", {"application_name": f"{settings.hardstand_release} {name}"})
        if not for_migrations:
            connect_args["command_timeout"] = settings.database_statement_timeout
    engine = create_async_engine(
        target.url,
        connect_args=connect_args,
        # What people write belongs in the database, not in a traceback in the log.
        hide_parameters=not settings.debug,
        **options,
    )
    if target.is_sqlite:
        _configure_sqlite(engine, lock_timeout=settings.database_lock_timeout, foreign_keys=not for_migrations)
    else:
        event.listen(engine.sync_engine, "handle_error", _leave_standby)
    return engine


def writing(engine: AsyncEngine) -> AsyncEngine:
    """The same engine and pool, for transactions that write."""
    return engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")


def _leave_standby(context: ExceptionContext) -> None:
    """After a failover, give up the connections to the server that no longer takes rows: the next ones find the new."""
    if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        context.is_disconnect = True


def _configure_sqlite(engine: AsyncEngine, *, lock_timeout: int, foreign_keys: bool) -> None:
    """Make one SQLite file serve several processes: the workers of two slots, and a migration beside them.

    Foreign keys are off in migrations: Alembic changes a table by copying it, and dropping the original would delete
    the rows that refer to it.
    """

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {lock_timeout * 1000}")  # before WAL, which needs a lock itself
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # Left alone, Python's sqlite3 begins transactions late, and none for DDL: migrations would not be one.
        # A transaction that reads first and writes later fails at once, without waiting, when another has written in
        # between. One that means to write takes the lock first and waits for it.
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn the many ways in which a database is not there into `DatabaseUnavailableError`."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError, OSError) as error:
        if isinstance(error, DBAPIError) and not _is_unavailability(error):
            raise
        msg = f"the database does not answer ({_reason(error)})"
        raise DatabaseUnavailableError(msg) from error


def _is_unavailability(error: DBAPIError) -> bool:
    if sqlite_name := getattr(error.orig, "sqlite_errorname", None):
        # SQLITE_ERROR is a mistake in a statement; the others are about the file: locked, full, not there …
        return isinstance(error, OperationalError) and sqlite_name != "SQLITE_ERROR"
    sqlstate: str = getattr(error.orig, "sqlstate", None) or ""
    return (
        isinstance(error, OperationalError | InterfaceError)
        or error.connection_invalidated
        or sqlstate.startswith(_UNAVAILABLE)
    )


def _reason(error: Exception) -> str:
    """The kind of an error, and nothing of its text, in which the driver may name hosts and users."""
    driver_error = getattr(error, "orig", None) or error
    # On PostgreSQL, SQLAlchemy wraps the driver's error twice.
    driver_error = driver_error.__cause__ or driver_error
    return getattr(driver_error, "sqlite_errorname", None) or type(driver_error).__name__


async def _request_session(request: Request) -> AsyncIterator[AsyncSession]:
    database: Database = request.app.state.database
    async with database.session(write=request.method not in _READING_METHODS) as session:
        yield session


# `scope="function"`: the transaction ends before the response is sent. A client that reads 201 finds its post, and a
# commit that fails is an error and not a promise.
Session = Annotated[AsyncSession, Depends(_request_session, scope="function")]
