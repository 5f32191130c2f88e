from __future__ import annotations

import ast
import asyncio
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from app.schema_version import MIGRATIONS, required_revisions
from tests.app.conftest import MakeClient
from tests.app.support import DATABASE_PASSWORD, SECRET_KEY, PostgreSQL, alembic, environment, eventually

REVISION = """\
from alembic import op
import sqlalchemy as sa

revision = "{revision}"
down_revision = {follows}


def upgrade():
    {upgrade}


def downgrade():
    pass
"""

HEAD = next(iter(required_revisions()))


def fork(project: Path, tmp_path: Path) -> Path:
    """A copy of the project to which a test may add migrations: another release."""
    return shutil.copytree(project, tmp_path / "fork", dirs_exist_ok=True)


def add_revision(project: Path, revision: str, upgrade: str, follows: str | None = HEAD) -> None:
    text = REVISION.format(revision=revision, follows=repr(follows), upgrade=upgrade)
    (project / "app/migrations/versions" / f"{revision}.py").write_text(text)


def upgrade(project: Path, url: str, **env: str) -> str:
    """Upgrade, which must succeed; returns what it logged."""
    result = alembic(project, url, "upgrade", "head", **env)
    assert result.returncode == 0, result.stderr
    assert DATABASE_PASSWORD not in result.stdout + result.stderr
    return result.stderr


def test_upgrade_down_and_up_again(project: Path, empty_url: str, make_client: MakeClient) -> None:
    assert f"Running upgrade  -> {HEAD}" in upgrade(project, empty_url)
    assert "Running" not in upgrade(project, empty_url)
    assert make_client(empty_url).post("/api/posts", json={"title": "t", "body": "b"}).status_code == 201
    assert alembic(project, empty_url, "downgrade", "base").returncode == 0
    assert make_client(empty_url).get("/health/ready").status_code == 503
    upgrade(project, empty_url)
    assert make_client(empty_url).get("/api/posts").json()["items"] == []


