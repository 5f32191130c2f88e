"""Deploys that do not end by themselves, and those that must not begin."""

from __future__ import annotations

import getpass
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fleet.fleet import LOCK, PHASES, Fleet, rarely
from tests.harness import Repository, Run, wait_for
from tests.load import Load

# Until the first old release is stopped, going back is what leaves the fleet on one release; from then on, going on is.
GOING_BACK = ("preflight", "build", "migrate", "start", "switch")

# Phases that also a quick run interrupts: one that goes back, one that goes on.
OFTEN = ("switch", "drain")


@contextmanager
def quiet_load(fleet: Fleet) -> Iterator[None]:
    """Let a few clients ask, none of whom may notice anything."""
    with Load(fleet.target(clients=3, pause=0.02)) as running:
        yield
    seen = running.report()
    assert seen.kinds() == []
    assert seen.requests > 50


def start(fleet: Fleet, repository: Repository) -> Run:
    """Commit, and begin to roll it out."""
    repository.commit("To be interrupted")
    return fleet.run("deploy.yml", "--tags", "release", release_repository=str(repository.path))


def die(fleet: Fleet, repository: Repository, phase: str) -> None:
    """Begin to roll a commit out, and kill the control node's Ansible in a phase of it."""
    run = start(fleet, repository)
    run.reaches(PHASES[phase])
    run.signal(signal.SIGKILL)
    done = run.wait(30)
    assert done.code == -signal.SIGKILL


def check_next_deploy(fleet: Fleet, repository: Repository) -> None:
    """Roll out the same commit; it has to go live on all servers."""
    fleet.deploy(repository)
    assert fleet.check_whole().startswith(repository.git("rev-parse", "HEAD")[:8])
    assert fleet.drained() == set()


@pytest.mark.parametrize("phase", [phase if phase in OFTEN else rarely(phase) for phase in PHASES])
def test_ctrl_c(fleet: Fleet, repository: Repository, release: str, phase: str) -> None:
    with quiet_load(fleet):
        run = start(fleet, repository)
        run.reaches(PHASES[phase])
        run.signal(signal.SIGINT)
        done = run.wait(180)
        assert done.code != 0, done.output
        now = fleet.check_whole()
        if phase in GOING_BACK:
            assert now == release, done.output
        check_next_deploy(fleet, repository)


@pytest.mark.parametrize("number", [rarely(signal.SIGTERM), rarely(signal.SIGHUP)])
def test_other_signals(fleet: Fleet, repository: Repository, release: str, number: signal.Signals) -> None:
    with quiet_load(fleet):
        run = start(fleet, repository)
        run.reaches(PHASES["switch"])
        # To the one process, as a supervisor of jobs sends it.
        run.process.send_signal(number)
        done = run.wait(180)
        assert done.code != 0, done.output
        assert fleet.check_whole() == release
        check_next_deploy(fleet, repository)


@pytest.mark.exhaustive
def test_ctrl_c_twice(fleet: Fleet, repository: Repository, release: str) -> None:
    with quiet_load(fleet):
        run = start(fleet, repository)
        run.reaches(PHASES["switch"])
        run.signal(signal.SIGINT)
        time.sleep(1)
        run.signal(signal.SIGINT)
        done = run.wait(180)
        assert done.code != 0, done.output
        assert fleet.check_whole() == release


def test_killed_control_node(fleet: Fleet, repository: Repository, release: str) -> None:
    with quiet_load(fleet):
        die(fleet, repository, "switch")
        # Every server goes on with one release or the other.
        new = repository.git("rev-parse", "HEAD")[:8]
        assert all(serving == release or serving.startswith(new) for serving in fleet.serving().values())
        # Its lock is there, and the next deploy from here sees that it is a dead one's.
        assert fleet.locked() != []
        check_next_deploy(fleet, repository)


@pytest.mark.exhaustive
def test_recovery_by_hand(fleet: Fleet, repository: Repository, release: str) -> None:
    with quiet_load(fleet):
        die(fleet, repository, "switch")
        fleet.expect("playbooks/recover.yml")
        assert fleet.check_whole() == release


