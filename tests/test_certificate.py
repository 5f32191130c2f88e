"""Role certificate: its module on a directory of our own, and what it says about certificates from an operator."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.role_templates import ROLES, evaluate, load_file

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes = b"") -> str:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption).decode()


class Authority:
    """A certificate authority for tests."""

    def __init__(self, name: str, issuer: Authority | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = (issuer or self).sign(self.name, self.key.public_key(), [], NOW - DAY, NOW + 90 * DAY)

    def sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        start: datetime.datetime,
        end: datetime.datetime,
    ) -> str:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


ROOT = Authority("Root")
INTERMEDIATE = Authority("Intermediate", ROOT)
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(*names: str, start: datetime.datetime = NOW - DAY, end: datetime.datetime = NOW + 30 * DAY) -> str:
    """Return a certificate (PEM) for `KEY`, signed by the intermediate authority."""
    general: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names
    ]
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    return INTERMEDIATE.sign(subject, KEY.public_key(), general, start, end)


CHAIN = certificate("blog.example.org", "*.example.org", "192.0.2.1") + INTERMEDIATE.certificate


def problems(**settings: Any) -> list[str]:
    """Return what the role says about the operator's files."""
    given = {
        "certificate_mode": "files",
        "certificate_name": "blog",
        "certificate_names": ["blog.example.org"],
        "certificate_source_file": CHAIN,
        "certificate_source_key": pem(KEY),
    }
    found: list[str] = evaluate("certificate", "_certificate_files_problems", **(given | settings))
    return found


def test_a_sound_pair_is_no_problem() -> None:
    assert problems() == []
    assert problems(certificate_names=["Blog.example.org", "www.example.org", "192.0.2.1"]) == []


def test_a_pair_may_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "chain.pem").write_text(CHAIN)
    (tmp_path / "key.pem").write_text(pem(KEY))
    paths = {
        "certificate_source_file": str(tmp_path / "chain.pem"),
        "certificate_source_key": str(tmp_path / "key.pem"),
    }
    assert problems(**paths) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certificate_source_file": ""}, "certificate_source_file: no PEM certificate"),
        ({"certificate_source_file": "/nowhere/blog.pem"}, "certificate_source_file: no PEM certificate"),
        ({"certificate_source_key": ""}, "certificate_source_key: no PEM private key"),
        ({"certificate_source_key": "/nowhere/blog.key"}, "certificate_source_key: no PEM private key"),
        ({"certificate_source_key": pem(KEY, b"secret")}, "certificate_source_key: the key has a passphrase"),
        ({"certificate_source_key": pem(ROOT.key)}, "certificate_source_key is not the key of"),
        (
            {"certificate_source_file": certificate("blog.example.org", end=NOW - DAY / 2)},
            "certificate_source_file: the certificate ended on",
        ),
        (
            {"certificate_source_file": certificate("blog.example.org", start=NOW + DAY)},
            "certificate_source_file: the certificate is not valid before",
        ),
        (
            {"certificate_names": ["blog.example.org", "example.org"]},
            "certificate_source_file does not cover DNS:example.org of",
        ),
        ({"certificate_names": ["a.b.example.org"]}, "certificate_source_file does not cover DNS:a.b.example.org of"),
        ({"certificate_names": ["192.0.2.2"]}, "certificate_source_file does not cover IP:192.0.2.2 of"),
        (
            {"certificate_source_file": certificate("blog.example.org") + ROOT.certificate + INTERMEDIATE.certificate},
            "certificate_source_file: each certificate must be followed by",
        ),
    ],
)
def test_each_fault_is_named_with_its_setting(settings: dict[str, Any], says: str) -> None:
    (problem,) = problems(**settings)
    assert problem.startswith(says)
    assert "PRIVATE KEY--" not in problem


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certificate_names": []}, "certificate_names needs"),
        ({"certificate_names": ["good.example.org", "bad name"]}, 'certificate_names: "bad name" is neither'),
        ({"certificate_ca_directory": ""}, "certificate_mode private_ca needs certificate_ca_directory"),
        ({"certificate_renew_days": 365}, "certificate_renew_days must be less"),
        ({"certificate_crl_url": "https://blog.example.org/ca.crl"}, "certificate_crl_url"),
        ({"certificate_revoked": ["not hex"]}, 'certificate_revoked: "not hex" is no serial number'),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], says: str) -> None:
    given = {"certificate_names": ["blog.example.org"], "certificate_ca_directory": "/nowhere"}
    assert evaluate("certificate", "_certificate_problems", **given) == []
    (problem,) = evaluate("certificate", "_certificate_problems", **(given | settings))
    assert problem.startswith(says)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "another authority signed it"),  # as there is none in this directory
        ({"have": ""}, "it has none"),
        ({"certificate_names": ["www.example.org"]}, "its names change"),
        ({"public_key": "another"}, "it is for another key"),
        ({"certificate_renew_days": 31}, "it ends soon"),
        ({"certificate_client": True}, "its owner is to be a client too"),
        ({"certificate_names": ["blog.example.org", "192.0.2.1"]}, "its names change"),
    ],
)
def test_a_new_certificate_has_a_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    have = change.pop("have", certificate("blog.example.org"))
    public_key = (
        change.pop("public_key", None)
        or KEY.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )
    settings = {
        "certificate_names": ["blog.example.org"],
        "certificate_ca_directory": str(tmp_path),
        "certificate_renew_days": 29,
        "__certificate_pair": {"certificate": have, "public_key": public_key},
    }
    assert evaluate("certificate", "_certificate_due", **(settings | change)) == reason


