"""What happens to clients, processes and files when something new is deployed, or nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.system.servers import ROOT, Reply, Repository, Server, load, wait_for

SLOW = '''
@router.get("/slow")
async def slow(seconds: float) -> str:
    """Take long."""
    import asyncio

    await asyncio.sleep(seconds)
    return "done"


'''


def add_slow_route(repository: Repository) -> str:
    """Commit a route that takes as long as it is told; returns the commit."""
    return repository.edit(
        "Add a slow route", "app/posts.py", '@router.get("/{post_id}"', SLOW + '@router.get("/{post_id}"'
    )


def test_a_new_commit_replaces_the_old_one_unnoticed(server: Server, repository: Repository) -> None:
    add_slow_route(repository)
    server.deploy("--tags", "release", release_repository=str(repository.path))
    first = server.release()
    others = server.pids(r"^nginx: (master|worker)|supervisord")
    venv = server.sh(f"readlink {ROOT}/current/.venv")
    slow: list[Reply] = []
    in_flight = threading.Thread(target=lambda: slow.append(server.request("GET", "/api/posts/slow?seconds=8")))
    in_flight.start()

    with load(server) as seen:
        wait_for(lambda: seen.requests > 200, 30, "some load")
        commit = repository.commit("Change nothing but the commit")
        server.deploy("--tags", "release", release_repository=str(repository.path))
        second = server.release()
        wait_for(lambda: second in seen.releases, 10, "the load to reach the new release")
    in_flight.join(30)

    assert seen.failures == []
    assert seen.requests > 500
    assert seen.releases == {first, second}
    assert second.startswith(commit[:8])
    assert [reply.status for reply in slow] == [200]
    assert server.pids(r"^nginx: (master|worker)|supervisord") == others
    assert server.sh(f"readlink {ROOT}/current/.venv") == venv
    assert len(server.programs()) == 1


@pytest.mark.once(on="debian12")
def test_nothing_new_changes_nothing(server: Server, repository: Repository) -> None:
    server.deploy("--tags", "release", release_repository=str(repository.path))
    before = server.pids("gunicorn|nginx|supervisord"), server.state()
    again = server.deploy(release_repository=str(repository.path))
    assert again.changed == 0, again.output
    assert (server.pids("gunicorn|nginx|supervisord"), server.state()) == before


@pytest.mark.once
def test_a_setting_alone_is_a_release(server: Server, repository: Repository) -> None:
    server.deploy("--tags", "release", release_repository=str(repository.path))
    before = server.release()
    run = server.deploy(
        "--tags", "release", release_repository=str(repository.path), release_env={"ENVIRONMENT": "autumn"}
    )
    after = server.release()
    assert after != before
    assert after.split("-")[0] == before.split("-")[0], "another commit"
    assert server.request("GET", "/api/info").json()["environment"] == "autumn"
    assert after in run.output
    # And back: the earlier release is still built.
    server.deploy("--tags", "release", release_repository=str(repository.path))
    assert server.release() == before


@pytest.mark.once
def test_a_post_outlives_a_redeploy(server: Server, repository: Repository) -> None:
    made = server.request("POST", "/api/posts", {"title": "stays", "body": "here"})
    repository.commit("Another commit")
    server.deploy("--tags", "release", release_repository=str(repository.path))
    assert server.request("GET", made.headers["Location"]).json()["title"] == "stays"


@pytest.mark.once
def test_check_mode_changes_nothing_and_shows_no_secret(server: Server, repository: Repository) -> None:
    before = server.state(), server.release()
    secret = server.sh(f"sed -n 's/^SECRET_KEY=\"\\(.*\\)\"$/\\1/p' {ROOT}/current/.env")
    repository.commit("Not deployed")
    run = server.deploy(
        "--check", "--diff", "-vvv", release_repository=str(repository.path), release_env={"ENVIRONMENT": "spring"}
    )
    assert run.changed > 0
    assert "ENVIRONMENT (new value)" in run.output
    assert secret not in run.output
    assert (server.state(), server.release()) == before


@pytest.mark.once
def test_uncommitted_changes_are_refused_or_asked_for(server: Server, repository: Repository) -> None:
    (repository.path / "app" / "static" / "uncommitted.txt").write_text("here\n")
    before = server.release()
    run = server.refuse("--tags", "release", release_repository=str(repository.path), release_allow_uncommitted=False)
    assert "uncommitted changes" in run.output
    assert server.release() == before
    server.deploy("--tags", "release", release_repository=str(repository.path), release_allow_uncommitted=True)
    assert server.request("GET", "/static/uncommitted.txt").body == b"here\n"
    again = server.deploy("--tags", "release", release_repository=str(repository.path), release_allow_uncommitted=True)
    assert again.changed == 0
    assert not (Path(repository.path) / ".git" / "index.lock").exists()
