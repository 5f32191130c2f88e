"""Role certificate, mode acme: its program and certbot against pebble, on a directory of our own."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509

from tests.acme_authority import PEBBLE, Authority
from tests.role_templates import ROLES, load_file

pytestmark = pytest.mark.skipif(not PEBBLE, reason="needs Debian's pebble")

REQUIREMENTS = ROLES / "certificate/files/certbot-requirements.txt"
DAY = 86_400


@pytest.fixture(scope="session")
def certbot() -> Path:
    """The certbot that servers get, in a virtualenv that later runs use again."""
    text = REQUIREMENTS.read_text() + sys.version
    venv = Path.home() / ".cache/hardstand" / f"certbot-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    program = venv / "bin/certbot"
    venv.parent.mkdir(parents=True, exist_ok=True)
    # Several runs of tests at the same time make it once.
    with venv.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_venv(venv)
    return program


def make_venv(venv: Path) -> None:
    """Make the virtualenv, unless it is there and whole."""
    if not (venv / "made").exists():
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [
            str(venv / "bin/pip"),
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "--no-deps",
        ]
        subprocess.run([*pip, "--only-binary=:all:", "--requirement", str(REQUIREMENTS)], check=True)
        (venv / "made").touch()


class Server:
    """What the program finds on a server: settings, a web server's directory, something to reload."""

    def __init__(self, module: ModuleType, directory: Path, authority: Authority, certbot: Path) -> None:
        self.module, self.directory = module, directory
        self.reloads = directory / "reloads"
        for name in ("webroot", "ssl"):
            (directory / name).mkdir()
        self.settings: dict[str, Any] = {
            "names": ["blog.test", "www.blog.test"],
            "directory_url": authority.url,
            "ca_file": str(authority.ca_file),
            "email": "",
            "profile": "",
            "eab_key_id": "",
            "eab_hmac_key": "",
            "certbot": str(certbot),
            "webroot": str(directory / "webroot"),
            "directory": str(directory / "ssl"),
            "group": "root",
            "reload": ["/bin/sh", "-c", f"echo >>{self.reloads}"],
        }

    def acme(self, **settings: Any) -> Any:
        """The program, with these settings beside the usual ones."""
        self.settings |= settings
        (self.module.SETTINGS / "blog.json").write_text(json.dumps(self.settings))
        acme = self.module.Acme("blog")
        acme.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return acme

    def get(self, **settings: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.acme(**settings).get()
        return result

    def due(self, **settings: Any) -> str:
        return str(self.acme(**settings).due())

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.directory / "ssl/blog.crt").read_bytes())

    @property
    def names(self) -> set[str]:
        found = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return set(found.get_values_for_type(x509.DNSName))

    def reloaded(self) -> int:
        """How often services were told."""
        return self.reloads.read_text().count("\n") if self.reloads.exists() else 0

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.module.STATES / "blog.json").read_text())
        return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loaded = load_file(ROLES / "certificate/files/acme_certificate.py")
    for name in ("SETTINGS", "STATES", "CERTBOT", "LOCKS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(loaded, name, tmp_path / name)
    return loaded


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[Authority]:
    web = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "webroot"))
    )
    threading.Thread(target=web.serve_forever, daemon=True).start()
    made = Authority(tmp_path / "pebble", http_port=web.server_address[1])
    made.names |= {"blog.test": "127.0.0.1", "www.blog.test": "127.0.0.1"}
    try:
        made.start()
        yield made
    finally:
        made.close()
        web.shutdown()
        web.server_close()


@pytest.fixture
def server(module: ModuleType, tmp_path: Path, authority: Authority, certbot: Path) -> Server:
    return Server(module, tmp_path, authority, certbot)


def test_the_first_certificate_comes_and_is_kept(server: Server) -> None:
    assert server.due() == "the authority has not given one yet"
    result = server.get()
    assert (result["message"], result["changed"], result["temporary"], result["failures"]) == ("", True, False, 0)
    assert server.names == {"blog.test", "www.blog.test"}
    assert (server.directory / "ssl/blog.key").stat().st_mode & 0o777 == 0o640
    assert "Pebble" in server.certificate.issuer.rfc4514_string()
    assert server.reloaded() == 1
    assert server.due() == ""
    # Nothing to do: nothing is replaced, and nobody is told.
    before = (server.directory / "ssl/blog.crt").stat().st_ino
    result = server.get()
    assert (result["message"], result["changed"]) == ("", False)
    assert (server.directory / "ssl/blog.crt").stat().st_ino == before
    assert server.reloaded() == 1
    assert server.state()["missing"] == []
    assert not list((server.directory / "webroot").rglob("*/acme-challenge/*")), "answers are removed"


def test_a_short_lived_certificate_is_renewed_by_its_lifetime(server: Server, authority: Authority) -> None:
    authority.stop()
    # pebble counts in seconds, and certbot renews when less than half of a short lifetime is left.
    authority.validity = 20
    authority.start()
    assert server.get()["message"] == ""
    first = server.certificate.serial_number
    assert server.get()["changed"] is False
    time.sleep(14)
    assert server.due() == "it ends soon"
    assert server.get()["changed"]
    assert server.certificate.serial_number != first
    assert server.reloaded() == 2


def test_an_expired_certificate_is_replaced(server: Server, authority: Authority) -> None:
    authority.stop()
    authority.validity = 3
    authority.start()
    server.get()
    time.sleep(4)
    assert server.certificate.not_valid_after_utc.timestamp() < time.time()
    authority.stop()
    authority.validity = 90 * DAY
    authority.start()  # which has forgotten the account as well
    result = server.get()
    assert result["message"] == ""
    assert server.certificate.not_valid_after_utc.timestamp() > time.time() + 80 * DAY


