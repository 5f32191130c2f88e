"""What the database's version is, asked while somebody else migrates."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event

from app.schema_version import applied_revisions


def test_a_table_that_comes_in_the_middle_of_the_look(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    engine = create_engine(f"sqlite:///{path}")

    def migrate(_connection: Any) -> None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE alembic_version (version_num)")
            other.execute("INSERT INTO alembic_version VALUES ('0001')")

    # After the look has failed, and before it is asked why.
    event.listen(engine, "rollback", migrate, once=True)
    with engine.connect() as connection:
        assert applied_revisions(connection) == {"0001"}
    engine.dispose()
