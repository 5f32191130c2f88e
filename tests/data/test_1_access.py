"""Who reaches the database, and what they may do there."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from tests.data.site import Site
from tests.harness import APP, ROOT, wait_for

DENIED = "InsufficientPrivilegeError"


def test_what_is_posted_is_in_the_database(site: Site) -> None:
    site.post("In the database")
    assert "In the database" in site.titles()


# Molecule's own step has asked the other environment.
@pytest.mark.once(on="debian12")
def test_nothing_new_changes_nothing(site: Site) -> None:
    again = site.expect("deploy.yml")
    assert again.changed == 0, again.output


def test_connections_are_encrypted_and_verified(site: Site) -> None:
    url = site.database_url()
    assert "sslmode=verify-full" in url
    site.post("Over TLS")
    login = urlsplit(url).username
    sessions = site.psql(
        "SELECT DISTINCT usename, ssl, client_addr IS NULL FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    assert sessions == f"{login}|t|f"
    version = site.db.sh("ls /etc/postgresql")
    assert version == ("15" if site.db.name == site.app.name else "17")


def test_the_application_may_only_work_with_rows(site: Site) -> None:
    said = site.probe(
        "SELECT count(*) FROM posts",
        "CREATE TABLE mine (x int)",
        "CREATE TEMPORARY TABLE mine (x int)",
        "CREATE SCHEMA mine",
        "ALTER TABLE posts ADD COLUMN mine int",
        "DROP TABLE posts",
        "TRUNCATE posts",
        "CREATE ROLE mine",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT rolpassword FROM pg_authid",
    )
    assert int(said[0]) >= 0
    assert "must be owner" in said[4]
    assert "must be owner" in said[5]
    assert [answer for answer in said[1:] if DENIED not in answer] == []


def test_it_reads_no_other_database(site: Site) -> None:
    for other in ("postgres", "template1"):
        url = site.database_url().replace(f"/{APP}?", f"/{other}?")
        said = site.probe("SELECT 1", url=url)
        assert "InvalidAuthorization" in said[0] or DENIED in said[0], said


def test_nobody_logs_in_without_tls(site: Site) -> None:
    said = site.probe("SELECT 1", encrypted=False)
    assert "no encryption" in said[0], said


def test_nobody_logs_in_from_elsewhere(site: Site) -> None:
    parts = urlsplit(site.database_url())
    # It may still be deployed to. Debian's psql is there before what it runs.
    there = "psql --version 2>/dev/null"
    wait_for(lambda: site.stranger.sh(there, check=False), 400, "psql on a server of somebody else", every=1)
    login = f"host={site.address} dbname={APP} user={parts.username} connect_timeout=5"

    def attempt(mode: str) -> str:
        return site.stranger.sh(
            f"PGPASSWORD='{parts.password}' psql '{login} sslmode={mode}' -c 'SELECT 1' 2>&1 || true"
        )

    # The firewall does not let them through; and where one would, PostgreSQL refuses them.
    assert "timeout expired" in attempt("require")
    chain, rule = "inet hardstand_firewall services", "tcp dport 5432 accept"
    added = site.db.sh(f"nft --echo --handle insert rule {chain} {rule}")
    try:
        for mode in ("require", "disable"):
            said = attempt(mode)
            assert "no pg_hba.conf entry" in said, said
    finally:
        site.db.sh(f"nft delete rule {chain} handle {added.rpartition('handle ')[2]}")


def test_the_owners_password_is_not_the_applications_to_read(site: Site) -> None:
    owner = site.psql("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
    assert owner != urlsplit(site.database_url()).username
    assert owner not in site.app.sh(f"cat {ROOT}/current/.env")
    left = site.app.sh(f"grep -rlsE '//{owner}:' /srv /etc /var/log /var/tmp /tmp || true")
    assert left == ""


@pytest.mark.once
def test_too_few_connections_are_refused_before_anything_changes(site: Site) -> None:
    run = site.refuse("deploy.yml", postgresql_max_connections=12)
    assert "postgresql_max_connections" in run.output
    assert re.search(r"\b12\b", run.output)
    assert run.changed == 0
