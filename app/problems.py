"""Errors as RFC 9457 problem documents, the same shape for every status."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app.database import DatabaseUnavailableError

_log = logging.getLogger(__name__)

_MEDIA_TYPE = "application/problem+json"


class InvalidField(BaseModel):
    """One thing that is wrong with a request."""

    where: str
    message: str


class Problem(BaseModel):
    """An error, as clients see it."""

    title: str
    status: int
    detail: str
    errors: list[InvalidField] = []


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors, for the API's description."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        code: {"model": Problem, "description": HTTPStatus(code).phrase, "content": {_MEDIA_TYPE: schema}}
        for code in statuses
    }


def install(app: FastAPI) -> None:
    """Make the application answer every error with a problem document."""

    @app.exception_handler(HTTPException)
    async def _(_request: Request, error: HTTPException) -> Response:
        return _respond(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> Response:
        # Without pydantic's `input`: what was sent, perhaps a secret in the wrong place, is not sent back.
        errors = [
            InvalidField(where=".".join(str(part) for part in item["loc"]), message=item["msg"])
            for item in error.errors()
        ]
        return _respond(status.HTTP_422_UNPROCESSABLE_CONTENT, "The request is not valid.", errors=errors)

    @app.exception_handler(DatabaseUnavailableError)
    async def _(request: Request, error: DatabaseUnavailableError) -> Response:
        _log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error.__cause__)
        return _respond(
            status.HTTP_503_SERVICE_UNAVAILABLE,
            "The database does not answer. Try again.",
            headers={"Retry-After": "1"},
        )

    # The server logs the traceback.
    @app.exception_handler(Exception)
    async def _(_request: Request, _error: Exception) -> Response:
        return _respond(status.HTTP_500_INTERNAL_SERVER_ERROR, "Something went wrong here, not with the request.")


def _respond(code: int, detail: str, *, errors: list[InvalidField] | None = None, headers: Any = None) -> Response:
    problem = Problem(title=HTTPStatus(code).phrase, status=code, detail=detail, errors=errors or [])
    return Response(problem.model_dump_json(), status_code=code, headers=headers, media_type=_MEDIA_TYPE)
