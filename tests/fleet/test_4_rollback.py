"""Going back: to what has served well, with its own settings, in seconds, and to nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.fleet.fleet import Fleet
from tests.harness import ROOT, Repository
from tests.load import Load

ROLLBACK = "playbooks/rollback.yml"


@dataclass
class History:
    """Three releases: two that have served, one after another, and one that never did."""

    spring: str
    summer: str
    never: str


@pytest.fixture(scope="module")
def history(fleet: Fleet, repository: Repository) -> History:
    repository.commit("In spring")
    fleet.deploy(repository, release_env={"ENVIRONMENT": "spring"})
    spring = fleet.check_whole()
    head = repository.commit("In summer")
    fleet.deploy(repository, release_env={"ENVIRONMENT": "summer"})
    summer = fleet.check_whole()
    bad = repository.edit("Never get ready", "app/health.py", '"/ready"', '"/ready-but-elsewhere"')
    settings = {"release_repository": str(repository.path), "release_health_timeout": 3}
    fleet.refuse("deploy.yml", "--tags", "release", **settings)
    assert fleet.check_whole() == summer
    repository.git("reset", "--quiet", "--hard", head)
    first = next(iter(fleet.apps.values()))
    never = next(name for name in first.sh(f"ls {ROOT}/releases").split() if name.startswith(bad[:8]))
    return History(spring, summer, never)


def environment(fleet: Fleet) -> set[str]:
    """Return what several answers say the environment is."""
    return {fleet.lb.request("GET", "/api/info").json()["environment"] for _ in range(9)}


def test_what_there_is_to_go_back_to(fleet: Fleet, history: History) -> None:
    before = fleet.state()
    run = fleet.expect(ROLLBACK, rollback_list=True)
    assert "In spring" in run.output
    lines = {name: line for line in run.output.splitlines() for name in vars(history).values() if name in line}
    assert "can be gone back to" in lines[history.spring]
    assert "live" in lines[history.summer]
    assert "never" in lines.get(history.never, "never")
    assert run.changed == 0
    assert fleet.state() == before


def test_rollback_takes_seconds_and_nobody_notices(fleet: Fleet, history: History) -> None:
    assert environment(fleet) == {"summer"}
    with Load(fleet.target(clients=4, pause=0.02)) as load:
        run = fleet.expect(ROLLBACK)
        report = load.stop()
    assert report.kinds() == []
    assert report.releases() == {history.spring, history.summer}
    assert fleet.check_whole() == history.spring
    assert environment(fleet) == {"spring"}, "each release has its own .env"
    assert run.seconds < 30


def test_to_a_release_by_name(fleet: Fleet, history: History) -> None:
    fleet.expect(ROLLBACK, rollback_to=history.summer)
    assert fleet.check_whole() == history.summer
    assert environment(fleet) == {"summer"}


def test_not_to_one_that_has_never_served(fleet: Fleet, history: History) -> None:
    run = fleet.refuse(ROLLBACK, rollback_to=history.never)
    assert history.never in run.output
    assert history.spring in run.output, "the message says what there is instead"
    assert fleet.check_whole() == history.summer


def test_not_to_one_that_does_not_exist(fleet: Fleet, history: History) -> None:
    run = fleet.refuse(ROLLBACK, rollback_to="ffffffff-00000000")
    assert "ffffffff-00000000" in run.output
    assert fleet.check_whole() == history.summer


def test_it_is_recorded(fleet: Fleet, history: History) -> None:
    for server in fleet.apps.values():
        record = server.records()[-1]
        assert record["release"] == history.summer
        assert record["who"]


def test_to_the_live_one_changes_nothing(fleet: Fleet, history: History) -> None:
    fleet.expect(ROLLBACK, rollback_to=history.summer)
    assert fleet.check_whole() == history.summer
