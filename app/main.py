"""Puts the application together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from app import health, pages, posts, problems
from app.database import Database
from app.health import Readiness
from app.paging import CursorSigner
from app.schema_version import required_revisions
from app.schemas import Instance
from app.settings import Settings

_log = logging.getLogger(__name__)

# Bytes. The longest post fits in, even with every character of it escaped.
_MAX_BODY_SIZE = 256 * 1024


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application. Connections are made when it starts and closed when it stops, not here.

    Args:
        settings: what to run with; by default what the environment and `.env` say.

    Raises:
        SettingsError: no settings were given, and those found are missing or wrong.
    """
    settings = settings or Settings.load()
    _configure_logging(debug=settings.debug)

    app = FastAPI(
        title="Hardstand",
        summary="Posts: a small service that is deployed without anybody noticing.",
        version=settings.hardstand_release,
        debug=settings.debug,
        lifespan=_lifespan,
        max_body_size=_MAX_BODY_SIZE,
    )
    app.state.settings = settings
    app.state.cursor_signer = CursorSigner(settings.secret_key.get_secret_value())
    app.state.instance = Instance(
        release=settings.hardstand_release,
        slot=settings.hardstand_slot,
        host=settings.host,
        environment=settings.environment,
    )
    problems.install(app)
    app.include_router(health.router)
    app.include_router(posts.router)
    app.include_router(pages.make_router(settings.hardstand_release))
    # On a server nginx answers these itself.
    app.mount("/static", StaticFiles(directory=pages.STATIC), name="static")
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    if settings.debug:
        _log.info("settings: %s", settings.summary())
    database = Database(settings)
    app.state.database = database
    app.state.readiness = Readiness(database, required_revisions())
    try:
        yield
    finally:
        await database.close()


def _configure_logging(*, debug: bool) -> None:
    """Let this package's messages reach standard error, unless whoever runs it has decided about them already."""
    logger = logging.getLogger("app")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
