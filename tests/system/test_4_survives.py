"""Crashes and reboots."""

from __future__ import annotations

import subprocess

from tests.system.servers import Server, wait_for


def renewed(server: Server, old: set[int]) -> bool:
    """Return whether new processes answer, and none of the old ones is left."""
    # In this order: the old ones answer as well until they are gone.
    now = server.gunicorns()
    return bool(now) and not now & old and server.answers()


def test_killed_master_comes_back_without_orphans(server: Server) -> None:
    old = server.gunicorns()
    server.sh(f"kill -9 {server.gunicorn_master()}")
    wait_for(lambda: renewed(server, old), 20, "new processes alone")
    assert len(server.programs()) == 1


def test_killed_supervisord_comes_back_without_orphans(server: Server) -> None:
    old = server.gunicorns()
    server.sh("kill -9 $(systemctl show -p MainPID --value supervisor)")
    wait_for(lambda: renewed(server, old), 20, "new processes alone")
    masters = server.sh("pgrep -fc 'bin/gunicorn --config' || true")
    assert int(masters or 0) >= 1


def test_reboot_brings_the_service_back(server: Server) -> None:
    release = server.release()
    made = server.request("POST", "/api/posts", {"title": "before the reboot", "body": "x"})
    subprocess.run(["podman", "restart", "--time", "30", server.name], check=True, capture_output=True, timeout=90)
    server.refresh()
    wait_for(server.answers, 60, "an answer after the reboot")
    assert server.release() == release
    assert server.request("GET", made.headers["Location"]).json()["title"] == "before the reboot"
    assert len(server.programs()) == 1
    assert server.deploy("--tags", "release", release_version="HEAD").code == 0
