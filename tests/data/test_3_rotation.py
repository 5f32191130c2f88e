"""New passwords: one deploy, without a failed request."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.data.site import Site
from tests.harness import APP
from tests.load import Load, Target

PASSWORDS = {
    "vault_postgresql_password": "rotated %/@: with 'quotes\" and $igns 0123456789",
    "vault_postgresql_owner_password": "the owner's new one, %40 0123456789",
}


@pytest.mark.once
def test_the_application_gets_a_new_password(site: Site) -> None:
    old = site.database_url()
    target = Target("127.0.0.1", site.app.https_port, "hardstand.test", str(site.app.ca), clients=3, pause=0.02)
    with Load(target) as load:
        run = site.expect("deploy.yml", **PASSWORDS)
        report = load.stop()
    assert report.kinds() == []
    assert len(report.releases()) == 2
    assert not any(password in run.output for password in PASSWORDS.values())
    new = site.database_url()
    assert new != old
    site.post("With a new password")

    # The old one opens nothing any more.
    said = site.probe("SELECT 1", url=old)
    assert "InvalidPassword" in said[0] or "InvalidAuthorization" in said[0], said
    login = urlsplit(new).username
    logins = site.psql(
        "SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper"
        " AND oid <> (SELECT datdba FROM pg_database WHERE datname = current_database())"
    )
    assert logins == login
    assert site.probe("SELECT 1") == ["1"]
    site.remember(PASSWORDS)
    again = site.expect("deploy.yml")
    assert again.changed == 0, again.output


@pytest.mark.once(on="debian12")
def test_a_deploy_that_fails_takes_nobody_the_password(site: Site) -> None:
    release = site.app.release()
    settings = {"vault_postgresql_password": "never to be used 0123456789", "release_health_path": "/no-such-path"}
    site.refuse("deploy.yml", **settings, release_health_timeout=3)
    assert site.app.release() == release
    assert site.probe("SELECT 1") == ["1"]
    site.app.sh(f"supervisorctl restart {site.app.programs()[0].removesuffix('.conf')}:* || supervisorctl restart all")
    site.wait_until_ready()
    site.post(f"{APP} still logs in")
