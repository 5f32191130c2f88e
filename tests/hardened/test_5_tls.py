"""TLS as clients see it: protocols, key exchange, certificates."""

from __future__ import annotations

import socket
import ssl
import subprocess
from typing import Any

import pytest
from cryptography import x509

from tests.harness import DOMAIN, Server


@pytest.fixture
def front(site: Any) -> Server:
    """The server that clients reach."""
    found: Server = site.public
    return found


def shake(front: Server, version: ssl.TLSVersion, name: str = DOMAIN) -> str | None:
    """Return the protocol that is agreed on when the client speaks this one alone; None when there is no agreement."""
    context = ssl.create_default_context(cafile=str(front.ca))
    # This machine's own policy must not be what refuses.
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    try:
        with (
            socket.create_connection(("127.0.0.1", front.https_port), 10) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            return connection.version()
    except (ssl.SSLError, ConnectionResetError):
        return None


@pytest.mark.parametrize(
    ("version", "agreed"),
    [
        (ssl.TLSVersion.TLSv1_1, None),
        (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_protocols_are_the_guidelines(front: Server, version: ssl.TLSVersion, agreed: str | None) -> None:
    assert shake(front, version) == agreed


def test_no_certificate_is_shown_to_who_asks_for_another_name(front: Server) -> None:
    assert shake(front, ssl.TLSVersion.TLSv1_3, "other.test") is None


def test_key_exchange_is_post_quantum_where_openssl_knows_it(front: Server) -> None:
    version = tuple(map(int, front.sh("openssl version").split()[1].split(".")[:2]))
    # Asked from the server itself, whose OpenSSL is as new as nginx's.
    said = front.sh(f"echo | openssl s_client -connect 127.0.0.1:443 -servername {DOMAIN} -brief 2>&1 || true")
    assert ("X25519MLKEM768" in said) == (version >= (3, 5)), said


def test_the_list_of_revoked_certificates_can_be_had(front: Server) -> None:
    with socket.create_connection(("127.0.0.1", front.https_port), 10) as plain:
        context = ssl.create_default_context(cafile=str(front.ca))
        with context.wrap_socket(plain, server_hostname=DOMAIN) as connection:
            shown = connection.getpeercert(binary_form=True)
    assert shown
    points = x509.load_der_x509_certificate(shown).extensions.get_extension_for_class(x509.CRLDistributionPoints)
    (name,) = next(iter(points.value)).full_name or []
    address, _, path = name.value.removeprefix("http://").partition("/")
    assert address == DOMAIN
    found = subprocess.run(
        ["curl", "-fsS", "-H", f"Host: {DOMAIN}", f"http://127.0.0.1:{front.http_port}/{path}"],
        capture_output=True,
        check=True,
    )
    revoked = x509.load_der_x509_crl(found.stdout)
    authority = x509.load_pem_x509_certificate(front.ca.read_bytes()).public_key()
    assert revoked.is_signature_valid(authority)  # type: ignore[arg-type]