def test_models_and_migrations_agree(project: Path, database_url: str) -> None:
    result = alembic(project, database_url, "check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_autogenerate_writes_a_migration_that_works(project: Path, tmp_path: Path, database_url: str) -> None:
    changed = fork(project, tmp_path)
    models = changed / "app/models.py"
    models.write_text(models.read_text() + "    read_at: Mapped[datetime | None] = mapped_column(UtcDateTime)\n")
    assert alembic(changed, database_url, "check").returncode != 0
    result = alembic(changed, database_url, "revision", "--autogenerate", "-m", "Count readers")
    assert result.returncode == 0, result.stderr
    (written,) = (changed / "app/migrations/versions").glob("*_count_readers.py")
    assert "sa.DateTime(timezone=True)" in written.read_text()
    assert "drop_table" not in written.read_text()
    upgrade(changed, database_url)
    assert alembic(changed, database_url, "check").returncode == 0


def test_commands_work_from_another_directory(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    command = [sys.executable, "-m", "alembic", "-c", str(project / "app/alembic.ini"), "current"]
    env = environment(DATABASE_URL=sqlite_url, SECRET_KEY=SECRET_KEY)
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert f"{HEAD} (head)" in result.stdout, result.stderr


def test_sql_can_be_looked_at_without_a_database(project: Path) -> None:
    result = alembic(project, "postgresql://app:hunter2@nowhere.invalid/x", "upgrade", "head", "--sql")
    assert "CREATE TABLE posts" in result.stdout, result.stderr
    assert "hunter2" not in result.stdout + result.stderr


def test_failed_migration_leaves_nothing(project: Path, tmp_path: Path, database_url: str) -> None:
    """Not even the migrations before it in the same run, on either database."""
    broken = fork(project, tmp_path)
    add_revision(broken, "good", 'op.add_column("posts", sa.Column("extra", sa.Text()))')
    add_revision(broken, "bad", 'op.execute("SELECT no_such_function()")', follows="good")
    result = alembic(broken, database_url, "upgrade", "head")
    assert result.returncode != 0
    assert "the database refuses a statement: " in result.stderr
    assert "The statement: SELECT no_such_function()" in result.stderr
    assert "Traceback" not in result.stderr
    assert f"{HEAD} (head)" in alembic(project, database_url, "current").stdout
    assert alembic(project, database_url, "check").returncode == 0


def test_older_code_leaves_a_newer_database_alone(project: Path, tmp_path: Path, database_url: str) -> None:
    newer = fork(project, tmp_path)
    add_revision(newer, "newer", 'op.add_column("posts", sa.Column("extra", sa.Text()))')
    upgrade(newer, database_url)
    assert "ahead of this code" in upgrade(project, database_url)
    assert "newer (head)" in alembic(newer, database_url, "current").stdout


def test_code_of_another_branch_is_not_taken_for_older(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    one, other = fork(project, tmp_path / "1"), fork(project, tmp_path / "2")
    add_revision(one, "one", "pass")
    add_revision(other, "other", "pass")
    upgrade(one, sqlite_url)
    result = alembic(other, sqlite_url, "upgrade", "head")
    assert result.returncode != 0
    assert "Can't locate revision identified by 'one'" in result.stderr


def test_two_at_once_on_postgresql_migrate_once(project: Path, tmp_path: Path, postgresql: PostgreSQL) -> None:
    """Among them what deadlocks with an ordinary wait for the lock: an index made concurrently."""
    slow = fork(project, tmp_path)
    add_revision(
        slow,
        "slow",
        'op.execute("SELECT pg_sleep(1)")\n'
        "    with op.get_context().autocommit_block():\n"
        '        op.execute("CREATE INDEX CONCURRENTLY ix_title ON posts (title)")',
    )
    env = environment(DATABASE_URL=postgresql.url(postgresql.create_database()), SECRET_KEY=SECRET_KEY)
    command = [sys.executable, "-m", "alembic", "-c", "app/alembic.ini", "upgrade", "head"]
    processes = [
        subprocess.Popen(command, cwd=slow, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(3)
    ]
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    assert sum("-> slow" in log for log in logs) == 1
    assert any("Waiting for another migration" in log for log in logs)


def test_two_at_once_on_sqlite_migrate_once(project: Path, tmp_path: Path) -> None:
    env = environment(DATABASE_URL=f"sqlite:///{tmp_path / 'app.db'}", SECRET_KEY=SECRET_KEY)
    command = [sys.executable, "-m", "alembic", "-c", "app/alembic.ini", "upgrade", "head"]
    processes = [
        subprocess.Popen(command, cwd=project, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(3)
    ]
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    assert sum("Running upgrade" in log for log in logs) == 1


def test_migration_does_not_queue_for_a_table(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, migrated_postgresql: str
) -> None:
    """A waiting ALTER TABLE makes every later query wait behind it."""
    name = postgresql.create_database(template=migrated_postgresql)
    changed = fork(project, tmp_path)
    add_revision(changed, "next", 'op.add_column("posts", sa.Column("extra", sa.Text()))')

    async def migrate_beside_a_reader() -> subprocess.CompletedProcess[str]:
        connection = await postgresql.connect(name)
        await connection.execute("SET application_name = 'a1b2-c3 blue'")
        async with connection.transaction():
            await connection.execute("SELECT 'hunter2' FROM posts")
            url = postgresql.url(name)
            begin = time.monotonic()
            result = await asyncio.to_thread(alembic, changed, url, "upgrade", "head", DATABASE_LOCK_TIMEOUT="1")
            assert time.monotonic() - begin < 10
            process = connection.get_server_pid()
        await connection.close()
        in_the_way = (
            f"process {process}, application 'a1b2-c3 blue', user app, idle in transaction, in a transaction for"
        )
        assert in_the_way in result.stderr
        assert "hunter2" not in result.stderr, "what it asked for"
        return result

    result = asyncio.run(migrate_beside_a_reader())
    assert result.returncode != 0
    assert "a lock was not granted within 1 s (DATABASE_LOCK_TIMEOUT)" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    upgrade(changed, postgresql.url(name))


def test_what_a_killed_migration_was_doing_ends(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, migrated_postgresql: str
) -> None:
    """Its locks would keep the release that serves away from the table."""
    url = postgresql.url(postgresql.create_database(template=migrated_postgresql))
    slow = fork(project, tmp_path)
    add_revision(slow, "slow", 'op.execute("LOCK TABLE posts"); op.execute("SELECT pg_sleep(300)")')
    command = [sys.executable, "-m", "alembic", "-c", "app/alembic.ini", "upgrade", "head"]
    env = environment(DATABASE_URL=url, SECRET_KEY=SECRET_KEY)
    process = subprocess.Popen(command, cwd=slow, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    count = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(300)%' AND state = 'active'"
    eventually(lambda: postgresql.fetch("postgres", count) == [(1,)], "it sleeps")
    process.kill()
    process.communicate()
    eventually(lambda: postgresql.fetch("postgres", count) == [(0,)], "PostgreSQL has noticed", seconds=10)


def test_sqlite_migration_waits_for_a_writer(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    changed = fork(project, tmp_path)
    add_revision(changed, "next", "pass")
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    result = alembic(changed, sqlite_url, "upgrade", "head", DATABASE_LOCK_TIMEOUT="1")
    assert result.returncode != 0
    assert "a lock was not granted within 1 s (DATABASE_LOCK_TIMEOUT)" in result.stderr
    assert "Traceback" not in result.stderr
    writer.execute("ROLLBACK")
    writer.close()
    upgrade(changed, sqlite_url)


def test_copying_a_table_on_sqlite_keeps_what_refers_to_it(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    file = sqlite_url.removeprefix("sqlite:///")
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO posts (title, body, created_at, updated_at) VALUES ('t', 'b', '', '')")
        database.execute("CREATE TABLE likes (post_id INTEGER REFERENCES posts (id) ON DELETE CASCADE)")
        database.execute("INSERT INTO likes SELECT id FROM posts")
    changed = fork(project, tmp_path)
    add_revision(
        changed,
        "copy",
        'with op.batch_alter_table("posts") as table:\n        table.alter_column("title", type_=sa.String(300))',
    )
    upgrade(changed, sqlite_url)
    assert database.execute("SELECT count(*) FROM likes").fetchone() == (1,)
    database.close()


def test_absent_database_is_one_readable_error(project: Path, tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/app.db", f"postgresql://app:hunter2@/x?host={tmp_path}"):
        result = alembic(project, url, "upgrade", "head")
        assert result.returncode != 0
        assert "the database does not answer" in result.stderr
        assert "DATABASE_URL" in result.stderr
        assert "Traceback" not in result.stderr
        assert "hunter2" not in result.stderr + result.stdout


def test_wrong_password_is_one_readable_error(project: Path, postgresql: PostgreSQL) -> None:
    result = alembic(project, f"postgresql://app:hunter2@/postgres?host={postgresql.directory}", "upgrade", "head")
    assert result.returncode != 0
    assert "InvalidPassword" in result.stderr
    assert "Traceback" not in result.stderr
    assert "hunter2" not in result.stderr + result.stdout


def test_constraints_have_predictable_names(postgresql: PostgreSQL, migrated_postgresql: str) -> None:
    async def names() -> list[str]:
        connection: asyncpg.Connection = await postgresql.connect(migrated_postgresql)
        try:
            rows = await connection.fetch(
                "SELECT conname FROM pg_constraint WHERE conrelid = 'posts'::regclass AND contype = 'p'"
            )
        finally:
            await connection.close()
        return [row["conname"] for row in rows]

    assert asyncio.run(names()) == ["pk_posts"]


def test_heads_read_from_text_are_alembic_s(project: Path, tmp_path: Path) -> None:
    changed = fork(project, tmp_path)
    add_revision(changed, "left", "pass")
    add_revision(changed, "right", "pass")
    (changed / "app/migrations/versions/merge.py").write_text(
        'revision: str = "merge"\ndown_revision: str | tuple[str, ...] | None = ("left", "right")\n'
    )
    add_revision(changed, "loose", "pass", follows="left")
    for directory in (MIGRATIONS, changed / "app/migrations"):
        config = Config()
        config.set_main_option("script_location", str(directory).replace("%", "%%"))
        assert required_revisions(directory / "versions") == set(ScriptDirectory.from_config(config).get_heads())


def test_there_is_one_head() -> None:
    assert len(required_revisions()) == 1


@pytest.mark.parametrize("path", sorted((MIGRATIONS / "versions").glob("*.py")), ids=lambda path: path.stem)
def test_migrations_do_not_use_the_application_s_code(path: Path) -> None:
    """It will have changed when they run again."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("app")