# The module ------------------------------------------------------------------------------------------------------

Converge = Callable[..., dict[str, Any]]


@pytest.fixture
def module() -> ModuleType:
    return load_file(ROLES / "certificate/library/certificate_pair.py")


@pytest.fixture
def converge(module: ModuleType, tmp_path: Path) -> Converge:
    def call(*, check: bool = False, diff: bool = False, **parameters: Any) -> dict[str, Any]:
        given = {
            "directory": str(tmp_path / "ssl"),
            "name": "blog",
            "subject_alt_names": ["DNS:blog.example.org", "IP:2001:db8::1"],
            "client": False,
            "crl_url": "",
            "crl": "",
            "group": "root",
            "temporary": False,
            "not_renewed_by": None,
            "certificate": None,
            "private_key": None,
        }
        result: dict[str, Any] = module.converge(given | parameters, check=check, diff=diff)
        return result

    return call


def test_a_key_is_made_once_and_stays(converge: Converge, tmp_path: Path) -> None:
    first = converge()
    key = (tmp_path / "ssl/blog.key").read_text()
    assert first["changed"]
    assert (tmp_path / "ssl/blog.key").stat().st_mode & 0o777 == 0o640
    assert key not in str(first)
    second = converge()
    assert not second["changed"]
    assert second["public_key"] == first["public_key"]
    assert (tmp_path / "ssl/blog.key").read_text() == key


def test_the_request_names_what_was_asked_for_and_no_authority(converge: Converge) -> None:
    request = x509.load_pem_x509_csr(converge()["csr"].encode())
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["blog.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("2001:db8::1")]
    assert not request.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert request.is_signature_valid


def test_a_request_says_where_the_list_of_revoked_certificates_is(converge: Converge) -> None:
    def points(url: str) -> list[str]:
        request = x509.load_pem_x509_csr(converge(crl_url=url)["csr"].encode())
        return [
            name.value
            for extension in request.extensions
            if isinstance(extension.value, x509.CRLDistributionPoints)
            for point in extension.value
            for name in point.full_name or []
        ]

    assert points("") == []
    assert points("http://blog.example.org/ca.crl") == ["http://blog.example.org/ca.crl"]


def test_the_list_is_put_in_place_once_and_as_clients_expect_it(converge: Converge, tmp_path: Path) -> None:
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ROOT.name)
        .last_update(NOW)
        .next_update(NOW + DAY)
        .sign(ROOT.key, hashes.SHA256())
    )
    text = made.public_bytes(serialization.Encoding.PEM).decode()
    converge()
    assert converge(crl=text, check=True)["changed"]
    assert not (tmp_path / "ssl/blog.crl").exists()
    assert converge(crl=text)["changed"]
    assert x509.load_der_x509_crl((tmp_path / "ssl/blog.crl").read_bytes()) == made
    assert (tmp_path / "ssl/blog.crl").stat().st_mode & 0o777 == 0o644
    assert not converge(crl=text)["changed"]


@pytest.mark.parametrize("client", [False, True])
def test_a_certificate_may_be_a_clients_as_well(converge: Converge, client: bool) -> None:
    request = x509.load_pem_x509_csr(converge(client=client)["csr"].encode())
    usage = set(request.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert ExtendedKeyUsageOID.SERVER_AUTH in usage
    assert (ExtendedKeyUsageOID.CLIENT_AUTH in usage) == client


def test_addresses_may_be_dns_names_too() -> None:
    settings = {"certificate_names": ["db.internal", "192.0.2.1"], "certificate_address_names": True}
    names = evaluate("certificate", "_certificate_subject_alt_names", **settings)
    assert names == ["DNS:db.internal", "IP:192.0.2.1", "DNS:192.0.2.1"]


def test_a_key_is_for_a_group_to_read(converge: Converge, tmp_path: Path) -> None:
    converge()
    converge(certificate=CHAIN, private_key=pem(KEY))
    assert converge(group="daemon")["changed"]
    assert (tmp_path / "ssl/blog.key").group() == "daemon"
    assert (tmp_path / "ssl/blog.key").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "ssl/blog.crt").group() == "root"
    assert not converge(group="daemon")["changed"]


def test_a_group_that_does_not_exist_is_named(converge: Converge, module: ModuleType) -> None:
    with pytest.raises(module.PairError, match="no-such-group"):
        converge(group="no-such-group")
    converge(group="no-such-group", check=True)


def test_a_name_longer_than_a_common_name_may_be_is_no_problem(converge: Converge) -> None:
    name = ".".join(["a" * 60] * 3)
    assert x509.load_pem_x509_csr(converge(subject_alt_names=[f"DNS:{name}"])["csr"].encode()).is_signature_valid


