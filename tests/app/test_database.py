"""The application and a PostgreSQL that restarts, goes away, or grants no more than it must."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx2 as httpx
import pytest
from sqlalchemy import text

from app.database import Database, DatabaseUnavailableError
from tests.app.conftest import MakeClient
from tests.app.support import (
    DATABASE_PASSWORD,
    SECRET_KEY,
    PostgreSQL,
    alembic,
    eventually,
    make_settings,
    server,
)
from tests.app.test_migrations import add_revision, fork
from tests.app.test_server import GUNICORN

POST = {"title": "t", "body": "b"}


def name_of(url: str) -> str:
    """Return the database's name."""
    return url.partition("@/")[2].partition("?")[0]


@contextmanager
def table_locked(postgresql: PostgreSQL, name: str) -> Iterator[None]:
    """Whoever writes a post waits meanwhile."""
    loop = asyncio.new_event_loop()
    connection: asyncpg.Connection = loop.run_until_complete(postgresql.connect(name))
    loop.run_until_complete(connection.execute("BEGIN; LOCK TABLE posts IN SHARE MODE"))
    try:
        yield
    finally:
        connection.terminate()
        loop.run_until_complete(asyncio.sleep(0))  # in which the socket is closed
        loop.close()


def waiting(postgresql: PostgreSQL) -> bool:
    count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return postgresql.fetch("postgres", count) == [(1,)]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_post_that_a_restart_cuts_off_is_503_and_leaves_nothing(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient, mode: str
) -> None:
    client = make_client(postgresql_url)
    with table_locked(postgresql, name_of(postgresql_url)), ThreadPoolExecutor(1) as pool:
        request: Future[httpx.Response] = pool.submit(client.post, "/api/posts", json=POST)
        eventually(lambda: waiting(postgresql), "the request waits inside PostgreSQL")
        postgresql.stop(mode)
        try:
            assert request.result(timeout=15).status_code == 503
        finally:
            postgresql.start()
    assert client.get("/api/posts").json()["items"] == []
    assert client.post("/api/posts", json=POST).status_code == 201