def test_without_the_authority_the_old_one_goes_on_serving(server: Server, authority: Authority) -> None:
    server.get()
    before = (server.directory / "ssl/blog.crt").read_text()
    authority.stop()
    for failures in (1, 2):
        result = server.get(names=["blog.test"])  # so that the authority has to be asked
        assert result["failures"] == failures
        assert "refused" in result["message"] or "connect" in result["message"].lower(), result["message"]
        assert not result["temporary"]
    assert (server.directory / "ssl/blog.crt").read_text() == before
    assert server.reloaded() == 1
    assert server.state()["succeeded"]
    authority.start()
    assert server.get()["failures"] == 0


def test_names_follow_the_settings(server: Server) -> None:
    server.get(names=["blog.test"])
    assert server.names == {"blog.test"}
    assert server.due(names=["blog.test", "www.blog.test"]) == "its names change"
    server.get()
    assert server.names == {"blog.test", "www.blog.test"}
    server.get(names=["www.blog.test"])
    assert server.names == {"www.blog.test"}
    assert server.reloaded() == 3


def test_a_name_that_cannot_be_proven_harms_no_other(server: Server, authority: Authority) -> None:
    result = server.get(names=["blog.test", "moved.test"])
    assert server.names == {"blog.test"}
    assert result["missing"] == ["moved.test"]
    assert result["failures"] == 1
    assert "moved.test" in result["message"]
    # It is asked for again each time, and comes as soon as it can.
    assert server.due() == "its names change"
    authority.names["moved.test"] = "127.0.0.1"
    result = server.get()
    assert (result["message"], result["failures"]) == ("", 0)
    assert server.names == {"blog.test", "moved.test"}


def test_a_failing_name_is_given_up_only_when_time_runs_out(
    server: Server, authority: Authority, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.get()
    del authority.names["www.blog.test"]
    authority.names["new.test"] = "127.0.0.1"
    # As if it had to be renewed: a certificate for both is worth more than a new one for one of them.
    result = server.get(names=["blog.test", "www.blog.test", "new.test"])
    assert "www.blog.test" in result["message"]
    assert server.names == {"blog.test", "www.blog.test"}
    monkeypatch.setattr(module, "URGENT", 2)
    server.get()
    assert server.names == {"blog.test", "new.test"}


def test_one_certificates_failure_is_no_others(server: Server, module: ModuleType) -> None:
    server.acme()
    for name, names in (("lost", ["lost.test"]), ("blog", ["blog.test"])):
        (module.SETTINGS / f"{name}.json").write_text(json.dumps(server.settings | {"names": names}))
        acme = module.Acme(name)
        acme.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        assert bool(acme.get()["message"]) == (name == "lost")
    assert server.names == {"blog.test"}
    assert json.loads((module.STATES / "lost.json").read_text())["temporary"]


def test_a_reload_that_fails_is_made_good(server: Server) -> None:
    reload = server.settings["reload"]
    result = server.get(reload=["/bin/sh", "-c", "echo broken >&2; exit 1"])
    assert result["reload_due"]
    assert "broken" in result["message"]
    assert server.due() == "services have not been told of it"
    result = server.get(reload=reload)
    assert (result["reload_due"], result["message"], result["changed"]) == (False, "", False)
    assert server.reloaded() == 1


def test_another_authority_is_asked_for_a_certificate_of_its_own(
    server: Server, authority: Authority, tmp_path: Path
) -> None:
    server.get()
    serial = server.certificate.serial_number
    other = Authority(tmp_path / "other", http_port=authority.http_port)
    other.names |= authority.names
    other.start()
    try:
        assert server.due(directory_url=other.url, ca_file=str(other.ca_file)) == "the authority has not given one yet"
        server.get()
    finally:
        other.close()
    assert server.certificate.serial_number != serial
    assert len(list((tmp_path / "CERTBOT/blog").iterdir())) == 1


def test_an_authority_that_is_not_trusted_gets_no_account(server: Server) -> None:
    result = server.get(ca_file="/etc/ssl/certs/ca-certificates.crt")
    assert result["temporary"]
    assert "certificate verify failed" in result["message"].lower()


def test_an_external_account_is_bound_and_its_key_is_on_no_command_line(
    server: Server, authority: Authority, tmp_path: Path
) -> None:
    key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    authority.stop()
    authority.eab = {"kid-1": key}
    authority.start()
    assert server.get()["message"]
    seen = tmp_path / "seen"
    wrapper = tmp_path / "certbot"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >>{seen}\nexec {server.settings["certbot"]} "$@"\n')
    wrapper.chmod(0o755)
    assert server.get(eab_key_id="kid-1", eab_hmac_key=key, certbot=str(wrapper))["message"] == ""
    assert seen.read_text()
    assert key not in seen.read_text()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            (
                "Certbot failed to authenticate some domains. The Certificate Authority reported:\n"
                "  Identifier: a.test\n  Type:   dns\n  Detail: no such host\n\n"
                "  Identifier: b.test\n  Type:   connection\n  Detail: refused\n\nHint: …\n"
            ),
            "a.test: no such host (dns); b.test: refused (connection)",
        ),
        ("Saving debug log to /x\nAn unexpected error occurred:\nboom\nAsk for help at …\n", "boom"),
        ("", "certbot said nothing"),
    ],
)
def test_what_certbot_says_fits_in_a_line(module: ModuleType, said: str, told: str) -> None:
    assert module.reason(said) == told
