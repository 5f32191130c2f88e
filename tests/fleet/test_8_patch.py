"""Updates of the operating system, on a fleet that serves meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import updates
from tests.fleet.fleet import Fleet
from tests.harness import Server, wait_for
from tests.load import Load

PATCH = "playbooks/patch.yml"


@pytest.fixture
def due(fleet: Fleet) -> Iterator[list[Server]]:
    """The servers, application servers first, each with an update that waits; that of the second one hangs."""
    # Whatever Debian has published since the servers were made.
    fleet.expect(PATCH, patch_reboot="never")
    servers = [*fleet.apps.values(), fleet.lb]
    for number, server in enumerate(servers):
        updates.publish(server, 1)
        updates.publish(server, 2, postinst=updates.HANG_ONCE if number == 1 else "exit 0")
    yield servers
    for server in servers:
        if not server.running():
            server.boot()
        updates.remove(server)


@pytest.mark.usefixtures("release")
def test_nobody_notices_updates_nor_a_server_that_dies_of_one(fleet: Fleet, due: list[Server]) -> None:
    before = fleet.release()
    first, second, *others = due
    with Load(fleet.target(clients=4, pause=0.02, slow_clients=3)) as load:
        run = fleet.run(PATCH, patch_reboot="never")
        wait_for(lambda: updates.begun(second), 300, f"the update of {second.name} is under way")
        # Its requests had ended before.
        assert fleet.drained() == {second.name}
        second.kill()
        done = run.wait()
        assert done.code != 0
        assert f"{second.name}: cannot be reached: " in done.output
        assert "run playbooks/patch.yml again" in done.output
        assert fleet.drained() == {second.name}
        assert updates.state(first) == "2 ii"
        assert [updates.state(server) for server in others] == ["1 ii"] * len(others)

        second.boot()
        done = fleet.expect(PATCH, patch_reboot="never")
        assert "let in again" in done.output
        report = load.stop()
    assert report.kinds() == []
    assert report.releases() == {before}
    assert fleet.drained() == set()
    assert fleet.locked() == []
    assert [updates.state(server) for server in due] == ["2 ii"] * len(due)
    assert set(fleet.who_answers().served["start"]) == set(fleet.apps)
