"""TLS as clients see it: protocols, key exchange, certificates, and where these come from."""

from __future__ import annotations

import datetime
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID

from tests.hardened import guideline
from tests.hardened.authority import Authority
from tests.hardened.site import ELSEWHERE, SINGLE, Server, Site, make_server
from tests.harness import APP, DOMAIN, Repeated, wait_for

# Roles that have a hand in what is switched below.
ROLES = ("deploy.yml", "--tags", "firewall,certificate,nginx")
# Seconds that a certificate is valid. certbot renews one like that in the second half of its life.
SHORT = 80


@pytest.fixture
def front(site: Site) -> Server:
    """The server that clients reach."""
    return site.public


@pytest.fixture(scope="session")
def client() -> Server:
    """Somebody else's machine, with Debian 13's OpenSSL and curl."""
    return make_server(ELSEWHERE)


def certificate(front: Server) -> x509.Certificate:
    """Return what a client is shown, who verifies it."""
    context = ssl.create_default_context(cafile=str(front.ca))
    with (
        socket.create_connection(("127.0.0.1", front.https_port), 10) as plain,
        context.wrap_socket(plain, server_hostname=DOMAIN) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown)


def another_certificate(front: Server, before: x509.Certificate) -> x509.Certificate:
    """Return what clients are shown once it is another one: nginx takes a moment for a reload."""

    def other() -> x509.Certificate | None:
        try:
            shown = certificate(front)
        except ssl.SSLCertVerificationError:  # the one before has ended
            return None
        return shown if shown != before else None

    found: x509.Certificate = wait_for(other, 30, "clients are shown another certificate")
    return found


def responders(shown: x509.Certificate) -> list[x509.AccessDescription]:
    """Return where a certificate's authority answers whether it still counts (OCSP)."""
    try:
        access = shown.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    except x509.ExtensionNotFound:
        return []
    return [place for place in access if place.access_method == AuthorityInformationAccessOID.OCSP]


def check_guideline(site: Site, client: Server, policy: str) -> None:
    """Check that what the public server agrees to is what the guideline says, no less and no more."""
    front = site.public
    agreed = guideline.probe(client, front.address)
    openssl = tuple(map(int, front.sh("openssl version").split()[1].split(".")[:2]))
    assert agreed.versions == guideline.VERSIONS[policy]
    assert agreed.ciphers == guideline.CIPHERS[policy]
    assert agreed.ciphersuites == guideline.CIPHERSUITES
    # The post-quantum one came with OpenSSL 3.5, and is then what clients get who know it.
    post_quantum = {"X25519MLKEM768"} if openssl >= (3, 5) else set()
    assert agreed.curves == guideline.CURVES - {"X25519MLKEM768"} | post_quantum
    assert ("X25519MLKEM768" in agreed.usual) == bool(post_quantum)
    # server_preferred_order: false.
    first, second = agreed.chosen
    assert first != second

    shown = certificate(front)
    key = shown.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name in guideline.CERTIFICATE_CURVES
    assert shown.signature_hash_algorithm
    assert shown.signature_hash_algorithm.name in guideline.CERTIFICATE_HASHES
    lifetime = shown.not_valid_after_utc - shown.not_valid_before_utc
    # The private CA's begin an hour early.
    assert lifetime <= datetime.timedelta(days=guideline.CERTIFICATE_DAYS[policy], hours=1)
    # ocsp_staple: true, which is about certificates that name a responder; none does that we get or sign.
    assert not responders(shown)
    sent = front.request("GET", "/").headers["Strict-Transport-Security"]
    age = re.match(r"max-age=(\d+)", sent)
    assert age
    assert int(age[1]) >= guideline.HSTS_MIN_AGE


def test_what_is_agreed_on_is_the_guidelines(site: Site, client: Server) -> None:
    check_guideline(site, client, "intermediate")


def test_no_certificate_is_shown_to_who_asks_for_another_name(front: Server) -> None:
    context = ssl.create_default_context(cafile=str(front.ca))
    with (
        socket.create_connection(("127.0.0.1", front.https_port), 10) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)unrecognized"),
    ):
        context.wrap_socket(plain, server_hostname="other.test")


