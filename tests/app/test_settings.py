from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import PROJECT_ROOT, Settings, SettingsError
from tests.app.support import DATABASE_PASSWORD, PROJECT, SECRET_KEY, make_settings, run

SQLITE = "sqlite:////tmp/app.db"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def load(tmp_path: Path, **values: str) -> Settings:
    """Load an .env file with these values."""
    file = tmp_path / ".env"
    file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return Settings.load(file)


def failure(tmp_path: Path, **values: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, **values)
    return str(caught.value)


def test_example_is_complete_and_valid() -> None:
    settings = Settings.load(PROJECT / ".env.example")
    assert settings.debug
    assert settings.database.url.database == str(PROJECT / "hardstand.db")


def test_env_file_is_the_project_s_own(project: Path, tmp_path: Path) -> None:
    """Not the working directory's."""
    mine = shutil.copytree(project, tmp_path / "mine")
    (mine / ".env").write_text(f"DATABASE_URL=sqlite:///x.db\nSECRET_KEY={SECRET_KEY}\n")
    code = "from app.settings import Settings; print(Settings.load().database.url.database)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".env").write_text("DATABASE_URL=sqlite:///wrong.db\n")
    result = run(elsewhere, "timeit", "-n1", "-r1", code, PYTHONPATH=str(mine))
    assert result.stdout.splitlines()[0] == str(mine / "x.db"), result.stderr


def test_environment_wins_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_POOL_SIZE", "7")
    settings = load(tmp_path, DATABASE_URL=SQLITE, SECRET_KEY=SECRET_KEY, DATABASE_POOL_SIZE="3")
    assert settings.database_pool_size == 7


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    message = failure(tmp_path, SECRET_KEY="")
    assert "DATABASE_URL: is missing" in message
    assert "SECRET_KEY: is missing" in message
    assert str(tmp_path / ".env") in message


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"DEBUG": "hunter2"}, "DEBUG"),
        ({"ENVIRONMENT": "Hunter2!"}, "ENVIRONMENT"),
        ({"DATABASE_POOL_SIZE": "hunter2"}, "DATABASE_POOL_SIZE"),
        ({"DATABASE_POOL_SIZE": "0"}, "DATABASE_POOL_SIZE"),
        ({"DATABASE_LOCK_TIMEOUT": "soon"}, "DATABASE_LOCK_TIMEOUT"),
        ({"DATABASE_URL": "mysql://app:hunter2@db/x"}, "DATABASE_URL"),
        ({"DATABASE_URL": "hunter2"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://app:hunter2@db:port/x"}, "DATABASE_URL"),
        ({"SECRET_KEY": "hunter2"}, "SECRET_KEY"),
        ({"SECRET_KEY": "change-me-before-anybody-else-can-reach-this"}, "SECRET_KEY"),
        ({"SECRET_KEY": "CHANGEME" * 5}, "SECRET_KEY"),
        ({"DATABASE_URL": "postgresql://app:change-me@db/x"}, "DATABASE_URL"),
    ],
)
def test_wrong_value_is_named_and_not_shown(tmp_path: Path, values: dict[str, str], name: str) -> None:
    message = failure(tmp_path, **{"DATABASE_URL": SQLITE, "SECRET_KEY": SECRET_KEY} | values)
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:-1]] == [name]
    shown = values[name]
    assert "hunter2" not in message.lower()
    assert len(shown) < 8 or shown not in message


def test_placeholders_are_for_development_only(tmp_path: Path) -> None:
    values = {"DATABASE_URL": "postgresql://app:change-me@db/x", "SECRET_KEY": "change-me" * 4}
    assert load(tmp_path, ENVIRONMENT="development", **values)
    # Debugging on a server does not make it a laptop.
    message = failure(tmp_path, ENVIRONMENT="staging", DEBUG="true", **values)
    assert "DATABASE_URL" in message
    assert "SECRET_KEY" in message


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"SECRET_KEY=\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"\.env is not UTF-8"):
        Settings.load(file)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_settings(SQLITE).debug = True


def test_secrets_are_never_printed(tmp_path: Path) -> None:
    url = "postgresql://app:p4ssw0rd@db/x"
    settings = load(tmp_path, DATABASE_URL=url, SECRET_KEY=SECRET_KEY)
    for text in (
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        settings.summary(),
        repr(settings.database),
    ):
        assert SECRET_KEY not in text
        assert "p4ssw0rd" not in text
    assert "DATABASE_URL=postgresql+asyncpg://app:***@db/x" in settings.summary()
    assert "SECRET_KEY=**********" in settings.summary()


@pytest.mark.parametrize("debug", [True, False])
def test_summary_is_logged_when_debugging(sqlite_url: str, caplog: pytest.LogCaptureFixture, *, debug: bool) -> None:
    caplog.set_level(logging.INFO)
    with TestClient(create_app(make_settings(sqlite_url, debug=debug))):
        pass
    assert ("SECRET_KEY=**********" in caplog.text) is debug
    assert SECRET_KEY not in caplog.text


def encode(value: str) -> str:
    """Write a value as Hardstand writes .env files."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("${", "${__:-$}{")):
        value = value.replace(plain, escaped)
    return f'"{value}"'


@pytest.mark.parametrize(
    "secret", [DATABASE_PASSWORD * 2, "back\\slash\\n" * 4, "two\nlines\r\n" * 4, "$'`!{}" * 8, "é🚀" * 16]
)
def test_awkward_secrets_survive_the_env_file(tmp_path: Path, secret: str) -> None:
    settings = load(tmp_path, DATABASE_URL=SQLITE, SECRET_KEY=encode(secret))
    assert settings.secret_key.get_secret_value() == secret


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("uvicorn", "app.asgi:app", "--uds", "x.sock"), 3),
        (
            (
                "gunicorn",
                "-k",
                "uvicorn_worker.UvicornWorker",
                # With more of them, the second to fail may interrupt what gunicorn makes of the first: it exits with 1.
                "-w1",
                "-b",
                "unix:x.sock",
                "--no-control-socket",
                "app.asgi:app",
            ),
            3,
        ),
        (("alembic", "-c", "app/alembic.ini", "upgrade", "head"), 3),
    ],
)
def test_every_program_stops_with_the_same_readable_error(project: Path, command: tuple[Any, ...], code: int) -> None:
    result = run(project, *command, SECRET_KEY="hunter2-hunter2")
    assert result.returncode == code
    output = result.stdout + result.stderr
    assert "The application cannot start: 2 settings are missing or wrong.\n  DATABASE_URL: is missing\n" in output
    assert f"Set it in {project}/.env" in output
    assert "Traceback" not in output
    assert "hunter2" not in output


def test_relative_sqlite_file_belongs_to_the_project() -> None:
    assert make_settings("sqlite:///app.db").database.url.database == str(PROJECT_ROOT / "app.db")
