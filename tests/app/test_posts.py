from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import event
from starlette.testclient import TestClient

from app.database import Session
from app.models import Post
from tests.app.conftest import MakeClient

POSTS = "/api/posts"


def write(client: TestClient, title: str = "Title", body: str = "Body") -> dict[str, Any]:
    response = client.post(POSTS, json={"title": title, "body": body})
    assert response.status_code == 201, response.text
    post: dict[str, Any] = response.json()
    return post


def titles(client: TestClient) -> list[str]:
    return [post["title"] for post in client.get(POSTS).json()["items"]]


def test_created_post_is_where_location_says(client: TestClient) -> None:
    response = client.post(POSTS, json={"title": "  Grüße 🚀 ", "body": "line 1\nline 2"})
    assert response.status_code == 201
    assert client.get(response.headers["Location"]).json() == response.json()
    post = response.json()
    assert (post["title"], post["body"]) == ("Grüße 🚀", "line 1\nline 2")


def test_times_are_utc_and_update_moves_only_one(client: TestClient) -> None:
    post = write(client)
    assert post["created_at"] == post["updated_at"]
    created = datetime.fromisoformat(post["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)

    updated = client.put(f"{POSTS}/{post['id']}", json={"title": "New", "body": ""}).json()
    assert updated["created_at"] == post["created_at"]
    assert updated["updated_at"] > post["updated_at"]


def test_put_replaces_the_whole_post(client: TestClient) -> None:
    path = f"{POSTS}/{write(client)['id']}"
    response = client.put(path, json={"title": "New", "body": ""})
    assert response.status_code == 200
    assert (response.json()["title"], response.json()["body"]) == ("New", "")
    assert client.get(path).json() == response.json()
    assert client.put(path, json={"title": "Only half"}).status_code == 422
    assert client.get(path).json()["title"] == "New"


def test_deleted_post_is_gone_and_its_id_is_not_used_again(client: TestClient) -> None:
    post = write(client)
    path = f"{POSTS}/{post['id']}"
    response = client.delete(path)
    assert (response.status_code, response.content) == (204, b"")
    assert client.get(path).status_code == 404
    assert write(client)["id"] > post["id"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_unknown_post_is_a_problem_document(client: TestClient, method: str) -> None:
    body = {"title": "t", "body": "b"} if method == "PUT" else None
    response = client.request(method, f"{POSTS}/4711", json=body)
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["detail"] == "There is no such post."


def test_pages_neither_repeat_nor_lose_posts_while_others_are_written(client: TestClient) -> None:
    for number in range(7):
        write(client, str(number))
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get(POSTS, params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen += [post["title"] for post in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        write(client, "written meanwhile")
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]


def test_full_last_page_has_no_next(client: TestClient) -> None:
    for _ in range(4):
        write(client)
    cursor = client.get(POSTS, params={"limit": 2}).json()["next_cursor"]
    last = client.get(POSTS, params={"limit": 2, "cursor": cursor}).json()
    assert (len(last["items"]), last["next_cursor"]) == (2, None)


def test_cursor_works_in_every_process_with_the_same_key_and_only_there(
    sqlite_url: str, make_client: MakeClient
) -> None:
    first, same = make_client(sqlite_url), make_client(sqlite_url)
    other = make_client(sqlite_url, secret_key="x" * 32)
    for _ in range(2):
        write(first)
    params = {"limit": 1, "cursor": first.get(POSTS, params={"limit": 1}).json()["next_cursor"]}
    assert same.get(POSTS, params=params).json()["items"][0]["id"] == 1
    refused = other.get(POSTS, params=params)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["where"] == "query.cursor"


@pytest.mark.parametrize("cursor", ["", "x", "ü", "AAAAAAAAAAE=", "A" * 32, "A" * 65])
def test_invented_cursor_is_refused(sqlite_url: str, make_client: MakeClient, cursor: str) -> None:
    assert make_client(sqlite_url).get(POSTS, params={"cursor": cursor}).status_code == 422


@pytest.mark.parametrize("limit", ["0", "101", "-1", "many", ""])
def test_limit_is_bounded(sqlite_url: str, make_client: MakeClient, limit: str) -> None:
    assert make_client(sqlite_url).get(POSTS, params={"limit": limit}).status_code == 422


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"title": "", "body": "b"}', "body.title"),
        (b'{"title": "   ", "body": "b"}', "body.title"),
        (b'{"title": "two\\nlines", "body": "b"}', "body.title"),
        (b'{"title": "t", "body": "nul\\u0000"}', "body.body"),
        (b'{"title": "t", "body": "lone surrogate \\ud800"}', "body.body"),
        (b'{"title": "t", "body": "b", "\\ud800": 1}', "body"),
        (b'{"title": "t", "body": null}', "body.body"),
        (b'{"title": "t"}', "body.body"),
        (b'{"title": "t", "body": "b", "id": 1}', "body.id"),
        (b'{"title": 1, "body": "b"}', "body.title"),
        (b'{"title": "' + b"x" * 201 + b'", "body": "b"}', "body.title"),
        (b'{"title": "t", "body": "' + b"x" * 10_001 + b'"}', "body.body"),
        (b'{"title": ', "body.10"),
        (b"[]", "body"),
        (b"", "body"),
    ],
)
def test_bad_post_is_refused_by_field(client: TestClient, body: bytes, where: str) -> None:
    response = client.post(POSTS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"
    assert [error["where"] for error in response.json()["errors"]] == [where]
    assert titles(client) == []


def test_longest_post_is_kept(client: TestClient) -> None:
    # Each of these is two UTF-16 units, so 12 bytes when JSON escapes it.
    post = write(client, "\N{ROCKET}" * 200, "\N{ROCKET}" * 10_000)
    assert client.get(f"{POSTS}/{post['id']}").json()["body"] == "\N{ROCKET}" * 10_000


def test_huge_request_is_refused(sqlite_url: str, make_client: MakeClient) -> None:
    body = b'{"title": "t", "body": "' + b" " * 300_000 + b'"}'
    response = make_client(sqlite_url).post(POSTS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_refused_values_are_not_sent_back(sqlite_url: str, make_client: MakeClient) -> None:
    response = make_client(sqlite_url).post(POSTS, json={"title": ["hunter2"], "body": "b"})
    assert response.status_code == 422
    assert "hunter2" not in response.text


@pytest.mark.parametrize("post_id", ["0", "-1", "x", "9223372036854775808"])
def test_impossible_id_is_refused(client: TestClient, post_id: str) -> None:
    assert client.get(f"{POSTS}/{post_id}").status_code == 422


def test_other_errors_are_problem_documents_too(sqlite_url: str, make_client: MakeClient) -> None:
    client = make_client(sqlite_url)
    assert client.get("/nowhere").json()["status"] == 404
    response = client.patch(POSTS)
    assert (response.status_code, response.json()["status"]) == (405, 405)
    assert "GET" in response.headers["Allow"]


def test_error_after_a_write_undoes_it(client: TestClient) -> None:
    assert isinstance(client.app, FastAPI)

    @client.app.post("/half-way")
    async def half_way(session: Session, error: str) -> None:
        session.add(Post(title="half", body=""))
        await session.flush()
        if error == "expected":
            raise HTTPException(409)
        msg = "a bug"
        raise RuntimeError(msg)

    assert client.post("/half-way?error=expected").status_code == 409
    response = client.post("/half-way?error=bug")
    assert response.status_code == 500
    assert "a bug" not in response.text
    assert titles(client) == []


def test_failing_commit_is_an_error_and_not_a_promise(client: TestClient) -> None:
    assert isinstance(client.app, FastAPI)

    def fail(_connection: object) -> None:
        raise OSError

    engine = client.app.state.database.engine.sync_engine
    event.listen(engine, "commit", fail)
    response = client.post(POSTS, json={"title": "t", "body": "b"})
    event.remove(engine, "commit", fail)
    assert response.status_code == 503
    assert titles(client) == []


def test_many_writers_at_once_lose_nothing(database_url: str, make_client: MakeClient) -> None:
    # Two applications, as two slots, with several connections each.
    clients = [make_client(database_url), make_client(database_url)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(clients[number % 2], str(number)), range(80)))
    page = clients[0].get(POSTS, params={"limit": 100}).json()
    assert sorted(int(post["title"]) for post in page["items"]) == list(range(80))


def test_read_then_write_waits_for_another_writer(database_url: str, make_client: MakeClient) -> None:
    """What fails at once with SQLite's ordinary BEGIN: a transaction that reads, and writes after somebody else did."""
    client, other = make_client(database_url), make_client(database_url)
    assert isinstance(client.app, FastAPI)
    post_id = write(client, "0")["id"]

    @client.app.post("/count")
    async def count(session: Session) -> None:
        post = await session.get_one(Post, post_id, with_for_update=True)
        post.title = str(int(post.title) + 1)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: client.post("/count").status_code, range(40)))
    assert results == [200] * 40
    assert other.get(f"{POSTS}/{post_id}").json()["title"] == "40"