# The private CA's certificates alone name one.
@pytest.mark.once
def test_the_list_of_revoked_certificates_can_be_had(site: Site, front: Server) -> None:
    if SINGLE in site.servers:
        pytest.skip("The single server's certificate is from elsewhere.")
    points = certificate(front).extensions.get_extension_for_class(x509.CRLDistributionPoints)
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


# From here on with certificates of an authority, and the fleet with other settings as well -----------------------


@dataclass
class Switch:
    """Settings of an environment for a while; all of them in one deploy."""

    site: Site
    settings: dict[str, Any]
    done: bool = field(default=False, init=False)

    def there(self) -> None:
        """Deploy with them."""
        self.before = self.site.public.ca
        self.site.settings = self.settings
        self.done = True
        self.site.expect(*ROLES)
        self.site.public.ca = self.site.authority.roots

    def back(self) -> None:
        """Deploy without them, if that is still to be done."""
        if self.done:
            self.site.settings, self.site.public.ca, self.done = {}, self.before, False
            self.site.expect(*ROLES)


@pytest.fixture(scope="module")
def switch(site: Site) -> Iterator[Switch]:
    """From the private CA to the authority, from intermediate to modern, and to HTTP/3."""
    made = Switch(site, site.authority.settings | {"nginx_tls_policy": "modern", "nginx_http3": True})
    try:
        made.there()
        yield made
    finally:
        made.back()


@pytest.fixture(scope="module")
def authority(request: pytest.FixtureRequest, site: Site) -> Authority:
    """The authority that the environment's certificate is from: the single server's from its first deploy on."""
    if SINGLE not in site.servers:
        request.getfixturevalue("switch")
    return site.authority


@dataclass
class Renewing:
    """A server that renews its certificate by itself."""

    front: Server
    name: str

    @property
    def home(self) -> str:
        """Return the directory of its certbot."""
        return self.front.sh(f"echo /var/lib/hardstand/acme/{self.name}/*")

    def run(self) -> bool:
        """Do what the timer does; returns whether it went well."""
        return self.front.sh(f"systemctl start hardstand-certificate-{self.name} && echo well", check=False) == "well"

    def revoke(self) -> None:
        """Tell the authority that the certificate no longer counts, as after a theft of the key."""
        home = self.home
        self.front.sh(
            "REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt"
            " /opt/certbot/current/bin/certbot revoke --non-interactive --no-delete-after-revoke"
            f" --config-dir {home} --work-dir {home}/work --logs-dir {home}/logs --cert-name {self.name}"
            # Whom it has asked for advice, it asks again only after some hours.
            f" && sed -i /ari_retry_after/d {home}/renewal/*.conf"
        )

    def state(self) -> dict[str, Any]:
        """Return what is written down of the last time."""
        found: dict[str, Any] = json.loads(self.front.sh(f"cat /var/lib/hardstand/certificates/{self.name}.json"))
        return found

    def workers(self) -> set[int]:
        """Return nginx's processes; others after a reload, once the old ones are gone."""
        return self.front.pids("^nginx: worker process *$")


@pytest.fixture
def renewing(site: Site, authority: Authority) -> Renewing:
    assert authority.answers()
    return Renewing(site.public, APP if SINGLE in site.servers else f"{APP}-lb")


class Visitors(Repeated):
    """Clients who come one after the other, each on a connection of its own, and verify whom they reach."""

    def __init__(self, front: Server) -> None:
        super().__init__(threads=3)
        self.front = front
        self.served = 0
        self.failures: list[str] = []

    def once(self) -> None:
        try:
            status = self.front.request("GET", "/health/live").status
            assert status == 200, status
            self.served += 1
        except Exception as error:
            self.failures.append(repr(error))


def test_clients_verify_the_certificate_of_the_authority(front: Server, renewing: Renewing) -> None:
    """Which has asked for its proof at port 80, through the firewall."""
    assert "Pebble" in certificate(front).issuer.rfc4514_string()
    assert front.request("GET", "/health/ready").status == 200
    state = renewing.state()
    assert (state["temporary"], state["missing"], state["failures"]) == (False, [], 0)


