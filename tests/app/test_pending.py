"""What role release asks of Alembic before it migrates: module_utils/release_alembic.py, with the application's own."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.app.support import PROJECT, SECRET_KEY, PostgreSQL, alembic, environment
from tests.app.test_migrations import HEAD, add_revision, fork

PROGRAM = PROJECT / "roles/release/module_utils/release_alembic.py"
MARK = runpy.run_path(str(PROGRAM))["MARK"]


def ask(project: Path, url: str, *options: str, upgrade: str = "head") -> dict[str, Any]:
    """Return what is pending; options are `sql` or `-`, and `run` or `-`."""
    env = environment(DATABASE_URL=url, SECRET_KEY=SECRET_KEY)
    command = [
        sys.executable,
        "-c",
        PROGRAM.read_text(),
        "script",
        *options,
        "-c",
        "app/alembic.ini",
        "upgrade",
        upgrade,
    ]
    result = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.split("\n") if line.startswith(MARK)]
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return found


def revisions(found: dict[str, Any]) -> list[str]:
    return [each["revision"] for each in found["pending"]]


def test_all_is_pending_for_an_empty_database_and_nothing_is_written(project: Path, empty_url: str) -> None:
    found = ask(project, empty_url, "-", "run")
    assert (found["current"], found["pending"][0]) == ([], {"revision": "0001", "message": "Create posts."})
    assert revisions(found)[-1] == HEAD
    assert "Running upgrade  -> 0001" in alembic(project, empty_url, "upgrade", "head").stderr


def test_nothing_is_pending_afterwards(project: Path, database_url: str) -> None:
    found = ask(project, database_url, "sql", "-")
    assert (found["current"], found["pending"]) == ([HEAD], [])


def test_what_comes_is_in_order_with_its_sql(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, postgresql_url: str
) -> None:
    changed = fork(project, tmp_path)
    add_revision(changed, "b1", 'op.add_column("posts", sa.Column("extra", sa.Text()))')
    add_revision(changed, "a2", 'op.drop_column("posts", "body")', follows="b1")
    found = ask(changed, postgresql_url, "sql", "run")
    assert revisions(found) == ["b1", "a2"]
    assert found["dialect"] == "postgresql"
    assert found["server"][0] >= 15
    (piece,) = found["scripts"]
    first, second = piece["text"].split("-- Running upgrade b1 -> a2")
    assert f"-- Running upgrade {HEAD} -> b1" in first
    assert "ALTER TABLE posts ADD COLUMN extra TEXT" in first
    assert "ALTER TABLE posts DROP COLUMN body" in second
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'posts' AND column_name = 'extra'"
    assert postgresql.fetch(postgresql_url.partition("@/")[2].partition("?")[0], columns) == [(0,)]
    # Only as far as the command goes.
    assert revisions(ask(changed, postgresql_url, "-", "-", upgrade="b1")) == ["b1"]
    found = ask(changed, postgresql_url, "sql", "-", upgrade="+1")
    assert revisions(found) == ["b1"]
    assert "a2" not in found["scripts"][0]["text"]


def test_a_migration_that_reads_the_database_has_no_sql_and_hides_no_other(
    project: Path, tmp_path: Path, postgresql_url: str
) -> None:
    changed = fork(project, tmp_path)
    add_revision(changed, "one", 'op.execute("SELECT 1")')
    add_revision(changed, "reads", 'op.get_bind().execute(sa.text("SELECT 2")).scalar_one()', follows="one")
    add_revision(changed, "three", 'op.execute("SELECT 3")', follows="reads")
    pieces = ask(changed, postgresql_url, "sql", "-")["scripts"]
    assert [piece.get("revision") for piece in pieces] == ["reads", None]
    assert pieces[0]["error"].startswith("AttributeError: ")
    assert "SELECT 1" in pieces[0]["text"]
    assert "SELECT 3" in pieces[1]["text"]
    assert "SELECT 1" not in pieces[1]["text"]


def test_older_code_has_nothing_to_migrate(project: Path, tmp_path: Path, database_url: str) -> None:
    newer = fork(project, tmp_path)
    add_revision(newer, "newer", "pass")
    assert alembic(newer, database_url, "upgrade", "head").returncode == 0
    found = ask(project, database_url, "sql", "run")
    assert (found["current"], found["unknown"], found["pending"]) == (["newer"], ["newer"], [])
    assert found.get("scripts", []) == []


def test_branches_and_their_merge(project: Path, tmp_path: Path, postgresql_url: str) -> None:
    changed = fork(project, tmp_path)
    add_revision(changed, "left", 'op.execute("SELECT 1")')
    add_revision(changed, "right", 'op.execute("SELECT 2")')
    assert alembic(changed, postgresql_url, "upgrade", "heads").returncode == 0
    versions = changed / "app/migrations/versions"
    (versions / "merge.py").write_text(
        'revision = "merge"\ndown_revision = ("left", "right")\n\n\ndef upgrade():\n    pass\n'
    )
    found = ask(changed, postgresql_url, "sql", "-")
    assert (sorted(found["current"]), revisions(found)) == (["left", "right"], ["merge"])
    # Alembic makes no SQL from more than one revision on.
    assert [piece.get("revision") for piece in found["scripts"]] == ["merge"]
