"""Load on the service, from a process of its own, with every answer checked.

The process is cheap, because it shares the machine with the servers it asks: asyncio, TLS, HTTP/1.1 written by hand.
It stands for a number of clients, each with one keep-alive connection, that read and write in turn as fast as they are
answered, and for a few more whose every request takes long. Nothing is ever repeated: a request that fails, in
whatever way a client can see, is a failure. Only a connection that the server closes with notice (`Connection: close`),
or that is closed while no request is on it, is opened again in silence, as any client would.

`Load` starts and asks the process. Its answers are divided into windows, which `Load.mark` begins, and are about those
requests that *ended* in one; only who served is about those that *began* in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

# Failures that are told in full; more than these are only counted.
_TOLD = 500

# Seconds. nginx goes on for two on a connection that it has; more than that, and less than between two deploys.
_BOTH_ANSWER = 5


@dataclass(frozen=True)
class Target:
    """Where the load goes, and how much of it.

    Attributes:
        address: Where to connect to.
        port: Port of TLS there.
        domain: Name that the certificate must be for, and that requests are for.
        ca: Certificates that are trusted, a file.
        clients: Connections that ask without end.
        pause: Seconds a client waits after each answer.
        slow_clients: Connections whose requests take `slow_seconds`, evenly spread in time.
        slow_path: What these ask for. The answer has to be JSON that names `host` and `release`.
        slow_seconds: How long these take, at least.
        timeout: Seconds after which a request counts as failed.
    """

    address: str
    port: int
    domain: str
    ca: str
    clients: int = 8
    pause: float = 0
    slow_clients: int = 0
    slow_path: str = "/api/posts/slow?seconds=10"
    slow_seconds: float = 10
    timeout: float = 90


# As the tests see it ------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What the clients saw so far.

    Attributes:
        requests: Requests that ended, slow and failed ones among them.
        failed: How many of them failed.
        failures: The first 500 of these: `window`, `at` (wall clock), `request`, `kind`, `request_id`, `seconds`.
        windows: By name: `requests`, `failed`, `seconds`, `rate`, and of those that are not slow `p50`, `p99` and `max`
            in milliseconds.
        groups: The same of all windows whose names have their first word in common, by that word.
        served: By window, host and release: number of answers that told them.
        slow: Slow requests that were answered: `host`, `release`, `window`, `seconds`, and `spanned`, whether the host
            was cut over to another release before this answer came.
        reconnected: Connections opened again, by reason.
    """

    requests: int = 0
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    windows: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    served: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    slow: list[dict[str, Any]] = field(default_factory=list)
    reconnected: dict[str, int] = field(default_factory=dict)

    def releases(self, window: str | None = None) -> set[str]:
        """Return the releases that answered, in one window or at all."""
        parts = self.served.values() if window is None else [self.served.get(window, {})]
        return {release for hosts in parts for releases in hosts.values() for release in releases}

    def kinds(self) -> list[str]:
        """Return the failures as lines for a person."""
        return [
            f"[{failure['window']}] {failure['request']}: {failure['kind']} after {failure['seconds']:.2f} s"
            for failure in self.failures
        ]


class Load:
    """A running load generator. At the end of a `with` block it is stopped."""

    def __init__(self, target: Target) -> None:
        self._last: Report | None = None
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(target))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # Ctrl-C is for the tests, which then end this process through its pipe.
            start_new_session=True,
        )

    def mark(self, window: str) -> None:
        """Begin a window, or go on with one."""
        self._ask("mark", window)

    def report(self) -> Report:
        """Return what has been seen so far, or all of it after the end."""
        return self._last or Report(**self._ask("report"))

    def stop(self) -> Report:
        """Let the requests end that are under way, end the process and return what has been seen."""
        try:
            self._last = self._last or Report(**self._ask("stop"))
        finally:
            self.close()
        return self._last

    def close(self) -> None:
        """End the process, whatever it is doing."""
        assert self._process.stdin
        assert self._process.stdout
        # Without anybody to take commands from it ends by itself.
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, *command: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the load generator ended with {self._process.wait()}"
        told: dict[str, Any] = json.loads(answer)
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.close()


