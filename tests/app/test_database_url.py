from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from app.database_url import parse_database_url

BASE = Path("/project")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("sqlite:///app.db", "sqlite+aiosqlite:////project/app.db"),
        ("sqlite:////var/app.db", "sqlite+aiosqlite:////var/app.db"),
        ("sqlite+aiosqlite:////var/app.db", "sqlite+aiosqlite:////var/app.db"),
        ("sqlite+pysqlite:////var/app.db", "sqlite+aiosqlite:////var/app.db"),
        ("postgres://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql://u:p@h:5433/d", "postgresql+asyncpg://u:p@h:5433/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql://u@/d?host=/run/postgresql", "postgresql+asyncpg://u@/d?host=%2Frun%2Fpostgresql"),
        ("postgresql://u@/d?host=a:1&host=b:2", "postgresql+asyncpg://u@/d?host=a%3A1&host=b%3A2"),
    ],
)
def test_driver_is_the_async_one(raw: str, expected: str) -> None:
    assert parse_database_url(raw, BASE).url.render_as_string(hide_password=False) == expected


def test_percent_in_a_password_is_kept() -> None:
    assert parse_database_url("postgresql://u:p%25%2540%2Fx@h/d", BASE).url.password == "p%%40/x"


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require"])
def test_sslmode_becomes_asyncpg_s_ssl(mode: str) -> None:
    target = parse_database_url(f"postgresql://u:p@h/d?sslmode={mode}", BASE)
    assert target.connect_args == {"ssl": mode}
    assert not target.url.query


@pytest.mark.parametrize(
    ("query", "check_host"),
    [
        ("sslmode=verify-full", True),
        ("sslmode=verify-full&sslrootcert=system", True),
        ("sslmode=verify-ca", False),
        ("sslmode=require&sslrootcert=/etc/ssl/certs/ca-certificates.crt", False),
    ],
)
def test_verifying_sslmode_verifies(query: str, *, check_host: bool) -> None:
    context = parse_database_url(f"postgresql://u:p@h/d?{query}", BASE).connect_args["ssl"]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is check_host


def test_other_libpq_parameters_are_translated() -> None:
    target = parse_database_url("postgresql://u:p@h/d?connect_timeout=3&application_name=blog", BASE)
    assert target.connect_args == {"timeout": 3, "server_settings": {"application_name": "blog"}}


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "secret",
        "secret://",
        "mysql://u:secret@h/d",
        "postgresql://u:secret@h:secret/d",
        "postgresql://u:secret@h/d?sslmode=secret",
        "postgresql://u:secret@h/d?connect_timeout=secret",
        "postgresql://u:secret@h/d?channel_binding=secret",
        "postgresql://u:secret@h/d?sslmode=verify-full&sslrootcert=/secret",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:secret?mode=memory&uri=true",
    ],
)
def test_unusable_url_is_refused_without_being_shown(raw: str) -> None:
    with pytest.raises(ValueError, match=r"^(is not|must|has|names)") as caught:
        parse_database_url(raw, BASE)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
