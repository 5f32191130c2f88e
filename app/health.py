"""Whether this process lives, and whether it can serve."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response, status
from sqlalchemy.exc import SQLAlchemyError

from app.database import Database, DatabaseUnavailableError, unavailable
from app.schema_version import SchemaError, check_schema
from app.schemas import Instance

router = APIRouter(prefix="/health", tags=["health"])

_log = logging.getLogger(__name__)

# Seconds. Shorter than what load balancers commonly wait, so that they read a reason.
_CHECK_TIMEOUT = 2


class Health(Instance):
    """Who answers, and how it is."""

    status: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a check. `detail` holds no address and no secret: anybody may read it."""

    ready: bool
    detail: str


_TOO_SLOW = Verdict(ready=False, detail=f"the database did not answer within {_CHECK_TIMEOUT} s")


class Readiness:
    """Checks that the database answers and has a schema that this code can work with.

    Callers that ask while a check is running share it: however often somebody polls, and however slow the database
    is, this takes at most one connection.
    """

    def __init__(self, database: Database, required: frozenset[str]) -> None:
        self._database = database
        self._required = required
        self._running: asyncio.Task[Verdict] | None = None
        self._last: Verdict | None = None

    async def check(self) -> Verdict:
        """Check now; takes two seconds at most."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check())
        running = self._running
        # Not wait_for: it would cancel what others wait for, and then wait itself until the driver has hung up.
        done, _ = await asyncio.wait({running}, timeout=_CHECK_TIMEOUT)
        verdict = running.result() if done else _TOO_SLOW
        if verdict != self._last:
            _log.log(logging.INFO if verdict.ready else logging.WARNING, "readiness: %s", verdict.detail)
            self._last = verdict
        return verdict

    async def _check(self) -> Verdict:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                return Verdict(ready=True, detail=f"schema {await self._schema()}")
        except TimeoutError:
            return _TOO_SLOW
        except (DatabaseUnavailableError, SchemaError) as error:
            return Verdict(ready=False, detail=str(error))
        except SQLAlchemyError as error:
            return Verdict(ready=False, detail=f"the database refuses ({type(error).__name__})")

    async def _schema(self) -> str:
        with unavailable():
            async with self._database.engine.connect() as connection:
                return await connection.run_sync(check_schema, self._required)


@router.get("/live")
async def live(request: Request, response: Response) -> Health:
    """Say that this process runs. Does no I/O, so that a database that is away gets nothing restarted."""
    response.headers["Cache-Control"] = "no-store"
    return _health(request, "live")


@router.get("/ready", responses={503: {"model": Health, "description": "Cannot serve; `detail` says why."}})
async def ready(request: Request, response: Response) -> Health:
    """Say whether requests can be served: the database answers, and its schema is one that this release can use.

    A schema that is *ahead*, because a newer release has already migrated, is fine: see `app.schema_version`.
    """
    readiness: Readiness = request.app.state.readiness
    verdict = await readiness.check()
    response.headers["Cache-Control"] = "no-store"
    if verdict.ready:
        return _health(request, "ready", verdict.detail)
    response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    return _health(request, "not ready", verdict.detail)


def _health(request: Request, state: str, detail: str = "") -> Health:
    instance: Instance = request.app.state.instance
    return Health(**instance.model_dump(), status=state, detail=detail)
