"""What Alembic runs for every command: connects with the application's settings and migrates.

- One at a time: on PostgreSQL an advisory lock, on SQLite the write lock, is held from before the current revision is
  read until all is done. Whoever comes second finds nothing left to do.
- All or nothing: on both databases every migration of a run is in one transaction.
- No queue behind us: a migration that has to wait for a table makes all later queries wait behind it. It gives up
  after DATABASE_LOCK_TIMEOUT seconds instead, and says who is in the way.
- No ghosts: PostgreSQL ends what a migration is doing soon after the migration's process has been killed.
- A database that is ahead of this code, because an older release is deployed again, is left as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from logging.config import fileConfig
from typing import Any, Literal

from alembic import command, context
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.database import DatabaseUnavailableError, make_engine, unavailable, writing
from app.models import Base, UtcDateTime
from app.schema_version import applied_revisions, lineage, lineage_table, write_lineage
from app.settings import Settings, load_or_exit

log = logging.getLogger("app.migrations")

# Any number, as long as nothing else in the database uses it.
ADVISORY_LOCK = 4_815_162_342
# Seconds. A migration may take long; one that waits for it should see the end.
ADVISORY_LOCK_WAIT = 600

# Who keeps a process from going on. Of other accounts' sessions PostgreSQL shows the times only to members of
# pg_read_all_stats, and of nobody's is the query asked for, which may hold what people wrote.
BLOCKERS = """
SELECT pid, usename, application_name, backend_type, state,
       round(extract(epoch FROM clock_timestamp() - xact_start)) AS seconds