@pytest.mark.once(on="debian12")
def test_a_certificate_that_the_authority_wants_back_is_renewed_at_once(
    site: Site, front: Server, renewing: Renewing
) -> None:
    """The authority advises it (ARI), the timer's service does it, and nobody notices."""
    before, workers = certificate(front), renewing.workers()
    renewing.revoke()
    with Visitors(front) as visitors:
        assert renewing.run(), renewing.state()
        wait_for(lambda: not workers & renewing.workers(), 30, "nginx has reloaded")
        served = visitors.served
        wait_for(lambda: visitors.served > served + 20, 30, "clients come")
    assert visitors.failures == []
    after, workers = certificate(front), renewing.workers()
    assert after.serial_number != before.serial_number
    assert renewing.state()["failures"] == 0

    # Once more, right away: there is nothing to do, and nobody is told.
    assert renewing.run()
    assert certificate(front) == after
    assert renewing.workers() == workers
    assert site.expect(*ROLES).changed == 0


@pytest.mark.once(on="debian12")
def test_without_the_authority_the_old_certificate_serves_and_the_status_says_so(
    site: Site, front: Server, authority: Authority, renewing: Renewing
) -> None:
    before = certificate(front)
    authority.start(validity=SHORT)
    # As if it had been so from the beginning: certbot knows of no other certificate.
    front.sh(f"cd {renewing.home} && rm -r live archive renewal")
    assert renewing.run(), renewing.state()
    short = another_certificate(front, before)
    ends = short.not_valid_after_utc.timestamp()
    assert ends - time.time() <= SHORT
    authority.stop()
    try:
        time.sleep(max(0, ends - SHORT / 2 - time.time()) + 1)
        assert not renewing.run()
        assert not renewing.run()
        assert certificate(front) == short
        assert "is not renewed: 2 attempts have failed" in site.refuse("playbooks/status.yml").output
    finally:
        authority.start()
    # It is renewed by its lifetime, as soon as it can be.
    assert renewing.run(), renewing.state()
    assert another_certificate(front, short)
    site.expect("playbooks/status.yml")


@pytest.mark.once
def test_what_is_agreed_on_is_the_modern_guidelines(site: Site, switch: Switch, client: Server) -> None:
    assert switch.done
    check_guideline(site, client, "modern")


# Program that sends back each datagram that comes to port 443.
ECHO = """
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 443))
while True:
    server.sendto(*server.recvfrom(100))
"""
ASK = """
import socket, sys
asking = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(1)
asking.sendto(b"x", (sys.argv[1], 443))
asking.recv(100)
"""


def echoes(address: str, machine: Server) -> bool:
    """Return whether a machine gets its datagram back from port 443 of an address."""
    return machine.sh(f"python3 -c '{ASK}' {address} && echo yes || true") == "yes"


def answers_http3(client: Server, front: Server) -> bool:
    """Return whether the application answers a client that speaks HTTP/3 alone."""
    client.sh(f"cat >/run/roots.crt <<'END'\n{front.ca.read_text()}\nEND")
    said = client.sh(
        "curl --silent --http3-only --max-time 5 --output /dev/null --write-out '%{http_version} %{response_code}'"
        f" --cacert /run/roots.crt --resolve {DOMAIN}:443:{front.address} https://{DOMAIN}/health/ready",
        check=False,
    )
    return said == "3 200"


@pytest.mark.once
def test_http3_is_answered_through_the_firewall(site: Site, front: Server, client: Server, switch: Switch) -> None:
    assert switch.done
    if SINGLE in site.servers:
        pytest.skip("Debian 12's nginx has no HTTP/3.")
    assert answers_http3(client, front)
    # Which clients are told of.
    assert 'h3=":443"' in front.request("GET", "/").headers["Alt-Svc"]


@pytest.mark.once
def test_switching_back_leaves_nothing_of_it(site: Site, front: Server, client: Server, switch: Switch) -> None:
    switch.back()
    check_guideline(site, client, "intermediate")
    assert "Alt-Svc" not in front.request("GET", "/").headers
    assert not answers_http3(client, front)
    # Not only because nobody is there who would answer.
    unit = "hardstand-test-answers"
    front.sh(f"systemd-run --quiet --unit {unit} python3 -c '{ECHO}'")
    try:
        wait_for(lambda: echoes("127.0.0.1", front), 20, "it answers on the server itself")
        assert not any(echoes(address, client) for address in (front.address, front.address6))
    finally:
        front.sh(f"systemctl stop {unit}")
    if SINGLE not in site.servers:
        assert "hardstand-certificate" not in front.sh("systemctl list-timers --all")
