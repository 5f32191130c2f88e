"""The load generator sees every way in which a service can fail its clients, and nothing else.

The service is played by a few lines that answer as the application would, and misbehave as they are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.load import Load, Report, Target

DOMAIN = "load.test"
# Seconds that the slow route of the service takes.
SLOW = 0.6


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that vouches for itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DOMAIN)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(DOMAIN)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


class Service:
    """A service whose every fifth answer is as bad as `fault` says."""

    def __init__(self) -> None:
        self.fault = ""
        self.release = "one"
        self.count = 0
        self.posts: dict[int, dict[str, object]] = {}
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = head.partition("Content-Length: ")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                method, path, _ = head.split(" ", 2)
                answer = self.application(method, path, body)
                if "slow" in path:
                    await asyncio.sleep(SLOW)
                await self.answer(writer, *answer)
        with contextlib.suppress(OSError):
            writer.close()

    def application(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, object]]:
        """Return status and content as the application would."""
        if method == "POST":
            number = len(self.posts) + 1
            self.posts[number] = {"id": number, **json.loads(body)}
            return 201, self.posts[number]
        if path.startswith("/api/posts/") and "slow" not in path:
            return 200, self.posts[int(path.rpartition("/")[2])]
        return 200, {"release": self.release, "host": "app1"}

    async def answer(self, writer: asyncio.StreamWriter, status: int, content: dict[str, object]) -> None:
        """Send an answer, perhaps a bad one."""
        self.count += 1
        fault = self.fault if self.count % 5 == 0 else ""
        if fault == "reset":
            writer.transport.abort()
            return
        if fault == "silence":
            return
        if fault == "status":
            status = 502
        if fault == "content":
            content = {**content, "title": "somebody else's"}
        body = b"<html>" if fault == "page" else json.dumps(content).encode()
        size = "" if fault == "no length" else f"Content-Length: {len(body)}\r\n"
        last = "Connection: close\r\n" if fault == "announced" else ""
        writer.write(f"HTTP/1.1 {status} X\r\nX-Request-ID: abc{self.count}\r\n{size}{last}\r\n".encode())
        writer.write(body[:-3] if fault == "truncated" else body)
        await writer.drain()
        if fault in ("truncated", "announced", "idle"):
            writer.close()


@pytest.fixture
def service(certificate: Path) -> Iterator[Service]:
    made, ready = Service(), threading.Event()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
        made.port = server.sockets[0].getsockname()[1]
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve_forever()

    main = loop.create_task(run())
    thread = threading.Thread(target=lambda: loop.run_until_complete(main))
    thread.start()
    assert ready.wait(10)
    yield made
    loop.call_soon_threadsafe(main.cancel)
    thread.join(10)
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


@contextmanager
def load(service: Service, certificate: Path, **options: float) -> Iterator[Load]:
    target = Target("127.0.0.1", service.port, DOMAIN, str(certificate), **{"clients": 2, "pause": 0.002, **options})  # type: ignore[arg-type]
    with Load(target) as running:
        yield running


def some(service: Service, certificate: Path, count: int = 40, **options: float) -> Report:
    """Return what clients saw of that many requests."""
    with load(service, certificate, **options) as running:
        deadline = time.monotonic() + 20
        while running.report().requests < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return running.report()


def test_a_good_service_has_no_failures(service: Service, certificate: Path) -> None:
    seen = some(service, certificate)
    assert seen.failed == 0
    assert seen.failures == []
    assert seen.reconnected == {}
    assert seen.releases() == {"one"}
    assert 0 < seen.windows["start"]["p50"] <= seen.windows["start"]["p99"] <= seen.windows["start"]["max"]
    # One write to four reads.
    assert len(service.posts) == pytest.approx(service.count / 5, abs=3)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("reset", "connection closed"),
        ("status", "status 502"),
        ("page", "not JSON"),
        ("no length", "no Content-Length"),
        ("truncated", "connection closed after"),
        ("silence", "no answer in time"),
    ],
)
def test_every_kind_of_failure_is_seen(service: Service, certificate: Path, fault: str, kind: str) -> None:
    service.fault = fault
    seen = some(service, certificate, 12, timeout=0.5)
    assert seen.failed > 0
    assert {failure["kind"][: len(kind)] for failure in seen.failures} == {kind}
    assert seen.requests > seen.failed, "it goes on after a failure"
    assert seen.failed == len(seen.failures) == sum(window["failed"] for window in seen.windows.values())
    if fault == "status":
        assert all(failure["request_id"].startswith("abc") for failure in seen.failures)


def test_another_posts_content_is_a_failure(service: Service, certificate: Path) -> None:
    service.fault = "content"
    seen = some(service, certificate, clients=1)
    # It looks at posts alone; every fifth answer is to a post, here.
    assert seen.failed > 0
    assert all(failure["kind"].startswith("another post came back") for failure in seen.failures)


def test_a_connection_closed_with_notice_is_no_failure(service: Service, certificate: Path) -> None:
    service.fault = "announced"
    seen = some(service, certificate)
    assert seen.failed == 0
    assert set(seen.reconnected) == {"announced"}


def test_a_connection_closed_between_requests_is_told_apart(service: Service, certificate: Path) -> None:
    service.fault = "idle"
    seen = some(service, certificate, pause=0.1, clients=4)
    assert seen.failed == 0
    assert set(seen.reconnected) == {"closed while idle"}


def test_a_certificate_of_somebody_else_is_a_failure(service: Service) -> None:
    seen = some(service, Path("/etc/ssl/certs/ca-certificates.crt"), 3)
    assert seen.failed == seen.requests
    assert "CERTIFICATE_VERIFY_FAILED" in seen.failures[0]["kind"]


def test_windows_tell_who_served_when(service: Service, certificate: Path) -> None:
    with load(service, certificate) as running:
        time.sleep(0.3)
        running.mark("deploy 1")
        service.release = "two"
        time.sleep(0.3)
        running.mark("deploy 2")
        time.sleep(0.3)
    seen = running.report()
    assert seen.releases("start") == {"one"}
    assert "two" in seen.releases("deploy 1")
    assert set(seen.served["deploy 2"]["app1"]) == {"two"}
    both = seen.windows["deploy 1"]["requests"] + seen.windows["deploy 2"]["requests"]
    assert seen.groups["deploy"]["requests"] == both


def test_slow_requests_know_when_they_spanned_a_cut_over(service: Service, certificate: Path) -> None:
    with load(service, certificate, clients=1, slow_clients=1, slow_seconds=SLOW) as running:
        time.sleep(SLOW / 2)
        service.release = "two"
        time.sleep(SLOW)
    slow = running.report().slow
    assert [(one["release"], one["spanned"]) for one in slow[:2]] == [("one", True), ("two", False)]


def test_a_slow_request_that_is_answered_at_once_is_a_failure(service: Service, certificate: Path) -> None:
    with load(service, certificate, clients=0, slow_clients=1, slow_seconds=SLOW * 2) as running:
        time.sleep(SLOW * 1.5)
    assert "already" in running.report().failures[0]["kind"]
