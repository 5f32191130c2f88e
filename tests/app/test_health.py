from __future__ import annotations

import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI

from tests.app.conftest import MakeClient
from tests.app.support import DATABASE_PASSWORD, PostgreSQL, alembic, eventually
from tests.app.test_migrations import HEAD, add_revision, fork

INSTANCE = {"release": "abc123-0f", "slot": "green", "host": socket.gethostname(), "environment": "production"}
NAMES = {"hardstand_release": "abc123-0f", "hardstand_slot": "green"}


def test_ready_names_who_answers(database_url: str, make_client: MakeClient) -> None:
    response = make_client(database_url, **NAMES).get("/health/ready")
    assert response.status_code == 200
    assert response.json() == INSTANCE | {"status": "ready", "detail": "schema current"}
    assert response.headers["Cache-Control"] == "no-store"


def test_live_needs_no_database(tmp_path: Path, make_client: MakeClient) -> None:
    client = make_client(f"postgresql://app:hunter2@/x?host={tmp_path}", **NAMES)
    response = client.get("/health/live")
    assert response.status_code == 200
    assert response.json() == INSTANCE | {"status": "live", "detail": ""}


def test_absent_database_is_not_ready(tmp_path: Path, make_client: MakeClient) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/app.db", f"postgresql://app:hunter2@/x?host={tmp_path}"):
        client = make_client(url)
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert response.json()["status"] == "not ready"
        assert "the database does not answer" in response.json()["detail"]
        assert "hunter2" not in response.text
        assert str(tmp_path) not in response.text
        assert client.get("/api/posts").status_code == 503


def test_wrong_password_and_wrong_name_are_not_ready(postgresql: PostgreSQL, make_client: MakeClient) -> None:
    for url in (f"postgresql://app:hunter2@/postgres?host={postgresql.directory}", postgresql.url("nowhere")):
        client = make_client(url)
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert "the database" in response.json()["detail"]
        assert "hunter2" not in response.text
        assert client.get("/api/posts").status_code == 503


def test_database_without_schema_is_not_ready(empty_url: str, make_client: MakeClient) -> None:
    response = make_client(empty_url).get("/health/ready")
    assert response.status_code == 503
    assert "run the migrations" in response.json()["detail"]


def test_schema_behind_is_not_ready(
    project: Path, tmp_path: Path, database_url: str, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = fork(project, tmp_path)
    add_revision(newer, "newer", "pass")
    monkeypatch.setattr("app.schema_version.required_revisions.__defaults__", (newer / "app/migrations/versions",))
    client = make_client(database_url)
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["detail"] == f"the schema is at {HEAD}, which does not include newer: run the migrations"
    # As the migration ends, the running release becomes ready.
    assert alembic(newer, database_url, "upgrade", "head").returncode == 0
    assert client.get("/health/ready").status_code == 200


def test_release_stays_ready_when_a_newer_one_migrates(
    project: Path, tmp_path: Path, database_url: str, make_client: MakeClient
) -> None:
    client = make_client(database_url)
    assert client.get("/health/ready").json()["detail"] == "schema current"
    newer = fork(project, tmp_path)
    add_revision(newer, "newer", 'op.add_column("posts", sa.Column("extra", sa.Text()))')
    add_revision(newer, "newest", "pass", follows="newer")
    assert alembic(newer, database_url, "upgrade", "head").returncode == 0
    response = client.get("/health/ready")
    assert (response.status_code, response.json()["detail"]) == (200, "schema ahead")
    assert client.post("/api/posts", json={"title": "t", "body": "b"}).status_code == 201


def test_schema_of_another_branch_is_not_ready(
    project: Path, tmp_path: Path, sqlite_url: str, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown revision alone does not make a database newer."""
    theirs, ours = fork(project, tmp_path / "1"), fork(project, tmp_path / "2")
    add_revision(theirs, "theirs", "pass")
    add_revision(ours, "ours", "pass")
    assert alembic(theirs, sqlite_url, "upgrade", "head").returncode == 0
    monkeypatch.setattr("app.schema_version.required_revisions.__defaults__", (ours / "app/migrations/versions",))
    response = make_client(sqlite_url).get("/health/ready")
    assert response.status_code == 503
    assert "the schema is at theirs, which does not include ours" in response.json()["detail"]


def test_recovers_when_the_database_comes_back(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    client = make_client(postgresql_url)
    assert client.get("/health/ready").status_code == 200
    postgresql.stop()
    try:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/api/posts").status_code == 503
        assert client.get("/health/live").status_code == 200
    finally:
        postgresql.start()
    assert client.get("/health/ready").status_code == 200
    assert client.get("/api/posts").status_code == 200


def test_restart_of_the_database_between_two_requests_goes_unnoticed(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    client = make_client(postgresql_url)
    assert client.get("/api/posts").status_code == 200
    postgresql.stop()
    postgresql.start()
    assert client.get("/api/posts").status_code == 200


def test_hanging_database_is_not_ready_in_time_and_takes_one_connection(
    postgresql: PostgreSQL, postgresql_url: str, make_client: MakeClient
) -> None:
    client = make_client(postgresql_url)
    assert isinstance(client.app, FastAPI)
    connections = client.app.state.database.engine.pool
    assert client.get("/health/ready").status_code == 200
    with postgresql.frozen(), ThreadPoolExecutor(10) as pool:
        begin = time.monotonic()
        pending = pool.map(lambda _: client.get("/health/ready"), range(10))
        time.sleep(1)
        assert connections.checkedout() == 1
        responses = list(pending)
        took = time.monotonic() - begin
    assert [response.status_code for response in responses] == [503] * 10
    assert "did not answer within 2 s" in responses[0].text
    # Nobody waits for the check to hang up.
    assert took < 3
    eventually(lambda: client.get("/health/ready").status_code == 200, "ready again", seconds=5)


def test_busy_writer_does_not_make_sqlite_unready(sqlite_url: str, make_client: MakeClient) -> None:
    client = make_client(sqlite_url)
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    assert client.get("/health/ready").status_code == 200
    assert client.get("/api/posts").status_code == 200
    assert time.monotonic() - begin < 1
    writer.close()


def test_locked_sqlite_answers_503_after_the_lock_timeout(sqlite_url: str, make_client: MakeClient) -> None:
    client = make_client(sqlite_url, database_lock_timeout=1)
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    response = client.post("/api/posts", json={"title": "t", "body": "b"})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    writer.close()
    assert client.post("/api/posts", json={"title": "t", "body": "b"}).status_code == 201


def test_password_is_not_in_any_answer(postgresql_url: str, make_client: MakeClient) -> None:
    client = make_client(postgresql_url, debug=True)
    for path in ("/health/ready", "/health/live", "/api/info", "/"):
        assert DATABASE_PASSWORD not in client.get(path).text