FROM pg_stat_activity WHERE pid = ANY (pg_blocking_pids(:pid)) ORDER BY xact_start NULLS LAST LIMIT 5
"""


def run() -> None:
    """Run the command."""
    config = context.config
    # Used from Python, Alembic may have no ini file.
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    settings = load_or_exit()
    if context.is_offline_mode():
        show_sql(settings)
    else:
        asyncio.run(migrate(settings))


def show_sql(settings: Settings) -> None:
    """`--sql`: print what would run. To be read, not to be fed to a database: it takes no lock, writes no lineage."""
    # The whole URL and not only the dialect, but it goes nowhere: there is no connection.
    context.configure(url=settings.database.url, literal_binds=True, **options(settings))
    with context.begin_transaction():
        context.run_migrations()


async def migrate(settings: Settings) -> None:
    """Connect and run the command.

    The URL goes from the settings to the engine. It is never an option of Alembic's, whose parser of ini files would
    take a `%` in a password for its own.

    Raises:
        CommandError: the database is not there, refuses a statement, or somebody else holds a lock for too long.
    """
    engine = make_engine(settings, for_migrations=True)
    blockers: list[str] = []
    try:
        async with AsyncExitStack() as stack:
            with unavailable():
                connection = await stack.enter_async_context(writing(engine).connect())
            if not settings.database.is_sqlite:
                await prepare_postgresql(connection, settings)
                if destination() is not None:
                    pid = await connection.scalar(text("SELECT pg_backend_pid()"))
                    await connection.commit()
                    await stack.enter_async_context(watching(engine, pid, blockers))
            await connection.run_sync(run_command, settings)
    except DatabaseUnavailableError as error:
        # aiosqlite's thread reports to this loop once more when it could not open the file, and fails with a
        # traceback of its own if the loop has ended.
        await asyncio.sleep(0.1)
        msg = f"{error}; see DATABASE_URL"
        raise CommandError(msg) from None
    except DBAPIError as error:
        if not isinstance(error.orig, Exception) or not is_lock_timeout(error.orig):
            # One line of it: the second may hold what people wrote.
            reason = str(error.orig).partition("\n")[0]
            msg = f"the database refuses a statement: {reason}\nThe statement: {error.statement}"
            raise CommandError(msg) from None
        msg = (
            f"a lock was not granted within {settings.database_lock_timeout} s (DATABASE_LOCK_TIMEOUT), because "
            f"something else uses the database; nothing was changed, so try again. The statement: {error.statement}"
        )
        if blockers:
            msg += "\n".join(["\nIn its way:", *blockers])
            msg += "\nWait for it to end, or end it: SELECT pg_terminate_backend(<process>)"
        raise CommandError(msg) from None
    finally:
        await engine.dispose()


async def prepare_postgresql(connection: AsyncConnection, settings: Settings) -> None:
    """Become the only one who migrates, and limit how long a statement waits for a lock. Both end with the connection.

    The lock is tried again and again: waiting inside PostgreSQL would hold a snapshot, and a CREATE INDEX CONCURRENTLY
    of the one who has the lock would wait for that, for ever.
    """
    timeout = text("SELECT set_config('lock_timeout', :value, false)")
    await connection.execute(timeout, {"value": f"{settings.database_lock_timeout}s"})
    await connection.commit()
    # Otherwise the server would notice that nobody listens only when it has something to say, at a statement's end.
    with suppress(DBAPIError):  # older than 14, or on a system that cannot look
        await connection.execute(text("SELECT set_config('client_connection_check_interval', '5s', false)"))
    await connection.commit()
    if destination() is None:
        return
    deadline = time.monotonic() + ADVISORY_LOCK_WAIT
    waiting = False
    while not await connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ADVISORY_LOCK}):
        await connection.commit()
        if time.monotonic() > deadline:
            msg = f"another migration of this database has been running for more than {ADVISORY_LOCK_WAIT} s"
            raise CommandError(msg)
        if not waiting:
            log.info("Waiting for another migration of this database to end")
            waiting = True
        await asyncio.sleep(0.2)
    await connection.commit()


@asynccontextmanager
async def watching(engine: AsyncEngine, pid: int, blockers: list[str]) -> AsyncIterator[None]:
    """Note who is in the way of the migration, for as long as it runs: once it has given up, nobody is any more.

    Args:
        engine: for a connection beside the migration's.
        pid: the migration's process in PostgreSQL.
        blockers: is given a line for each that was in the way last.
    """
    watcher = asyncio.create_task(watch(engine, pid, blockers))
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait([watcher], timeout=5)


async def watch(engine: AsyncEngine, pid: int, blockers: list[str]) -> None:
    """See `watching`."""
    # Whatever is wrong with this connection, it is not what ends a migration.
    with suppress(DBAPIError, OSError):
        async with engine.connect() as connection:
            while True:
                rows = (await connection.execute(text(BLOCKERS), {"pid": pid})).all()
                await connection.rollback()
                if rows:
                    blockers[:] = [describe_blocker(*row) for row in rows]
                await asyncio.sleep(0.3)


def describe_blocker(pid: int, user: str | None, name: str, kind: str, state: str | None, seconds: Any) -> str:
    """One line about a session that is in the way."""
    parts = [f"process {pid}", f"application {name!r}" if name else "", f"user {user}" if user else ""]
    parts += [kind if kind and kind != "client backend" else "", state or ""]
    parts += [f"in a transaction for {int(seconds)} s" if seconds is not None else ""]
    return "  " + ", ".join(part for part in parts if part)


def run_command(connection: Connection, settings: Settings) -> None:
    """Run the command on an open connection."""
    script = ScriptDirectory.from_config(context.config)
    if is_upgrade() and is_ahead(connection, script):
        log.info("Nothing to do: the database is ahead of this code, which needs %s", ", ".join(script.get_heads()))
        return
    # The look at the database was a transaction; Alembic begins its own.
    connection.rollback()
    context.configure(connection=connection, **options(settings))
    with context.begin_transaction():
        context.run_migrations()
        if destination() is not None:
            heads = tuple(applied_revisions(connection))
            write_lineage(connection, [each.revision for each in script.iterate_revisions(heads, "base")])


def options(settings: Settings) -> dict[str, Any]:
    """Options that hold online and offline."""
    return {
        "target_metadata": Base.metadata,
        "compare_server_default": True,
        "include_name": include_name,
        "render_item": render_item,
        # SQLite can hardly alter a table; Alembic copies it instead.
        "render_as_batch": settings.database.is_sqlite,
        # SQLite can roll DDL back, contrary to what Alembic thinks, since app.database begins transactions itself.
        "transactional_ddl": True,
    }


def destination() -> Any:
    """The revision to go to (`()` is "none at all"), or None for a command that changes no schema."""
    with suppress(KeyError):
        return context.get_revision_argument() or ()
    return None


def is_upgrade() -> bool:
    """True for `upgrade`: the one command that an older release runs against a newer database."""
    called = getattr(context.config.cmd_opts, "cmd", None)
    return destination() is not None and (called is None or called[0] is command.upgrade)


def is_ahead(connection: Connection, script: ScriptDirectory) -> bool:
    """True when a newer release has migrated this database, on top of all that this code needs."""
    known = {each.revision for each in script.walk_revisions()}
    actual = applied_revisions(connection)
    return bool(actual - known) and set(script.get_heads()) <= lineage(connection)


def is_lock_timeout(error: Exception) -> bool:
    """True for a lock that was not granted in time, as PostgreSQL (lock_not_available) and SQLite say it."""
    return getattr(error, "sqlstate", None) == "55P03" or getattr(error, "sqlite_errorname", None) == "SQLITE_BUSY"


def include_name(name: str | None, type_: str, _parents: Any) -> bool:
    """Keep `--autogenerate` from dropping the table that is not part of the models."""
    return not (type_ == "table" and name == lineage_table.name)


def render_item(type_: str, item: Any, _context: Any) -> str | Literal[False]:
    """Write plain SQLAlchemy types into migrations: they have to work when the application's own have changed."""
    if type_ == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


run()
