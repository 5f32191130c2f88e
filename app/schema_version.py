"""Which version the database's schema has, and whether this code can work with it.

Alembic keeps only the newest revision in the database. That is not enough while a release is rolled out: the old
release still serves after the new one has migrated, and meets a revision that it has never heard of. It may go on
only if that revision was built on top of the one it needs itself. So every migration also writes down the *lineage*:
all revisions that lead to the current one. A release can use a database

- that is exactly at the revision that the release brings (`current`), or
- whose lineage contains that revision (`ahead`: a newer release has added to it, and migrations only ever add).

A database that is behind, or on a branch that this release is not part of, is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, delete, insert, inspect, select

MIGRATIONS = Path(__file__).parent / "migrations"

# Neither table is part of the application's models; Alembic makes and fills the first, migrations/env.py the second.
_bookkeeping = MetaData()
_version = Table("alembic_version", _bookkeeping, Column("version_num", String(32), primary_key=True))
lineage_table = Table("alembic_lineage", _bookkeeping, Column("revision", String(32), primary_key=True))


class SchemaError(Exception):
    """The code cannot work with the database's schema. The message says which revisions are meant."""


def required_revisions(versions: Path = MIGRATIONS / "versions") -> frozenset[str]:
    """The newest revisions (Alembic's heads) among the migrations that this code brings; normally one.

    Read from the files' text. Asking Alembic would import it, a fifth of a second of every start of every worker
    that is needed for nothing else.
    """
    known: set[str] = set()
    followed: set[str] = set()
    for path in versions.glob("*.py"):
        for node in ast.parse(path.read_bytes()).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    pass
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    pass
                case _:
                    continue
            if name == "revision":
                known.add(ast.literal_eval(value))
            elif name == "down_revision":
                parents = ast.literal_eval(value)
                followed.update((parents,) if isinstance(parents, str) else parents or ())
    return frozenset(known - followed)


def check_schema(connection: Connection, required: frozenset[str]) -> str:
    """Compare the database with what the code needs.

    Args:
        connection: outside a transaction, or in one that may be rolled back.
        required: what `required_revisions` gave.

    Returns:
        `current` or `ahead`.

    Raises:
        SchemaError: the database is behind, or on another branch.
    """
    actual = applied_revisions(connection)
    if actual == required:
        return "current"
    if not actual:
        msg = "the database has no schema yet: run the migrations"
        raise SchemaError(msg)
    if required <= lineage(connection):
        return "ahead"
    msg = f"the schema is at {_listed(actual)}, which does not include {_listed(required)}: run the migrations"
    raise SchemaError(msg)


def applied_revisions(connection: Connection) -> frozenset[str]:
    """The database's own newest revisions; none if nothing has been migrated."""
    return _read(connection, _version)


def lineage(connection: Connection) -> frozenset[str]:
    """All revisions that the database's schema is made of."""
    return _read(connection, lineage_table)


def write_lineage(connection: Connection, revisions: Iterable[str]) -> None:
    """Write down all revisions that the schema is made of; in the transaction of the migration."""
    lineage_table.create(connection, checkfirst=True)
    connection.execute(delete(lineage_table))
    rows = [{"revision": revision} for revision in revisions]
    if rows:
        connection.execute(insert(lineage_table), rows)


def _read(connection: Connection, table: Table) -> frozenset[str]:
    column = table.columns[0]
    # A look first, where there may be no table, would make each of the frequent health checks ask twice.
    try:
        return frozenset(connection.scalars(select(column)))
    except Exception:
        connection.rollback()
        if not inspect(connection).has_table(table.name):
            return frozenset()
        connection.rollback()
        # It may have come in between: somebody else migrates. Whatever else was wrong is still wrong.
        return frozenset(connection.scalars(select(column)))


def _listed(revisions: frozenset[str]) -> str:
    return ", ".join(sorted(revisions)) or "nothing"
