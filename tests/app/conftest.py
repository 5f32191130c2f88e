"""Databases to test against. What must hold for both kinds asks for `database_url`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from tests.app.support import PROJECT, PostgreSQL, alembic, make_settings

MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    # Not pytest's directories: they are closed to other users, and their names are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="pg-") as directory:
        server = PostgreSQL(Path(directory))
        server.create()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without the developer's .env, as on a server."""
    directory = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "app", directory / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / ".env.example", directory)
    return directory


@pytest.fixture(scope="session")
def migrated_sqlite(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("migrated") / "app.db"
    result = alembic(project, f"sqlite:///{file}", "upgrade", "head")
    assert result.returncode == 0, result.stderr
    return file


@pytest.fixture(scope="session")
def migrated_postgresql(project: Path, postgresql: PostgreSQL) -> str:
    name = postgresql.create_database()
    result = alembic(project, postgresql.url(name), "upgrade", "head")
    assert result.returncode == 0, result.stderr
    return name


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """A migrated, empty SQLite database."""
    return f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path)}"


@pytest.fixture
def postgresql_url(migrated_postgresql: str, postgresql: PostgreSQL) -> str:
    """A migrated, empty PostgreSQL database."""
    return postgresql.url(postgresql.create_database(template=migrated_postgresql))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated, empty database, of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without any schema, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.url(server.create_database())


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """Starts an application in this process; it is stopped at the end of the test."""
    running = []

    def make(database_url: str, **settings: Any) -> TestClient:
        client = TestClient(create_app(make_settings(database_url, **settings)), raise_server_exceptions=False)
        client.__enter__()
        running.append(client)
        return client

    yield make
    for client in running:
        client.__exit__()


@pytest.fixture
def client(database_url: str, make_client: MakeClient) -> TestClient:
    """An application with an empty database, of each kind in turn."""
    return make_client(database_url)
