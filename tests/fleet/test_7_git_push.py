"""git push to the control host: what is pushed is live, or the push is refused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.fleet import Fleet, rarely
from tests.harness import Repository, published_port, wait_for
from tests.load import Load
from tests.pusher import Pusher

WHO = "kim"


class Remote(Pusher):
    """Somebody who may push to the fleet's control host."""

    def __init__(self, fleet: Fleet, repository: Repository, directory: Path) -> None:
        self.fleet = fleet
        address, port = "127.0.0.1", published_port(fleet.control.name, 22)
        host_key = " ".join(fleet.control.sh("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2])
        known_hosts = directory / "known_hosts"
        known_hosts.write_text(f"[{address}]:{port} {host_key}\n")
        super().__init__(WHO, repository, directory, address, port, known_hosts)

    def settle(self) -> str:
        """Wait until nothing is deployed any more, and return the release that the fleet is on."""
        wait_for(lambda: not self.fleet.control.pids(r"ansible-playbook"), 240, "the end of the deploy", every=1)
        wait_for(lambda: self.fleet.locked() == [], 60, "the end of the lock", every=1)
        return self.fleet.check_whole()

    def check_agrees(self) -> None:
        """Check that the branch is what runs."""
        release = self.settle()
        wait_for(lambda: release.startswith(self.branch()[:8]), 30, "the branch is what runs", every=1)


@pytest.fixture(scope="module")
def remote(fleet: Fleet, repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    made = Remote(fleet, repository, tmp_path_factory.mktemp("pusher"))
    fleet.expect("playbooks/git_push.yml", **made.settings)
    again = fleet.expect("playbooks/git_push.yml", **made.settings)
    assert again.changed == 0, again.output
    yield made
    made.settle()


def test_a_good_push_is_live_with_its_output_shown(fleet: Fleet, remote: Remote) -> None:
    commit = remote.repository.commit("By push")
    with Load(fleet.target(clients=3, pause=0.02)) as load:
        push = remote.push()
        assert push.wait() == 0, push.output
    assert load.report().kinds() == []
    assert "TASK [release : Switch" in push.output
    release = fleet.check_whole()
    assert release.startswith(commit[:8])
    assert release in push.output, "the closing table"
    assert remote.branch() == commit
    for server in fleet.apps.values():
        assert server.records()[-1]["who"] == WHO


def test_a_broken_push_is_refused_and_changes_nothing(fleet: Fleet, remote: Remote) -> None:
    before, branch = fleet.check_whole(), remote.branch()
    head = remote.repository.git("rev-parse", "HEAD")
    remote.repository.edit("Break it", "app/main.py", "import logging\n", "import logging\nimport no_such_module\n")
    with Load(fleet.target(clients=3, pause=0.02)) as load:
        push = remote.push()
        assert push.wait() != 0
    remote.repository.git("reset", "--quiet", "--hard", head)
    assert load.report().kinds() == []
    assert load.report().releases() == {before}
    assert "No module named 'no_such_module'" in push.output, push.output
    assert "rejected" in push.output
    assert remote.settle() == before
    assert remote.branch() == branch


def test_other_branches_are_refused(fleet: Fleet, remote: Remote) -> None:
    before = fleet.check_whole()
    push = remote.push("HEAD:other")
    assert push.wait() != 0
    assert "main" in push.output
    assert remote.settle() == before


@pytest.mark.exhaustive
def test_two_pushes_at_once(fleet: Fleet, remote: Remote) -> None:
    first_commit = remote.repository.commit("The first of two")
    first = remote.push()
    first.shows("TASK [release")
    second_commit = remote.repository.commit("The second of two")
    second = remote.push()
    second.shows(WHO)
    assert first.wait() == 0, first.output
    # It has waited. Whether it is then deployed or has to be pushed again: branch and fleet agree, and it says which.
    code = second.wait()
    remote.check_agrees()
    if code:
        assert "push again" in second.output
        assert remote.branch() == first_commit
        again = remote.push()
        assert again.wait() == 0, again.output
    assert remote.branch() == second_commit
    assert fleet.check_whole().startswith(second_commit[:8])


@pytest.mark.parametrize("phase", [rarely("Build"), rarely("Switch"), rarely("Drain")])
def test_ctrl_c_of_the_pusher(fleet: Fleet, remote: Remote, phase: str) -> None:
    before, branch = fleet.check_whole(), remote.branch()
    commit = remote.repository.commit(f"Interrupted: {phase}")
    with Load(fleet.target(clients=3, pause=0.02)) as load:
        push = remote.push()
        push.shows(f"TASK [release : {phase}")
        push.signal(signal.SIGINT)
        assert push.wait() != 0
        after = remote.settle()
    assert load.report().kinds() == []
    assert after == before or (phase == "Drain" and after.startswith(commit[:8]))
    if after == before:
        assert remote.branch() == branch
    remote.check_agrees()


@pytest.mark.exhaustive
def test_a_lost_connection(fleet: Fleet, remote: Remote) -> None:
    remote.repository.commit("Connection lost")
    push = remote.push()
    push.shows("TASK [release : Build")
    push.signal(signal.SIGKILL)
    push.wait()
    remote.check_agrees()
    # And the way is free for the next.
    commit = remote.repository.commit("After a lost connection")
    push = remote.push()
    assert push.wait() == 0, push.output
    assert fleet.check_whole().startswith(commit[:8])


@pytest.mark.exhaustive
def test_a_deploy_by_hand_meanwhile_refuses_the_push_by_name(fleet: Fleet, remote: Remote) -> None:
    branch = remote.branch()
    remote.repository.commit("By hand")
    run = fleet.run("deploy.yml", "--tags", "release", release_repository=str(remote.repository.path))
    run.reaches(r"^TASK \[release : Build")
    push = remote.push()
    code = push.wait()
    assert run.wait().code == 0
    assert code != 0
    assert "deploy" in push.output
    assert remote.branch() == branch
    push = remote.push()
    assert push.wait() == 0, push.output
    remote.check_agrees()


def test_keys_open_nothing_but_the_repository(remote: Remote) -> None:
    tried = remote.run("id")
    assert tried.returncode != 0
    assert "uid=" not in tried.stdout
