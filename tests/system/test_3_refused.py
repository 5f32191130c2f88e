"""Deploys that must fail: the old release goes on serving, and the operator sees why."""

from __future__ import annotations

import pytest

from tests.harness import failing_migration
from tests.system.servers import ROOT, Deploy, Repository, Server, load

# On the server that has fewer tests otherwise.
ONCE = pytest.mark.once(on="debian12")


@pytest.fixture
def deployed(server: Server, repository: Repository) -> str:
    """Start each test from a commit that serves; returns its release."""
    server.deploy("--tags", "release", release_repository=str(repository.path))
    return server.release()


def expect_refusal(server: Server, repository: Repository, release: str, **settings: object) -> Deploy:
    """Deploy what cannot be deployed, under load; nothing of it may be left."""
    programs, gunicorns = server.programs(), server.gunicorns()
    with load(server, clients=2) as seen:
        run = server.refuse("--tags", "release", release_repository=str(repository.path), **settings)
    assert seen.failures == []
    assert server.release() == release
    assert seen.releases == {release}
    assert (server.programs(), server.gunicorns()) == (programs, gunicorns)
    assert server.records()[-1]["outcome"].startswith("failed")
    return run


@ONCE
def test_import_error(server: Server, repository: Repository, deployed: str) -> None:
    repository.edit("Break the import", "app/main.py", "import logging\n", "import logging\nimport no_such_module\n")
    run = expect_refusal(server, repository, deployed)
    assert "No module named 'no_such_module'" in run.output, run.output


@ONCE
def test_never_healthy(server: Server, repository: Repository, deployed: str) -> None:
    repository.edit("Never get ready", "app/health.py", '"/ready"', '"/ready-but-elsewhere"')
    run = expect_refusal(server, repository, deployed, release_health_timeout=4)
    assert "was not healthy within 4 s" in run.output
    assert "404" in run.output
    assert "Application startup complete" in run.output or "Booting worker" in run.output, "no log of the application"


@pytest.mark.once
def test_failing_migration(server: Server, repository: Repository, deployed: str) -> None:
    head = server.sh(f"cd {ROOT}/current && .venv/bin/alembic -c app/alembic.ini heads 2>/dev/null").split()[0]
    repository.commit("Add a migration that fails", failing_migration(head))
    run = expect_refusal(server, repository, deployed)
    assert "no such table: no_such_table" in run.output
    assert "alembic" in run.output


@ONCE
def test_a_failure_that_prints_its_settings_shows_no_secret(
    server: Server, repository: Repository, deployed: str
) -> None:
    secret = server.sh(f"sed -n 's/^SECRET_KEY=\"\\(.*\\)\"$/\\1/p' {ROOT}/current/.env")
    run = server.refuse(
        *("--tags", "release", "-vvv", "--diff"),
        release_repository=str(repository.path),
        release_migrate_command="sh -c 'cat .env; exit 3'",
    )
    assert 'SECRET_KEY="********"' in run.output
    assert len(secret) >= 32
    assert secret not in run.output
    assert server.release() == deployed


@ONCE
def test_requirements_that_do_not_exist(server: Server, repository: Repository, deployed: str) -> None:
    repository.edit("Ask for too much", "requirements.txt", "fastapi==", "no-such-distribution-zq==1.0\nfastapi==")
    run = expect_refusal(server, repository, deployed)
    assert "no-such-distribution-zq" in run.output


@ONCE
def test_dependencies_without_gunicorn(server: Server, repository: Repository, deployed: str) -> None:
    repository.edit("Drop gunicorn", "requirements.txt", "gunicorn==", "# gunicorn==")
    repository.edit("And its worker", "requirements.txt", "uvicorn-worker==", "# uvicorn-worker==")
    run = expect_refusal(server, repository, deployed)
    assert "lack gunicorn" in run.output


@ONCE
def test_the_next_good_commit_goes_live(server: Server, repository: Repository) -> None:
    commit = repository.commit("A good one again")
    server.deploy("--tags", "release", release_repository=str(repository.path))
    assert server.release().startswith(commit[:8])


@ONCE
def test_unknown_branch(server: Server, repository: Repository, deployed: str) -> None:
    run = server.refuse(release_repository=str(repository.path), release_version="no-such-branch")
    assert "no-such-branch" in run.output
    assert run.changed == 0
    assert server.release() == deployed


@ONCE
def test_not_enough_disk(server: Server) -> None:
    run = server.refuse(preflight_min_free_mb=10**9)
    assert "preflight_min_free_mb" in run.output
    assert run.changed == 0


@ONCE
def test_misspelt_setting(server: Server) -> None:
    run = server.refuse(nginx_client_max_body_sizes="1m")
    assert "nginx_client_max_body_sizes" in run.output
    assert "nginx_client_max_body_size" in run.output
    assert run.changed == 0


@ONCE
def test_wrong_type(server: Server) -> None:
    run = server.refuse(release_keep="many")
    assert "release_keep" in run.output
    assert run.changed == 0