def test_a_pair_is_put_in_place_together_and_once(converge: Converge, tmp_path: Path) -> None:
    assert converge(certificate=CHAIN, private_key=pem(KEY))["changed"]
    assert (tmp_path / "ssl/blog.crt").read_text() == CHAIN
    assert (tmp_path / "ssl/blog.crt").stat().st_mode & 0o777 == 0o644
    assert not converge(certificate=CHAIN, private_key=pem(KEY))["changed"]
    assert sorted(path.name for path in (tmp_path / "ssl").iterdir()) == ["blog.crt", "blog.key"]


@pytest.mark.parametrize("check", [False, True])
def test_a_pair_that_does_not_match_replaces_nothing(
    converge: Converge, module: ModuleType, tmp_path: Path, *, check: bool
) -> None:
    converge(certificate=CHAIN, private_key=pem(KEY))
    with pytest.raises(module.PairError, match="does not belong to the key"):
        converge(check=check, certificate=ROOT.certificate)
    with pytest.raises(module.PairError, match="does not belong to the key"):
        converge(check=check, certificate=ROOT.certificate, private_key=pem(KEY))
    assert (tmp_path / "ssl/blog.crt").read_text() == CHAIN
    assert (tmp_path / "ssl/blog.key").read_text() == pem(KEY)


def test_check_mode_writes_nothing(converge: Converge, tmp_path: Path) -> None:
    result = converge(check=True)
    assert result == {"changed": True, "certificate": "", "public_key": "", "csr": ""}
    assert converge(check=True, diff=True, certificate=CHAIN, private_key=pem(KEY))["changed"]
    assert not (tmp_path / "ssl").exists()


def test_the_diff_shows_names_and_dates_and_no_key(converge: Converge) -> None:
    diff = converge(diff=True, certificate=CHAIN, private_key=pem(KEY))["diff"]
    assert diff["before"] == ""
    assert "DNS:blog.example.org" in diff["after"]
    assert "KEY" not in str(diff)


def test_an_open_key_is_closed(converge: Converge, tmp_path: Path) -> None:
    converge()
    (tmp_path / "ssl/blog.key").chmod(0o644)
    assert converge()["changed"]
    assert (tmp_path / "ssl/blog.key").stat().st_mode & 0o777 == 0o640


def test_a_server_without_openssl_is_told_so(
    converge: Converge, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert converge(check=True)["changed"]
    with pytest.raises(module.PairError, match="install the Debian package openssl"):
        converge()


def test_a_temporary_certificate_is_signed_with_the_key_itself_and_replaces_none(
    converge: Converge, tmp_path: Path
) -> None:
    assert converge(temporary=True, check=True)["changed"]
    assert not (tmp_path / "ssl").exists()
    assert converge(temporary=True)["changed"]
    made = x509.load_pem_x509_certificate((tmp_path / "ssl/blog.crt").read_bytes())
    made.verify_directly_issued_by(made)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["blog.example.org"]
    assert not converge(temporary=True)["changed"]
    converge(certificate=CHAIN, private_key=pem(KEY))
    assert not converge(temporary=True)["changed"]
    assert (tmp_path / "ssl/blog.crt").read_text() == CHAIN


def test_what_renewed_a_pair_of_another_authority_is_stopped(
    converge: Converge, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNITS", tmp_path)
    for kind in ("timer", "service"):
        (tmp_path / f"hardstand-test-none.{kind}").touch()
    converge()
    assert converge(not_renewed_by="hardstand-test-none", check=True)["changed"]
    assert (tmp_path / "hardstand-test-none.timer").exists()
    assert converge(not_renewed_by="hardstand-test-none")["changed"]
    assert not list(tmp_path.glob("hardstand-test-none.*"))
    assert not converge(not_renewed_by="hardstand-test-none")["changed"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certificate_names": ["192.0.2.1"]}, 'certificate_names: "192.0.2.1" is an address'),
        ({"certificate_names": ["*.example.org"]}, 'certificate_names: "*.example.org" stands for many names'),
        ({"certificate_names": ["localhost"]}, 'certificate_names: "localhost" is no name'),
        ({"certificate_acme_directory": "http://acme.example.org/"}, "certificate_acme_directory"),
        ({"certificate_acme_eab_key_id": "kid"}, "certificate_acme_eab_key_id and certificate_acme_eab_hmac_key"),
        ({"certificate_acme_webroot": "acme"}, "certificate_acme_webroot"),
    ],
)
def test_a_wrong_setting_for_acme_is_named(settings: dict[str, Any], says: str) -> None:
    given = {"certificate_mode": "acme", "certificate_name": "blog", "certificate_names": ["blog.example.org"]}
    assert evaluate("certificate", "_certificate_problems", **given) == []
    (problem,) = evaluate("certificate", "_certificate_problems", **(given | settings))
    assert problem.startswith(says)


def test_certbot_is_pinned_with_all_that_it_needs() -> None:
    lines = (ROLES / "certificate/files/certbot-requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert any(line.startswith("certbot==5.") for line in packages)
    assert all("==" in line for line in packages)
    assert len([line for line in lines if "--hash=sha256:" in line]) >= len(packages)
