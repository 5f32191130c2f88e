"""HTTP as hostile clients speak it, and headers as browsers get them."""

from __future__ import annotations

import json
import ssl
import threading
import time
from typing import Any

import pytest

from tests.harness import DOMAIN, Repository, Server, add_routes
from tests.http_attacks import EVIL_NAME, EVIL_NETWORK, SMUGGLES, Target, forgeries, smuggle

# Connections of slow clients, as slowhttptest counts them.
SLOW_CLIENTS = 1000

SECURITY_HEADERS = {
    "Strict-Transport-Security",
    "Content-Security-Policy",
    "X-Content-Type-Options",
    "X-Frame-Options",
    "Referrer-Policy",
    "Permissions-Policy",
    "Cross-Origin-Opener-Policy",
    "Cross-Origin-Resource-Policy",
}


@pytest.fixture
def front(site: Any) -> Server:
    """The server that clients reach."""
    found: Server = site.public
    return found


@pytest.fixture(scope="module")
def seen(site: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Deploy an application that tells what reaches it; returns the path at which it does."""
    repository = Repository(tmp_path_factory.mktemp("developer") / "repository")
    add_routes(repository)
    site.deploy(repository)
    return "/api/posts/seen"


@pytest.fixture
def target(front: Server) -> Target:
    return Target("127.0.0.1", front.https_port, DOMAIN, front.ca)


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/docs", 200), ("/static/app.js", 200), ("/static/.hidden", 404), ("/none", 404)]
)
def test_every_answer_has_each_security_header_once(front: Server, path: str, status: int) -> None:
    reply = front.request("GET", path)
    assert reply.status == status
    for name in SECURITY_HEADERS:
        assert len(reply.headers.get_all(name, [])) == 1, name
    assert reply.headers["Server"] == "nginx"


def test_the_applications_own_policy_is_what_browsers_get(front: Server) -> None:
    strict = front.request("GET", "/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in strict
    # FastAPI's page loads scripts from elsewhere, and has one in it.
    lax = front.request("GET", "/docs").headers["Content-Security-Policy"]
    assert "script-src" not in lax
    assert "default-src" not in lax


def test_refused_requests_have_the_headers_too(target: Target) -> None:
    request = f"POST /api/posts HTTP/1.1\r\nHost: {DOMAIN}\r\nContent-Length: 99999999\r\nConnection: close\r\n\r\n"
    status, answer = target.send(request.encode())
    assert status == 413
    for name in SECURITY_HEADERS:
        assert answer.lower().count(b"\r\n" + name.lower().encode() + b":") == 1, name


def test_an_unknown_name_gets_no_application(target: Target) -> None:
    status, answer = target.send(b"GET / HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n\r\n")
    assert status == 421
    assert b"Hardstand" not in answer


def test_no_forged_header_reaches_the_application(target: Target, seen: str) -> None:
    """1,000 requests that lie about address, name and scheme, in every way that anybody has thought of."""
    arrived = 0
    for request in forgeries(DOMAIN, seen, 1000, seed=7):
        status, answer = target.send(request)
        assert status in (200, 400, 421), (request, answer)
        if status == 200:
            arrived += 1
            body = answer.split(b"\r\n\r\n", 1)[1].decode()
            told = json.loads(body)
            assert EVIL_NAME not in body, (request, body)
            assert EVIL_NETWORK not in body, (request, body)
            assert told["scheme"] == told["headers"]["x-forwarded-proto"] == "https", (request, body)
            assert told["headers"]["host"].partition(":")[0] == DOMAIN, (request, body)
    assert arrived > 200, "nothing was tried"


@pytest.mark.parametrize("kind", SMUGGLES)
def test_a_request_inside_another_is_refused(target: Target, kind: str) -> None:
    status, answer = target.send(smuggle(DOMAIN, kind), timeout=5)
    assert status in (400, 501), answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.once(on="debian12")
def test_slow_clients_do_not_keep_others_waiting(front: Server, target: Target) -> None:
    """Each opens a connection and sends its request a line at a time."""
    slow: list[ssl.SSLSocket] = []
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(5):
            for connection in slow:
                try:
                    connection.sendall(b"X-More: 1\r\n")
                except OSError:
                    continue

    dripping = threading.Thread(target=drip)
    try:
        for _ in range(SLOW_CLIENTS):
            connection = target.connect()
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {DOMAIN}\r\n".encode())
            slow.append(connection)
        dripping.start()
        times = []
        for _ in range(200):
            begun = time.monotonic()
            assert front.request("GET", "/health/live").status == 200
            times.append(time.monotonic() - begun)
        assert sorted(times)[197] < 1, sorted(times)[-5:]
        # Nobody may take longer than nginx_client_timeout for the head of a request, however busy the line is.
        time.sleep(35 - min(30, sum(times)))
        slow[0].settimeout(5)
        try:
            closed = slow[0].recv(1) == b""
        except (ConnectionResetError, ssl.SSLEOFError):
            closed = True
        assert closed
    finally:
        stop.set()
        if dripping.is_alive():
            dripping.join()
        for connection in slow:
            connection.close()