def test_commit_that_a_restart_cuts_off_is_503(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    """The trigger is deferred: it runs, and waits, within COMMIT."""
    postgresql.execute(
        name_of(postgresql_url),
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON posts DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    client = make_client(postgresql_url)
    query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND state = 'active'"
    with ThreadPoolExecutor(1) as pool:
        request: Future[httpx.Response] = pool.submit(client.post, "/api/posts", json=POST)
        eventually(lambda: postgresql.fetch("postgres", query) == [(1,)], "COMMIT is under way")
        postgresql.stop()
        try:
            assert request.result(timeout=15).status_code == 503
        finally:
            postgresql.start()
    assert client.get("/api/posts").json()["items"] == []


def test_workers_live_through_a_restart_and_no_answer_is_500(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, postgresql_url: str
) -> None:
    """Numbered posts, one after the other, while PostgreSQL crashes and comes back: what got 201 is there."""
    env = {"DATABASE_URL": postgresql_url, "SECRET_KEY": SECRET_KEY}
    acknowledged, codes = [], set()
    with server(project, tmp_path, *GUNICORN, **env) as gunicorn:
        gunicorn.wait()
        number = 0

        def write(until: Any) -> None:
            nonlocal number
            while not until():
                number += 1
                response = gunicorn.client.post("/api/posts", json={"title": str(number), "body": ""})
                codes.add(response.status_code)
                if response.status_code == 201:
                    acknowledged.append(number)

        write(lambda: number == 50)
        with ThreadPoolExecutor(1) as pool:
            down = pool.submit(postgresql.stop)
            write(down.done)
            down.result()
            assert gunicorn.client.get("/health/ready").status_code == 503
            assert gunicorn.client.get("/health/live").status_code == 200
            up = pool.submit(postgresql.start)
            write(up.done)
            up.result()
        last = number
        eventually(lambda: gunicorn.client.get("/health/ready").status_code == 200, "ready again", seconds=5)
        write(lambda: number == last + 50)
        assert codes == {201, 503}
        assert acknowledged[-50:] == list(range(last + 1, last + 51))
        log = gunicorn.log.read_text()
        assert log.count("Booting worker") == 2, "the workers are the same"
        assert gunicorn.stop() == 0
    kept = {int(title) for (title,) in postgresql.fetch(name_of(postgresql_url), "SELECT title FROM posts")}
    assert set(acknowledged) <= kept


def test_stops_in_time_although_the_database_is_gone(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, postgresql_url: str
) -> None:
    env = {"DATABASE_URL": postgresql_url, "SECRET_KEY": SECRET_KEY}
    with server(project, tmp_path, *GUNICORN, **env) as gunicorn:
        gunicorn.wait()
        assert gunicorn.client.get("/api/posts").status_code == 200
        with postgresql.frozen():
            begin = time.monotonic()
            assert gunicorn.stop() == 0
            assert time.monotonic() - begin < 6
    log = gunicorn.log.read_text()
    assert "connections could not be closed in order (TimeoutError)" in log, log


def test_closes_in_time_although_the_database_hangs(postgresql: PostgreSQL, postgresql_url: str) -> None:
    async def close() -> None:
        database = Database(make_settings(postgresql_url))
        async with database.session(write=False) as session:
            await session.execute(text("SELECT 1"))
        with postgresql.frozen():
            async with asyncio.timeout(5):
                await database.close()

    asyncio.run(close())


def test_server_that_has_become_a_standby_is_left(postgresql_url: str) -> None:
    async def write(database: Database) -> None:
        async with database.session(write=True) as session:
            await session.execute(text("INSERT INTO posts SELECT 1, '', '', now(), now()"))

    async def fail_over() -> None:
        database = Database(make_settings(postgresql_url))
        async with database.session(write=False) as session:
            before = await session.scalar(text("SELECT pg_backend_pid()"))
            # As all is on a standby; for this connection alone.
            await session.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        with pytest.raises(DatabaseUnavailableError, match="ReadOnly"):
            await write(database)
        await write(database)
        async with database.session(write=False) as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) != before
        await database.close()

    asyncio.run(fail_over())


def test_waiting_for_a_connection_has_an_end(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    client = make_client(postgresql_url, database_pool_size=1, database_pool_timeout=1)
    with ThreadPoolExecutor(1) as pool, table_locked(postgresql, name_of(postgresql_url)):
        first: Future[httpx.Response] = pool.submit(client.post, "/api/posts", json=POST)
        eventually(lambda: waiting(postgresql), "one request has the one connection")
        begin = time.monotonic()
        assert client.get("/api/posts").status_code == 503
        assert time.monotonic() - begin < 3
        assert not first.done()
    assert first.result(timeout=15).status_code == 201


def test_statement_that_takes_too_long_is_503(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    client = make_client(postgresql_url, database_statement_timeout=1)
    with table_locked(postgresql, name_of(postgresql_url)):
        begin = time.monotonic()
        assert client.post("/api/posts", json=POST).status_code == 503
        assert time.monotonic() - begin < 10
    assert client.post("/api/posts", json=POST).status_code == 201


@pytest.mark.parametrize("limit", ["lock_timeout", "statement_timeout"])
def test_limit_of_the_server_is_503(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient, limit: str
) -> None:
    name = name_of(postgresql_url)
    postgresql.execute(name, f"ALTER DATABASE {name} SET {limit} = '500ms'")
    client = make_client(postgresql_url)
    with table_locked(postgresql, name):
        response = client.post("/api/posts", json=POST)
        assert (response.status_code, response.headers.get("Retry-After")) == (503, "1")
    assert client.post("/api/posts", json=POST).status_code == 201


def test_old_connections_are_replaced(postgresql_url: str) -> None:
    async def pids() -> list[Any]:
        database = Database(make_settings(postgresql_url, database_pool_recycle=10))
        assert database.engine.pool._recycle == 10
        database.engine.pool._recycle = 1  # seconds, fewer than the setting takes
        seen = []
        for _ in range(2):
            async with database.session(write=False) as session:
                seen.append(await session.scalar(text("SELECT pg_backend_pid()")))
            await asyncio.sleep(1.1)
        await database.close()
        return seen

    first, second = asyncio.run(pids())
    assert first != second


class LeastPrivilege:
    """A database as role postgresql makes it: one login owns and migrates, another reads and writes rows."""

    def __init__(self, postgresql: PostgreSQL) -> None:
        self.postgresql = postgresql
        self.name = name = postgresql.create_database()
        password = DATABASE_PASSWORD.replace("'", "''")
        postgresql.execute(
            "postgres",
            f"CREATE ROLE {name}_owner LOGIN PASSWORD '{password}'",
            f"CREATE ROLE {name} NOLOGIN",
            f"CREATE ROLE {name}_abc123 LOGIN PASSWORD '{password}' IN ROLE {name}",
            f"ALTER DATABASE {name} OWNER TO {name}_owner",
            f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
            f"GRANT CONNECT ON DATABASE {name} TO {name}",
        )
        postgresql.execute(
            name,
            f"ALTER SCHEMA public OWNER TO {name}_owner",
            "REVOKE ALL ON SCHEMA public FROM PUBLIC",
            f"GRANT USAGE ON SCHEMA public TO {name}",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {name}_owner GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {name}",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {name}_owner GRANT USAGE, SELECT ON SEQUENCES TO {name}",
        )
        self.owner_url = postgresql.url(name, user=f"{name}_owner")
        self.url = postgresql.url(name, user=f"{name}_abc123")


def test_needs_no_right_but_to_rows(
    project: Path, tmp_path: Path, postgresql: PostgreSQL, make_client: MakeClient
) -> None:
    database = LeastPrivilege(postgresql)
    client = make_client(database.url)
    assert client.get("/health/ready").status_code == 503
    result = alembic(project, database.owner_url, "upgrade", "head")
    assert result.returncode == 0, result.stderr
    assert client.get("/health/ready").json()["detail"] == "schema current"
    post = client.post("/api/posts", json=POST)
    assert post.status_code == 201
    assert client.put(post.headers["Location"], json=POST).status_code == 200
    assert len(client.get("/api/posts").json()["items"]) == 1
    assert client.delete(post.headers["Location"]).status_code == 204
    for statement in ("DROP TABLE posts", "ALTER TABLE posts ADD x int", "CREATE TABLE x ()", "TRUNCATE posts"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            postgresql.execute(database.name, statement, user=f"{database.name}_abc123")
    changed = fork(project, tmp_path)
    add_revision(changed, "next", 'op.add_column("posts", sa.Column("extra", sa.Text()))')
    assert alembic(changed, database.url, "upgrade", "head").returncode != 0
    assert alembic(changed, database.owner_url, "upgrade", "head").returncode == 0
    assert client.get("/health/ready").json()["detail"] == "schema ahead"
