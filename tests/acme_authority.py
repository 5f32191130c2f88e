"""An ACME authority for tests: Debian's pebble, with a resolver that knows the names of a test."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEBBLE = shutil.which("pebble")


class Resolver(socketserver.ThreadingUDPServer):
    """Answers questions for the IPv4 address of names that it knows. No other has one."""

    daemon_threads = True

    def __init__(self, address: str, names: Mapping[str, str]) -> None:
        """Listen at `address`, at a port of the kernel's choice. `names` to addresses; it may change meanwhile."""
        super().__init__((address, 0), _Question)
        self.names = names


class _Question(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, connection = self.request
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode().lower())
            at += 1 + length
        question, kind = data[12 : at + 5], struct.unpack("!H", data[at + 1 : at + 3])[0]
        assert isinstance(self.server, Resolver)
        address = self.server.names.get(".".join(labels))
        # RFC 1035, 4.1: one question comes back, with one answer or none. 3 is "no such name".
        found = address is not None and kind == 1
        header = data[:2] + struct.pack("!HHHHH", 0x8180 | (0 if address else 3), 1, int(found), 0, 0)
        answer = b""
        if found:
            answer = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + ipaddress.IPv4Address(address).packed
        connection.sendto(header + question + answer, self.client_address)


def free_port(address: str) -> int:
    """Return a TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Authority:
    """A pebble of a test's own, with an account of its own for everybody who asks."""

    def __init__(self, directory: Path, *, address: str = "127.0.0.1", http_port: int = 80) -> None:
        """Keep files in `directory`, listen at `address`, and ask at `http_port` of the names' addresses."""
        self.directory, self.address, self.http_port = directory, address, http_port
        self.names: dict[str, str] = {}
        self.refused: list[str] = []
        self.validity = 90 * 86_400
        self.eab: dict[str, str] = {}
        self.port, self.management_port = free_port(address), free_port(address)
        self.process: subprocess.Popen[bytes] | None = None
        self.resolver = Resolver(address, self.names)
        threading.Thread(target=self.resolver.serve_forever, daemon=True).start()
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file = directory / "directory.crt"
        self._make_certificate()

    @property
    def url(self) -> str:
        """The directory's URL."""
        return f"https://{self.address}:{self.port}/dir"

    def _make_certificate(self) -> None:
        """Make the certificate of the directory itself, which is not one that the authority gives."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "directory")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(self.address))]), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self.directory / "directory.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    def start(self) -> None:
        """Start it, and wait until it answers. A new pebble knows no accounts, and signs with a new root."""
        assert PEBBLE
        (self.directory / "pebble.json").write_text(
            json.dumps(
                {
                    "pebble": {
                        "listenAddress": f"{self.address}:{self.port}",
                        "managementListenAddress": f"{self.address}:{self.management_port}",
                        "certificate": str(self.ca_file),
                        "privateKey": str(self.directory / "directory.key"),
                        "httpPort": self.http_port,
                        "tlsPort": 5001,
                        "ocspResponderURL": "",
                        "externalAccountBindingRequired": bool(self.eab),
                        "externalAccountMACKeys": self.eab,
                        "domainBlocklist": self.refused,
                        "certificateValidityPeriod": self.validity,
                    }
                }
            )
        )
        with (self.directory / "pebble.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    PEBBLE,
                    "-config",
                    str(self.directory / "pebble.json"),
                    "-dnsserver",
                    f"{self.address}:{self.resolver.server_address[1]}",
                ],
                stdout=log,
                stderr=log,
                # Some of what it does at random, to make clients robust, would only make tests slow.
                env={**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"},
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                self.get(f"{self.port}/dir")
            except OSError:
                assert time.monotonic() < deadline, (self.directory / "pebble.log").read_text()
                time.sleep(0.05)
            else:
                return

    def get(self, rest: str) -> str:
        """Return what it answers at `rest` of its address."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with urllib.request.urlopen(f"https://{self.address}:{rest}", timeout=5, context=context) as answer:
            return str(answer.read().decode())

    def root(self) -> str:
        """Return the certificate (PEM) of the root that it signs with now."""
        return self.get(f"{self.management_port}/roots/0")

    def log(self) -> str:
        """Return what it has written."""
        return (self.directory / "pebble.log").read_text(errors="replace")

    def stop(self) -> None:
        """Stop it; what it knew is gone."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop everything."""
        self.stop()
        self.resolver.shutdown()
        self.resolver.server_close()
