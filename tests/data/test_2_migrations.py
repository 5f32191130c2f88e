"""Migrations that must not happen, and those that do."""

from __future__ import annotations

import pytest

from tests import harness
from tests.data.site import Site
from tests.harness import Deploy, Repository, failing_migration, wait_for
from tests.load import Load, Target


def migration(site: Site, revision: str, message: str, statement: str) -> dict[str, str]:
    """Return the file of a migration on top of what the database has."""
    return harness.migration(site.psql("SELECT version_num FROM alembic_version"), revision, message, statement)


@pytest.fixture(scope="module")
def repository(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """What is deployed: each site has one of its own, with the migrations that went through there."""
    return Repository(tmp_path_factory.mktemp(site.app.name) / "repository")


@pytest.fixture
def served(site: Site, repository: Repository) -> str:
    """Start from the repository's HEAD; returns the release."""
    site.deploy(repository)
    return site.app.release()


def expect_refusal(site: Site, repository: Repository, release: str, **settings: object) -> Deploy:
    """Deploy what must not go live, under load; clients notice nothing, and the schema is as before."""
    before = site.schema()
    target = Target("127.0.0.1", site.app.https_port, "hardstand.test", str(site.app.ca), clients=3, pause=0.02)
    with Load(target) as load:
        run = site.refuse("deploy.yml", "--tags", "release", release_repository=str(repository.path), **settings)
        report = load.stop()
    assert report.kinds() == []
    assert report.releases() == {release}
    assert site.app.release() == release
    assert site.schema() == before
    return run


def test_failing(site: Site, repository: Repository, served: str) -> None:
    head = site.psql("SELECT version_num FROM alembic_version")
    repository.commit("Migrate what is not there", failing_migration(head))
    run = expect_refusal(site, repository, served)
    assert "no_such_table" in run.output
    assert "still serves" in run.output
    repository.drop()


def test_blocked(site: Site, repository: Repository, served: str) -> None:
    """A transaction that has only read a table keeps others from altering it, for as long as it lasts."""
    statement = 'op.add_column("posts", sa.Column("subtitle", sa.String(80)))'
    repository.commit("Add a column", migration(site, "aaaa00000001", "Add a column", statement))
    reader = site.session("BEGIN; SELECT count(*) FROM posts; SELECT pg_sleep(600)")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()"
    try:
        wait_for(lambda: site.psql(waiting) != "0", 10, "the reader has begun")
        run = expect_refusal(site, repository, served)
    finally:
        site.psql(waiting.replace("count(*)", "pg_terminate_backend(pid)"))
        reader.process.wait(30)
    assert "DATABASE_LOCK_TIMEOUT" in run.output
    assert "try again" in run.output

    # And when the reader has gone, the same commit goes live, after saying what it is about to do.
    run = site.deploy(repository)
    assert "aaaa00000001" in run.output
    assert "Add a column" in run.output
    assert "subtitle" in site.schema()


def test_dangerous(site: Site, repository: Repository, served: str) -> None:
    statement = 'op.drop_column("posts", "body")'
    repository.commit("Drop a column", migration(site, "aaaa00000002", "Drop a column", statement))
    run = expect_refusal(site, repository, served)
    assert "aaaa00000002" in run.output
    assert "ban-drop-column" in run.output
    assert "release_migration_accept" in run.output
    repository.drop()


@pytest.mark.once(on="debian12")
def test_pending_migrations_are_shown_in_a_dry_run(site: Site, repository: Repository, served: str) -> None:
    statement = 'op.add_column("posts", sa.Column("footnote", sa.String(80)))'
    repository.commit("Add a footnote", migration(site, "aaaa00000003", "Add a footnote", statement))
    before = site.schema()
    run = site.expect("deploy.yml", "--check", "--diff", release_repository=str(repository.path))
    assert "aaaa00000003" in run.output or "Add a footnote" in run.output, run.output
    assert site.schema() == before
    assert site.app.release() == served
    repository.drop()
