from __future__ import annotations

import re
import socket

import pytest
from starlette.testclient import TestClient

from app.pages import STATIC
from tests.app.conftest import MakeClient


@pytest.fixture
def client(sqlite_url: str, make_client: MakeClient) -> TestClient:
    return make_client(sqlite_url, hardstand_release='1a"b<c', hardstand_slot="green")


def test_page_and_all_that_it_needs_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {link.partition("?")[0] for link in links} >= {"/static/app.js", "/static/app.css", "/docs"}
    for link in links:
        assert client.get(link).status_code in (200, 503), link


def test_static_files_are_asked_for_by_release(client: TestClient) -> None:
    """Else a browser combines the new page with a script that it has kept."""
    page = client.get("/").text
    assert "/static/app.js?v=1a%22b%3Cc" in page
    assert "{release}" not in page


def test_page_needs_nothing_inline_and_forbids_it(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page.text)


def test_script_makes_no_markup_of_what_people_write() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (STATIC / "app.js").read_text()
    )


def test_info_names_who_answers(client: TestClient) -> None:
    assert client.get("/api/info").json() == {
        "release": '1a"b<c',
        "slot": "green",
        "host": socket.gethostname(),
        "environment": "production",
    }


def test_head_is_answered(client: TestClient) -> None:
    response = client.head("/")
    assert (response.status_code, response.content) == (200, b"")


def test_api_description_is_served(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    description = client.get("/openapi.json").json()
    assert description["info"]["version"] == '1a"b<c'
    assert set(description["paths"]["/api/posts/{post_id}"]) == {"get", "put", "delete"}
