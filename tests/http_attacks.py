"""Requests that nobody honest sends, as bytes: to see what a server lets through to the application behind it."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What stands in every forged value, so that it is found wherever it arrives.
EVIL_NAME, EVIL_NETWORK = "evil", "203.0.113."

# Headers by which proxies tell applications where a request comes from, and names that frameworks mistake for them.
FORGEABLE = [
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Port",
    "X-Forwarded-Prefix",
    "X-Forwarded-Protocol",
    "X-Forwarded-Scheme",
    "X-Forwarded-Server",
    "X-Forwarded-Ssl",
    "X-Real-IP",
    "X-Client-IP",
    "X-Cluster-Client-IP",
    "X-Host",
    "X-Scheme",
    "X-Original-URL",
    "X-Rewrite-URL",
    "True-Client-IP",
    "Forwarded",
    "Proxy",
    "X_Forwarded_For",
    "X_Forwarded_Proto",
    "X_Forwarded_Host",
    "SCRIPT_NAME",
    "REMOTE_ADDR",
]


@dataclass(frozen=True)
class Target:
    """Where to send requests, and the name to ask for."""

    address: str
    port: int
    name: str
    ca: Path

    def connect(self, timeout: float = 10) -> ssl.SSLSocket:
        """Return a connection on which HTTP/1.1 is spoken."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(["http/1.1"])
        plain = socket.create_connection((self.address, self.port), timeout)
        return context.wrap_socket(plain, server_hostname=self.name)

    def send(self, request: bytes, timeout: float = 10) -> tuple[int, bytes]:
        """Send bytes and return the status of the first answer, and all that came; 0 when there was none."""
        received = b""
        try:
            with self.connect(timeout) as connection:
                connection.sendall(request)
                while data := connection.recv(65_536):
                    received += data
        except OSError:  # closed, or silent
            pass
        parts = received.split(b" ", 2)
        return (int(parts[1]) if len(parts) == 3 and received.startswith(b"HTTP/1.") else 0), received


def forged_value(chance: random.Random, name: str) -> str:
    """Return something for a header to claim."""
    address = f"{EVIL_NETWORK}{chance.randrange(1, 255)}"
    if "proto" in name.lower() or "scheme" in name.lower():
        return chance.choice(["http", f"http, {EVIL_NAME}", f"{EVIL_NAME}", "https,http"])
    return chance.choice(
        [
            address,
            f"{address}, 127.0.0.1",
            f"127.0.0.1, {address}",
            f"for={address};host={EVIL_NAME}.example;proto=http",
            f"{EVIL_NAME}.example",
            f"{EVIL_NAME}.example:81",
            f"http://{EVIL_NAME}.example/",
            f"/{EVIL_NAME}",
        ]
    )


def host_lines(chance: random.Random, name: str) -> tuple[str, list[str]]:
    """Return the target of a request line for the path ``%s``, and Host lines, of which mostly one is a lie."""
    lie = f"{EVIL_NAME}.example"
    return chance.choice(
        [
            ("%s", [f"Host: {name}"]),
            ("%s", [f"host: {name.upper()}"]),
            ("%s", [f"Host: {name}:81"]),
            ("%s", [f"Host: {lie}"]),
            ("%s", [f"Host: {name}", f"Host: {lie}"]),
            ("%s", [f"Host: {lie}", f"Host: {name}"]),
            ("%s", [f"Host: {name}.{lie}"]),
            ("%s", [f"Host: {name}@{lie}"]),
            ("%s", [f"Host: {lie}#{name}"]),
            ("%s", [f" Host: {lie}", f"Host: {name}"]),
            ("%s", [f"Host: {name}", f"Host : {lie}"]),
            (f"https://{lie}%s", [f"Host: {name}"]),
            (f"http://{name}%s", [f"Host: {lie}"]),
            (f"https://{lie}%s", [f"Host: {lie}"]),
        ]
    )


def forgeries(name: str, path: str, count: int, seed: int) -> Iterator[bytes]:
    """Yield requests for `path` that lie about where they come from, and what they were asked for."""
    chance = random.Random(seed)  # noqa: S311 - to be the same each time
    for _ in range(count):
        target, lines = host_lines(chance, name)
        for header in chance.sample(FORGEABLE, chance.randrange(1, 9)):
            spelled = chance.choice([header, header.lower(), header.upper(), header.swapcase()])
            for _ in range(chance.choice([1, 1, 1, 2])):
                separator = chance.choice([": ", ":", ":\t", ": ", ": "])
                lines.insert(chance.randrange(len(lines) + 1), f"{spelled}{separator}{forged_value(chance, header)}")
        head = [f"GET {target % path} HTTP/1.1", *lines, "Connection: close", "", ""]
        yield "\r\n".join(head).encode()


# Two requests in one, for a front and an application that disagree about where the first ends; %s is the name.
_SECOND = "GET /smuggled HTTP/1.1\r\nHost: %s\r\n\r\n"
SMUGGLES = {
    "two lengths": "Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + _SECOND,
    "two lengths in one": "Content-Length: 0, 44\r\n\r\n" + _SECOND,
    "length and chunks": "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks and length": "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks in disguise": "Transfer-Encoding: xchunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks with a space": "Transfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks with a tab": "Transfer-Encoding:\tchunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunks in a list": "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + _SECOND,
    "length with a sign": "Content-Length: +4\r\n\r\n0\r\n\r\n" + _SECOND,
    "length in hexadecimal": "Content-Length: 0x4\r\n\r\n0\r\n\r\n" + _SECOND,
    "chunk size with a sign": "Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + _SECOND,
    "chunk size too large": "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n\r\n" + _SECOND,
    "a null byte": "X: a\0b\r\n\r\n" + _SECOND,
}


def smuggle(name: str, kind: str) -> bytes:
    """Return one of SMUGGLES as bytes. All of them are for a front to refuse, or to end at the first request."""
    head = f"POST / HTTP/1.1\r\nHost: {name}\r\n"
    return (head + SMUGGLES[kind].replace("%s", name)).encode()
