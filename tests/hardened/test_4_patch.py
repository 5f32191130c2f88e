"""Updates of the operating system: one server at a time, nothing where nothing is due, an end at the first failure.

Those of a fleet that serves, and of a server that dies of one, are in tests/fleet/test_8_patch.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import updates
from tests.harness import APP, wait_for

PATCH, STATUS = "playbooks/patch.yml", "playbooks/status.yml"
# nginx as it was before it had a sandbox, and the sandbox on the disk again.
START_OUTSIDE = """set -e
mv /etc/systemd/system/nginx.service.d /run/nginx.service.d.kept
systemctl daemon-reload && systemctl restart nginx
mv /run/nginx.service.d.kept /etc/systemd/system/nginx.service.d
systemctl daemon-reload
"""
FLAG = "/run/reboot-required"


@pytest.fixture
def publish(site: Any) -> Iterator[Callable[..., None]]:
    """Publish updates; what they have brought is removed afterwards."""
    yield updates.publish
    for name in site.names:
        updates.remove(site.server(name))


def apps(site: Any) -> list[Any]:
    """Return the servers that the application runs on, in the inventory's order."""
    servers = [site.server(name) for name in site.names]
    return [server for server in servers if server.sh(f"test -L /srv/{APP}/run/live.sock && echo yes || true").strip()]


def starts(server: Any) -> str:
    """Return when supervisord and nginx were started."""
    found: str = server.sh("systemctl show supervisor nginx --property ActiveEnterTimestampMonotonic")
    return found


def test_nothing_is_touched_where_nothing_is_due(site: Any) -> None:
    # Whatever Debian has published since the servers were made.
    assert site.play(PATCH, patch_reboot="never").code == 0
    servers = apps(site)
    before = [starts(server) for server in servers]
    done = site.play(PATCH, patch_reboot="never")
    assert (done.code, done.changed) == (0, 0)
    assert "nothing to do" in done.output
    assert [starts(server) for server in servers] == before


@pytest.mark.exhaustive
def test_an_update_comes_and_the_lock_is_given_back(site: Any, publish: Callable[..., None]) -> None:
    server = apps(site)[0]
    publish(server, 1)
    publish(server, 2)
    done = site.play(PATCH, patch_reboot="never")
    assert done.code == 0, done.output
    assert f"1 updated: {updates.PACKAGE}" in done.output
    assert updates.state(server) == "2 ii"
    assert server.sh(f"ls /run/lock/hardstand-{APP}.lock 2> /dev/null || true") == ""
    assert site.play(STATUS, status_fail=False).code == 0


def notes(site: Any) -> list[str]:
    """Return what the status says that waits."""
    said = site.expect(STATUS, status_format="json", status_fail=False).output
    (line,) = (line for line in said.splitlines() if line.startswith("{"))
    return [note["text"] for note in json.loads(line)["notes"]]


def test_the_status_says_what_waits_until_it_is_done(site: Any) -> None:
    server = apps(site)[0]
    assert notes(site) == []
    server.sh(f"touch {FLAG} && echo {updates.PACKAGE} > {FLAG}.pkgs")
    server.sh(START_OUTSIDE)
    try:
        reboot, outside = notes(site)
        assert f"an update of {updates.PACKAGE}" in reboot
        assert outside.startswith("nginx.service started before its sandbox")
        done = site.play(PATCH, patch_reboot="never")
        assert "restarted nginx.service" in done.output, done.output
        assert notes(site) == [reboot]
    finally:
        server.sh(f"rm {FLAG} {FLAG}.pkgs")
    assert notes(site) == []


@pytest.mark.once(on="debian12")
def test_it_ends_at_the_first_failure_and_goes_on_later(site: Any, publish: Callable[..., None]) -> None:
    servers = apps(site)
    for server in servers:
        publish(server, 1)
        publish(server, 2, postinst="exit 1")
    done = site.play(PATCH, patch_reboot="never")
    assert done.code != 0
    assert "run playbooks/patch.yml again" in done.output
    assert server.sh(f"ls /run/lock/hardstand-{APP}.lock 2> /dev/null || true") == ""
    # dpkg's own word for a package whose script failed; the servers after the first have not seen it.
    states = [updates.state(server) for server in servers]
    assert states[0].startswith("2 iF")
    assert states[1:] == ["1 ii"] * (len(servers) - 1)

    for server in servers:
        publish(server, 3)
    assert site.play(PATCH, patch_reboot="never").code == 0
    assert {updates.state(server) for server in servers} == {"3 ii"}
    assert site.public.answers()


@pytest.mark.exhaustive
def test_a_server_that_dies_in_the_middle_is_named_and_let_in_later(site: Any, publish: Callable[..., None]) -> None:
    server = apps(site)[0]
    publish(server, 1)
    publish(server, 2, postinst=updates.HANG_ONCE)
    run = site.run(PATCH, patch_reboot="never")
    wait_for(lambda: updates.begun(server), 300, "the update is under way")
    server.kill()
    done = run.wait()
    assert done.code != 0
    assert "app1: cannot be reached: " in done.output
    assert "run playbooks/patch.yml again" in done.output

    server.boot()
    done = site.play(PATCH, patch_reboot="never")
    assert done.code == 0, done.output
    assert "let in again" in done.output
    assert updates.state(server) == "2 ii"
    assert site.public.answers()
