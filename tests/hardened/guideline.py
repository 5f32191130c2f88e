"""Mozilla's guideline for TLS, and what a server agrees to of all that OpenSSL 3.5 can speak."""

from __future__ import annotations

from dataclasses import dataclass

from tests.harness import DOMAIN
from tests.harness import Server as Machine

# Version 6.0: https://ssl-config.mozilla.org/guidelines/6.0.json, which is src/static/guidelines/6.0.json in
# https://github.com/mozilla/ssl-config-generator. Written out, so that no mistake of the role's can be in here as well.
VERSIONS = {"modern": {"TLSv1.3"}, "intermediate": {"TLSv1.2", "TLSv1.3"}}
CIPHERS: dict[str, set[str]] = {
    "modern": set(),
    # Of its six, those for certificates with elliptic keys, as all of ours are.
    "intermediate": {
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    },
}
CIPHERSUITES = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
# As OpenSSL's list spells them: the guideline's prime256v1 is secp256r1.
CURVES = {"X25519MLKEM768", "x25519", "secp256r1", "secp384r1"}
HSTS_MIN_AGE = 63_072_000
CERTIFICATE_CURVES = {"secp256r1", "secp384r1"}
CERTIFICATE_HASHES = {"sha256", "sha384", "sha512"}
CERTIFICATE_DAYS = {"modern": 90, "intermediate": 366}

# One handshake for each thing there is; the client offers nothing else, and its own policy is not what is to refuse.
_PROBE = """
shake() {{ openssl s_client -brief -connect {address}:443 -servername {domain} "$@" </dev/null 2>&1; }}
any='ALL:COMPLEMENTOFALL:@SECLEVEL=0'
for version in 1 1_1 1_2 1_3; do
    shake -tls$version -cipher "$any" | sed -n 's/^Protocol version: /version /p'
done
for cipher in $(openssl ciphers -tls1_2 "$any" | tr : ' '); do
    shake -tls1_2 -cipher "$cipher:@SECLEVEL=0" | sed -n 's/^Ciphersuite: /cipher /p'
done
for suite in {suites}; do
    shake -tls1_3 -ciphersuites $suite | sed -n 's/^Ciphersuite: /suite /p'
done
for curve in $(openssl list -tls-groups | tr : ' '); do
    ! shake -tls1_3 -groups $curve >/dev/null || echo curve $curve
done
# Of two that it agrees to, in either order.
for order in TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384 TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256; do
    shake -tls1_3 -ciphersuites $order | sed -n 's/^Ciphersuite: /chosen /p'
done
shake | sed -n -E 's/^(Negotiated TLS1.3 group|Peer Temp Key|Server Temp Key): /usual /p'
"""
_ALL_SUITES = [*sorted(CIPHERSUITES), "TLS_AES_128_CCM_SHA256", "TLS_AES_128_CCM_8_SHA256"]


@dataclass
class Agreed:
    """What a server agrees to."""

    versions: set[str]
    ciphers: set[str]
    ciphersuites: set[str]
    curves: set[str]
    # What a client with two choices gets, who names the first of them first, and then the other one.
    chosen: list[str]
    # What a client gets who leaves all to OpenSSL's defaults.
    usual: str


def probe(client: Machine, address: str) -> Agreed:
    """Have a client with OpenSSL 3.5 find out what the server at an address agrees to."""
    script = _PROBE.format(address=address, domain=DOMAIN, suites=" ".join(_ALL_SUITES))
    lines = [line.partition(" ")[::2] for line in client.sh(script).splitlines()]

    def found(kind: str) -> list[str]:
        return [value for name, value in lines if name == kind]

    return Agreed(
        versions=set(found("version")),
        ciphers=set(found("cipher")),
        ciphersuites=set(found("suite")),
        curves=set(found("curve")),
        chosen=found("chosen"),
        usual=" ".join(found("usual")),
    )
