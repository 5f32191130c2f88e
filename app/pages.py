"""The page at `/`, and what it shows about who answers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from app.schemas import Instance

STATIC = Path(__file__).parent / "static"

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


def make_router(release: str) -> APIRouter:
    """Make the routes of the page.

    Args:
        release: becomes part of the static files' URLs, so that no browser combines a new page with an old script.
    """
    router = APIRouter()
    page = (STATIC / "index.html").read_text("utf-8").replace("{release}", escape(quote(release, safe="")))

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS)

    @router.get("/api/info", tags=["health"])
    async def info(request: Request, response: Response) -> Instance:
        """Say which release, slot and host answer."""
        response.headers["Cache-Control"] = "no-store"
        instance: Instance = request.app.state.instance
        return instance

    return router
