"""Backups of an SQLite database."""

from __future__ import annotations

import pytest

from tests.system.servers import APP, Server, wait_for

STATE = f"/var/lib/hardstand/backups/{APP}.json"


def titles(server: Server) -> set[str]:
    """Return the titles of the newest posts."""
    return {post["title"] for post in server.request("GET", "/api/posts?limit=50").json()["items"]}


@pytest.fixture
def backed_up(server: Server) -> Server:
    """A server whose database has been backed up with one post, and has got another one since."""
    for title in ("In the backup", "After the backup"):
        reply = server.request("POST", "/api/posts", {"title": f"{title} of {server.name}", "body": "-"})
        assert reply.status == 201, reply.body
        if title == "In the backup":
            run = server.ansible("playbooks/backup.yml")
            assert run.code == 0, run.output
            assert "/var/backups/hardstand" in run.output
    return server


def test_a_backup_is_restored(backed_up: Server) -> None:
    server = backed_up
    master = server.gunicorn_master()
    run = server.ansible("playbooks/restore.yml", restore_to="latest", restore_confirm=APP, restore_host=server.name)
    assert run.code == 0, run.output
    wait_for(server.answers, 30, "the application serves again")
    assert server.gunicorn_master() != master, "nothing that had the old file open goes on"
    assert f"In the backup of {server.name}" in titles(server)
    assert f"After the backup of {server.name}" not in titles(server)
    reply = server.request("POST", "/api/posts", {"title": "After the restore", "body": "-"})
    assert reply.status == 201, "the application can write again"


@pytest.mark.once
def test_it_is_encrypted_and_can_be_restored_on_trial(backed_up: Server) -> None:
    server = backed_up
    assert server.sh("grep -rl 'In the backup' /var/backups/hardstand || true") == ""
    run = server.ansible("playbooks/restore_check.yml")
    assert run.code == 0, run.output
    assert "posts" in run.output


@pytest.mark.once
def test_one_that_fails_is_noticed_and_shown(server: Server) -> None:
    path = f"/var/backups/hardstand/{APP}"
    server.sh(f"mv {path} {path}.gone")
    try:
        assert server.ansible("playbooks/backup.yml").code != 0
        status = server.ansible("playbooks/status.yml")
        assert status.code != 0
        assert "backup" in status.output
    finally:
        server.sh(f"rm -rf {path}; mv {path}.gone {path}")
    run = server.ansible("playbooks/backup.yml")
    assert run.code == 0, run.output