def test_the_second_of_two_deploys_is_refused(fleet: Fleet, repository: Repository, release: str) -> None:
    first = start(fleet, repository)
    first.reaches(PHASES["build"])
    second = fleet.refuse("deploy.yml", "--tags", "release", release_repository=str(repository.path))
    done = first.wait()
    assert done.code == 0, done.output
    assert getpass.getuser() in second.output
    assert str(first.process.pid) in second.output, "the message names the run that holds the lock"
    assert second.changed == 0
    assert fleet.check_whole() != release


@pytest.mark.exhaustive
@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_the_second_of_two_deploys_waits_if_told(fleet: Fleet, repository: Repository) -> None:
    first = start(fleet, repository)
    first.reaches(PHASES["build"])
    last = repository.commit("The second of two")
    fleet.deploy(repository, preflight_lock_wait=180)
    done = first.wait()
    assert done.code == 0, done.output
    assert fleet.check_whole().startswith(last[:8])


def test_a_part_of_the_fleet_is_refused(fleet: Fleet, repository: Repository, release: str) -> None:
    first = next(iter(fleet.apps))
    repository.commit("For a part only")
    run = fleet.refuse("deploy.yml", "--limit", first, release_repository=str(repository.path))
    assert "--limit" in run.output
    assert run.changed == 0
    assert fleet.check_whole() == release


def test_a_server_that_is_down_ends_the_deploy_or_is_left_out(
    fleet: Fleet, repository: Repository, release: str
) -> None:
    *_, last = fleet.apps
    commit = repository.commit("Without one server")
    fleet.apps[last].kill()
    try:
        run = fleet.refuse("deploy.yml", "--tags", "release", release_repository=str(repository.path))
        assert last in run.output
        assert run.changed == 0
        assert fleet.check_whole() == release
        assert fleet.drained() == set()

        fleet.deploy(repository, preflight_without=[last])
        assert fleet.check_whole().startswith(commit[:8])
        assert fleet.drained() == {last}
    finally:
        fleet.apps[last].boot()
    # It is back with the old release, which no client may see.
    wait_for(lambda: fleet.serving().get(last) == release, 60, f"{last} serves again")
    seen = fleet.who_answers()
    assert seen.kinds() == []
    assert last not in seen.served["start"]
    assert release not in seen.releases()

    fleet.deploy(repository)
    assert fleet.check_whole().startswith(commit[:8])
    assert fleet.drained() == set()
    assert set(fleet.who_answers().served["start"]) == set(fleet.apps)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_a_server_that_dies_right_after_its_cut_over(fleet: Fleet, repository: Repository) -> None:
    first = next(iter(fleet.apps))
    with Load(fleet.target(clients=3, pause=0.02)) as load:
        run = start(fleet, repository)
        run.reaches(PHASES["switch"])
        run.reaches(rf"^changed: \[{first}\]")
        fleet.apps[first].kill()
        done = run.wait(240)
        try:
            assert done.code != 0, done.output
            assert first in done.output
            # All back or all forward, depending on how far the others had come; never both.
            now = fleet.check_whole()
            load.mark("after")
            time.sleep(2)
        finally:
            fleet.apps[first].boot()
        report = load.stop()
    assert report.releases("after") == {now}, "the one that came back may have another"
    assert len(fleet.blame(report, fleet.apps[first])) == report.failed, report.kinds()
    check_next_deploy(fleet, repository)


def test_the_lock_of_another_machine_is_respected_until_forced(
    fleet: Fleet, repository: Repository, release: str
) -> None:
    # A run that has died, on a machine that nobody here can look at.
    die(fleet, repository, "migrate")
    for server in fleet.servers:
        edit = rf's/("machine": ")[^"]*/\1another/; s/@{socket.gethostname()}"/@another-machine"/'
        server.sh(f"sed -i -E '{edit}' {LOCK}", check=False)
    refused = fleet.refuse("deploy.yml", "--tags", "release", release_repository=str(repository.path))
    assert "another-machine" in refused.output
    assert "preflight_lock_force" in refused.output
    assert fleet.release() == release
    fleet.deploy(repository, preflight_lock_force=True)
    assert fleet.check_whole() != release
