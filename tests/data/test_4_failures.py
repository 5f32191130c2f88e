"""A database that goes away and comes back."""

from __future__ import annotations

from tests.data.site import ARCHIVE_TIMEOUT, Site, Writers
from tests.harness import wait_for


def test_a_stopped_database_is_not_ready_and_a_started_one_is(site: Site) -> None:
    masters = site.app.gunicorns()
    # With its instances named: systemctl does not wait for those of a unit that only stands for them.
    site.db.sh("systemctl stop postgresql 'postgresql@*'")
    try:
        assert site.readiness() == 503
        assert site.app.request("GET", "/api/posts").status == 503
        assert site.app.request("GET", "/health/live").status == 200
    finally:
        site.db.sh("systemctl start postgresql")
    site.wait_until_ready(20)
    site.post("After a stop")
    assert site.app.gunicorns() == masters, "no worker had to be replaced"


def test_a_restart_under_load_loses_nothing(site: Site) -> None:
    with Writers(site, "restart") as writers:
        wait_for(lambda: writers.written() > 50, 30, "posts are written")
        site.db.sh("systemctl restart 'postgresql@*'")
        before = writers.written()
        wait_for(lambda: writers.written() > before + 50, 30, "posts are written again")
    assert set(writers.acknowledged) <= site.titles()
    assert set(writers.statuses) <= {201, 503}, writers.statuses
    # What is lost at most does not depend on when PostgreSQL was started.
    site.post("After the restart")
    segment = site.psql("SELECT pg_walfile_name(pg_current_wal_insert_lsn() - 1)")
    site.wait_until_archived(segment, ARCHIVE_TIMEOUT + 10)


def test_what_was_acknowledged_survives_the_loss_of_power(site: Site) -> None:
    with Writers(site, "power") as writers:
        wait_for(lambda: writers.written() > 100, 30, "posts are written")
        site.db.kill()
    site.db.boot()
    site.app.refresh()
    site.wait_until_ready()
    written = site.titles()
    missing = [title for title in writers.acknowledged if title not in written]
    assert missing == []
    site.post("After the loss of power")
