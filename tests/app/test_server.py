"""The application under the servers that run it."""

from __future__ import annotations

import re
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.app.support import SECRET_KEY, run, server

GUNICORN = (
    "gunicorn",
    "--worker-class=uvicorn_worker.UvicornWorker",
    "--workers=2",
    "--bind=unix:SOCKET",
    "--graceful-timeout=10",
    "--no-control-socket",
    "app.asgi:app",
)
UVICORN = ("uvicorn", "app.asgi:app", "--uds", "SOCKET")


def test_gunicorn_with_two_workers_serves_and_finishes_what_it_began(
    project: Path, tmp_path: Path, database_url: str
) -> None:
    env = {"DATABASE_URL": database_url, "SECRET_KEY": SECRET_KEY, "HARDSTAND_RELEASE": "r1", "HARDSTAND_SLOT": "blue"}
    with server(project, tmp_path, *GUNICORN, **env) as gunicorn:
        client = gunicorn.client
        gunicorn.wait()
        assert client.get("/health/ready").json()["release"] == "r1"
        for number in range(20):
            assert client.post("/api/posts", json={"title": str(number), "body": ""}).status_code == 201
        assert len(set(re.findall(r"Booting worker with pid: (\d+)", gunicorn.log.read_text()))) == 2
        assert gunicorn.stop() == 0
    assert "Traceback" not in gunicorn.log.read_text()


def test_sigterm_lets_a_running_request_finish(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    env = {"DATABASE_URL": sqlite_url, "SECRET_KEY": SECRET_KEY}
    with server(project, tmp_path, *GUNICORN, **env) as gunicorn, ThreadPoolExecutor(1) as pool:
        gunicorn.wait()
        # The request runs for as long as this test holds SQLite's write lock.
        writer.execute("BEGIN IMMEDIATE")
        request = pool.submit(gunicorn.client.post, "/api/posts", json={"title": "t", "body": "b"})
        time.sleep(0.5)
        gunicorn.process.terminate()
        time.sleep(0.5)
        assert not request.done()
        writer.execute("COMMIT")
        assert request.result(timeout=10).status_code == 201
        assert gunicorn.process.wait(timeout=10) == 0
    assert writer.execute("SELECT title FROM posts").fetchall() == [("t",)]
    writer.close()


def test_uvicorn_alone_serves(project: Path, tmp_path: Path, sqlite_url: str) -> None:
    env = {"DATABASE_URL": sqlite_url, "SECRET_KEY": SECRET_KEY, "DEBUG": "true"}
    with server(project, tmp_path, *UVICORN, **env) as uvicorn:
        uvicorn.wait()
        assert uvicorn.client.get("/api/info").json()["release"] == "dev"
        assert uvicorn.client.get("/docs").status_code == 200
        assert uvicorn.stop() in (0, -15)
    log = uvicorn.log.read_text()
    assert "SECRET_KEY=**********" in log
    assert SECRET_KEY not in log


def test_example_settings_work_as_they_are(project: Path, tmp_path: Path) -> None:
    """The two commands of .env.example."""
    laptop = shutil.copytree(project, tmp_path / "laptop")
    shutil.copy(laptop / ".env.example", laptop / ".env")
    result = run(laptop, "alembic", "-c", "app/alembic.ini", "upgrade", "head")
    assert result.returncode == 0, result.stderr
    with server(laptop, tmp_path, *UVICORN) as uvicorn:
        uvicorn.wait()
        assert uvicorn.client.get("/health/ready").status_code == 200
        assert uvicorn.client.get("/api/info").json()["environment"] == "development"