# In the process -----------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A request that did not get the answer it should have had."""

    def __init__(self, kind: str, request_id: str = "") -> None:
        super().__init__(kind)
        self.request_id = request_id


@dataclass(slots=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes
    request_id: str

    def json(self, status: int) -> dict[str, Any]:
        """Return the body of an answer that must have this status.

        Raises:
            FailedError: it has another, or it is not JSON.
        """
        if self.status != status:
            raise FailedError(f"status {self.status}", self.request_id)
        try:
            content: dict[str, Any] = json.loads(self.body)
        except ValueError:
            raise FailedError(f"not JSON: {self.body[:60]!r}", self.request_id) from None
        return content


class Connection(asyncio.Protocol):
    """One connection, with at most one request on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.since = 0.0
        self.usable = False
        self.closed_because = ""
        self._buffer = bytearray()
        self._waiter: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection that was made."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.usable = transport, True

    def data_received(self, data: bytes) -> None:
        """Take what came, and end the request when that was all of the answer."""
        self._buffer += data
        if self._waiter is None or self._waiter.done():
            # Nothing was asked; the next request will find out.
            return
        try:
            answer = self._parse()
        except FailedError as error:
            self._waiter.set_exception(error)
        else:
            if answer:
                self._waiter.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request that is under way, if there is one."""
        self.usable = False
        self.closed_because = self.closed_because or "closed while idle"
        if self._waiter and not self._waiter.done():
            part = f" after {len(self._buffer)} bytes of the answer" if self._buffer else ""
            self._waiter.set_exception(FailedError(f"connection closed{part} ({exc or 'end of file'})"))

    def _parse(self) -> Answer | None:
        """Return the answer if it is complete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self._buffer[: end + 2])
        headers = head.lower()
        request_id = _header(headers, b"x-request-id")
        length = _header(headers, b"content-length")
        if not length.isdecimal():
            raise FailedError("no Content-Length", request_id)
        size, total = end + 4 + int(length), len(self._buffer)
        if total < size:
            return None
        if total > size:
            raise FailedError("more than Content-Length", request_id)
        body = bytes(self._buffer[end + 4 :])
        self._buffer.clear()
        if _header(headers, b"connection") == "close":
            self.usable, self.closed_because = False, "announced"
        return Answer(int(head[9:12]), body, request_id)

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            FailedError: there is none, or none that is well-formed.
        """
        assert self.transport
        if self._buffer:
            raise FailedError("an answer without a request")
        loop = asyncio.get_running_loop()
        self._waiter, self.since = loop.create_future(), loop.time()
        self.transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def expire(self, before: float) -> None:
        """Fail the request that is under way if it began before a moment."""
        if self._waiter and not self._waiter.done() and self.since < before:
            self._waiter.set_exception(FailedError("no answer in time"))

    def close(self) -> None:
        """Close without ceremony."""
        self.usable = False
        if self.transport:
            self.transport.abort()


def _header(head: bytes, name: bytes) -> str:
    """Return a header's value from a head in lower case; empty when there is none."""
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        return ""
    start += len(name) + 3
    return head[start : head.index(b"\r\n", start)].strip().decode("latin-1")


class Window:
    """Requests that ended between two marks."""

    def __init__(self) -> None:
        self.milliseconds = array("d")
        self.requests = 0
        self.failed = 0
        self.seconds = 0.0
        self.served: dict[str, dict[str, int]] = {}

    def add(self, other: Window) -> None:
        """Count another window in; who served is not told for several."""
        self.milliseconds.extend(other.milliseconds)
        self.requests += other.requests
        self.failed += other.failed
        self.seconds += other.seconds

    def report(self) -> dict[str, float]:
        """Return the numbers."""
        ordered = sorted(self.milliseconds)

        def percentile(share: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 2) if ordered else 0.0

        return {
            "requests": self.requests,
            "failed": self.failed,
            "seconds": round(self.seconds, 1),
            "rate": round(self.requests / self.seconds) if self.seconds else 0,
            "p50": percentile(0.5),
            "p99": percentile(0.99),
            "max": percentile(1),
        }


class Generator:
    """All clients, and what they saw."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.tls = ssl.create_default_context(cafile=target.ca)
        self.tls.set_alpn_protocols(["http/1.1"])
        self.connections: set[Connection] = set()
        self.stopping = asyncio.Event()
        self.windows: dict[str, Window] = {}
        self.window = Window()
        # The one in which the request began whose answer is looked at.
        self.began = self.window
        self.name = ""
        self.since = time.monotonic()
        self.failures: list[dict[str, Any]] = []
        self.slow: list[dict[str, Any]] = []
        self.reconnected: dict[str, int] = {}
        # When each release was last heard of from each host, which one that was, and which one gave way when.
        self.heard: dict[tuple[str, str], float] = {}
        self.latest: dict[str, str] = {}
        self.gave_way: dict[tuple[str, str], list[float]] = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        """End the window that there is, and begin or continue another."""
        now = time.monotonic()
        self.window.seconds += now - self.since
        self.since, self.name = now, name
        self.window = self.windows.setdefault(name, Window())

    def report(self) -> dict[str, Any]:
        """Return what a `Report` is made of."""
        self.mark(self.name)
        windows = {name: window for name, window in self.windows.items() if window.requests}
        groups: dict[str, Window] = {}
        for name, window in windows.items():
            groups.setdefault(name.split()[0], Window()).add(window)
        return {
            "requests": sum(window.requests for window in windows.values()),
            "failed": sum(window.failed for window in windows.values()),
            "failures": self.failures,
            "windows": {name: window.report() for name, window in windows.items()},
            "groups": {name: window.report() for name, window in groups.items()},
            "served": {name: window.served for name, window in windows.items()},
            "slow": self.slow,
            "reconnected": self.reconnected,
        }

    def saw(self, host: str, release: str) -> None:
        """Note who answered."""
        now, before = time.monotonic(), self.latest.get(host, release)
        # For some seconds after a cut-over both answer, over connections of before and after it: that is one change.
        if before != release and now - self.heard.get((host, release), 0) > _BOTH_ANSWER:
            self.gave_way.setdefault((host, before), []).append(now)
        self.latest[host], self.heard[host, release] = release, now
        releases = self.began.served.setdefault(host, {})
        releases[release] = releases.get(release, 0) + 1

    def failure(self, request: str, error: FailedError, seconds: float) -> None:
        """Note a failed request."""
        self.window.requests += 1
        self.window.failed += 1
        if len(self.failures) < _TOLD:
            self.failures.append(
                {
                    "window": self.name,
                    "at": time.time(),
                    "request": request,
                    "kind": str(error),
                    "request_id": error.request_id,
                    "seconds": seconds,
                }
            )

    async def connect(self) -> Connection:
        """Open a connection.

        Raises:
            FailedError: that was not possible.
        """
        loop, target = asyncio.get_running_loop(), self.target
        try:
            _, made = await loop.create_connection(
                Connection,
                target.address,
                target.port,
                ssl=self.tls,
                server_hostname=target.domain,
                ssl_handshake_timeout=target.timeout,
            )
        except OSError as error:
            raise FailedError(f"cannot connect ({type(error).__name__}: {error})") from None
        return made

    def request(self, method: str, path: str, content: object = None) -> bytes:
        """Return a request as bytes."""
        body = b"" if content is None else json.dumps(content).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        return f"{method} {path} HTTP/1.1\r\nHost: {self.target.domain}\r\n{kind}\r\n".encode() + body

    async def client(self, requests: Iterator[tuple[str, bytes, Any]], pause: float, *, slow: bool = False) -> None:
        """Make one request after another, on one connection as long as it lasts."""
        connection: Connection | None = None
        for what, request, check in requests:
            if self.stopping.is_set():
                break
            start, began = time.monotonic(), self.window
            try:
                if connection is None or not connection.usable:
                    connection = await self._renew(connection)
                answer = await connection.ask(request)
                seconds = time.monotonic() - start
                self.began = began
                check(answer, start)
            except FailedError as error:
                self.failure(what, error, time.monotonic() - start)
                if connection:
                    self.connections.discard(connection)
                    connection.close()
                    connection = None
                # Enough to not spin where nothing can be reached.
                await asyncio.sleep(0.05)
            else:
                self.window.requests += 1
                if not slow:
                    self.window.milliseconds.append(seconds * 1000)
                if pause:
                    await asyncio.sleep(pause)
        if connection:
            connection.close()

    async def _renew(self, old: Connection | None) -> Connection:
        if old:
            self.connections.discard(old)
            self.reconnected[old.closed_because] = self.reconnected.get(old.closed_because, 0) + 1
            old.close()
        made = await self.connect()
        self.connections.add(made)
        return made

    def mixed(self, number: int) -> Iterator[tuple[str, bytes, Any]]:
        """Four reads to one write: who are you, and is what I wrote still there."""
        info = self.request("GET", "/api/info")
        mine: deque[tuple[int, str, str]] = deque(maxlen=20)
        run = f"{os.getpid()}-{number}"

        def told(answer: Answer, _start: float) -> None:
            who = answer.json(200)
            self.saw(str(who["host"]), str(who["release"]))

        for count in range(sys.maxsize):
            title, body = f"load {run}-{count}", f"{count} " * 30

            def same(
                answer: Answer, _start: float, status: int = 201, title: str = title, body: str = body.strip()
            ) -> None:
                post = answer.json(status)
                if post.get("title") != title or str(post.get("body")).strip() != body:
                    raise FailedError(f"another post came back: {post.get('title')!r}", answer.request_id)
                if status == 201:
                    mine.append((int(post["id"]), title, body))

            yield "POST /api/posts", self.request("POST", "/api/posts", {"title": title, "body": body}), same
            for step in range(4):
                if step % 2 and mine:
                    post_id, title, body = mine[count % len(mine)]
                    path = f"/api/posts/{post_id}"

                    def kept(answer: Answer, start: float, title: str = title, body: str = body) -> None:
                        same(answer, start, 200, title, body)

                    yield f"GET {path}", self.request("GET", path), kept
                else:
                    yield "GET /api/info", info, told

    def slow_ones(self) -> Iterator[tuple[str, bytes, Any]]:
        """Ask for what takes long."""
        request = self.request("GET", self.target.slow_path)

        def check(answer: Answer, start: float) -> None:
            who = answer.json(200)
            host, release, seconds = str(who["host"]), str(who["release"]), time.monotonic() - start
            if seconds < self.target.slow_seconds:
                raise FailedError(f"answered after {seconds:.1f} s already", answer.request_id)
            spanned = any(when > start for when in self.gave_way.get((host, release), []))
            self.slow.append(
                {"host": host, "release": release, "window": self.name, "seconds": seconds, "spanned": spanned}
            )

        while True:
            yield f"GET {self.target.slow_path}", request, check

    async def slow_client(self, number: int) -> None:
        """Be one of the slow clients, which begin one after another."""
        target = self.target
        try:
            async with asyncio.timeout(number * target.slow_seconds / target.slow_clients):
                await self.stopping.wait()
        except TimeoutError:
            await self.client(self.slow_ones(), 0, slow=True)

    async def watch(self) -> None:
        """Fail what takes too long."""
        while True:
            await asyncio.sleep(1)
            limit = asyncio.get_running_loop().time() - self.target.timeout
            for connection in self.connections:
                connection.expire(limit)

    async def run(self) -> None:
        """Take commands until one says stop, or whoever gives them is gone."""
        loop = asyncio.get_running_loop()
        watching = asyncio.create_task(self.watch())
        clients = [
            asyncio.create_task(self.client(self.mixed(number), self.target.pause))
            for number in range(self.target.clients)
        ]
        clients += [asyncio.create_task(self.slow_client(number)) for number in range(self.target.slow_clients)]
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command, *arguments = json.loads(line)
            if command == "stop":
                self.stopping.set()
                self.mark("end")
                await asyncio.gather(*clients)
                watching.cancel()
                print(json.dumps(self.report()), flush=True)
                return
            if command == "mark":
                self.mark(*arguments)
            print(json.dumps(self.report() if command == "report" else {}), flush=True)


def main() -> None:
    """Run the process: the target is the only argument, in JSON."""
    target = Target(**json.loads(sys.argv[1]))
    asyncio.run(Generator(target).run())


if __name__ == "__main__":
    main()
