"""The application's settings: one frozen object, read from the environment and from `.env` in the project root."""

from __future__ import annotations

import re
import socket
import sys
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import Field, SecretStr, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.database_url import DatabaseTarget, parse_database_url

PROJECT_ROOT = Path(__file__).resolve().parents[1]
ENV_FILE = PROJECT_ROOT / ".env"

# The one environment where placeholders are accepted.
DEVELOPMENT = "development"

# gunicorn stops, instead of starting a worker again and again, when a worker ends with this code (its
# WORKER_BOOT_ERROR). uvicorn uses the same one for an application that cannot start.
EXIT_CANNOT_START = 3

_PLACEHOLDER = re.compile(
    r"change.?me|replace.?(me|this)|placeholder|insert.?here|your.?(secret|password|key)|^(secret|password|example|todo)$",
    re.IGNORECASE,
)


class SettingsError(Exception):
    """A setting is missing or wrong. The message names each one and where to set it, and holds no value."""


class Settings(BaseSettings):
    """What an operator decides. Every field is set by the environment variable of the same name in upper case."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file_encoding="utf-8",
        # `SECRET_KEY=` is a forgotten value, not an empty one.
        env_ignore_empty=True,
        # .env may also hold what other programs read, and what an older or newer release reads.
        extra="ignore",
        hide_input_in_errors=True,
    )

    # Placeholders are judged by the environment, so it has to stand before the secrets.
    environment: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] = Field(
        default="production", description="Name of the environment. 'development' accepts placeholder secrets."
    )
    debug: bool = Field(
        default=False, description="Show tracebacks to clients, and log the settings, masked, at start."
    )
    database_url: SecretStr = Field(description="sqlite:///… or postgresql://…; a driver suffix is not needed.")
    secret_key: SecretStr = Field(description="Signs what clients hand back, such as paging cursors.")
    database_pool_size: int = Field(
        default=5, ge=1, le=100, description="Connections that each worker process may hold open; no more than these."
    )
    database_pool_timeout: int = Field(
        default=10, ge=1, le=60, description="Seconds that a request waits for one of these; then it is answered 503."
    )
    database_pool_recycle: int = Field(
        default=1800,
        ge=10,
        le=86400,
        description="Seconds after which a connection is replaced; fewer than a firewall leaves an idle one open.",
    )
    database_statement_timeout: int = Field(
        default=30, ge=1, le=3600, description="Seconds that a statement may take (PostgreSQL); not one of a migration."
    )
    database_lock_timeout: int = Field(
        default=5,
        ge=1,
        le=600,
        description="Seconds that a migration (PostgreSQL) or any write (SQLite) waits for a lock that others hold.",
    )
    hardstand_release: str = Field(default="dev", description="Release id, set by the server's process manager.")
    hardstand_slot: str = Field(default="-", description="blue or green, set by the server's process manager.")

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        target = parse_database_url(value.get_secret_value(), base=PROJECT_ROOT)
        if target.url.password:
            _refuse_placeholder(str(target.url.password), "has a password that", info)
        return value

    @field_validator("secret_key")
    @classmethod
    def _check_secret_key(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        secret = value.get_secret_value()
        _refuse_placeholder(secret, "", info)
        if len(secret) < 32:
            msg = "must have at least 32 characters"
            raise ValueError(msg)
        return value

    @classmethod
    def load(cls, env_file: Path | None = ENV_FILE) -> Self:
        """Read the environment and the `.env` file.

        Args:
            env_file: the file to read; one that does not exist is an empty one.

        Raises:
            SettingsError: a setting is missing or wrong, or the file cannot be read.
        """
        # A dict, because type checkers know the fields but not BaseSettings' own arguments.
        options: dict[str, Any] = {"_env_file": env_file}
        try:
            return cls(**options)
        except ValidationError as error:
            # `from None`: the original would print what was given.
            raise SettingsError(_explain(error, env_file)) from None
        except OSError as error:
            msg = f"The application cannot start: {env_file} cannot be read: {error.strerror}."
            raise SettingsError(msg) from None
        except UnicodeDecodeError:
            msg = f"The application cannot start: {env_file} is not UTF-8 text."
            raise SettingsError(msg) from None

    @cached_property
    def database(self) -> DatabaseTarget:
        """Where the database is, in the form that SQLAlchemy's async engine takes."""
        return parse_database_url(self.database_url.get_secret_value(), base=PROJECT_ROOT)

    @cached_property
    def host(self) -> str:
        """Name of the machine that answers."""
        return socket.gethostname()

    def summary(self) -> str:
        """All settings on one line, for a log: secrets and the database's password masked."""
        shown = {name: getattr(self, name) for name in type(self).model_fields}
        shown["database_url"] = self.database.url.render_as_string(hide_password=True)
        return " ".join(f"{name.upper()}={value}" for name, value in shown.items())


def load_or_exit() -> Settings:
    """`Settings.load()` for a process that is starting: an error is one readable message and exit code 3."""
    try:
        return Settings.load()
    except SettingsError as error:
        _exit(error)


def _exit(error: SettingsError) -> NoReturn:
    print(error, file=sys.stderr, flush=True)
    sys.exit(EXIT_CANNOT_START)


def _refuse_placeholder(secret: str, what: str, info: ValidationInfo) -> None:
    if info.data.get("environment") != DEVELOPMENT and _PLACEHOLDER.search(secret):
        msg = f"{what} is a placeholder, which only ENVIRONMENT={DEVELOPMENT} accepts".lstrip()
        raise ValueError(msg)


def _explain(error: ValidationError, env_file: Path | None) -> str:
    """One message for all that is wrong. Uses pydantic's messages but never its inputs, which may be secrets."""
    lines = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        name = str(problem["loc"][0]).upper()
        text = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"  {name}: {text[:1].lower()}{text[1:]}")
    count = "a setting is" if len(lines) == 1 else f"{len(lines)} settings are"
    where = f"Set it in {env_file}" if env_file else "Set it"
    return "\n".join(
        [
            f"The application cannot start: {count} missing or wrong.",
            *lines,
            f"{where} or in the process's environment; .env.example describes each one.",
        ]
    )
