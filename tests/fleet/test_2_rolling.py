"""Deploys and a rollback under load: clients notice nothing, whether a deploy goes well or not.

One long run; each test then judges one side of it. `bin/test --exhaustive` makes ten deploys and a rollback, and
200,000 requests, as fast as the machine allows; otherwise there is one deploy of each kind, and clients that leave the
processors some time for it. In the environment:

HARDSTAND_FLEET_REQUESTS   requests that are made at least
HARDSTAND_FLEET_CLIENTS    keep-alive clients (16, or 8), beside six whose requests take ten seconds
HARDSTAND_FLEET_NICE       niceness of ansible-playbook (10)
HARDSTAND_FLEET_SUMMARY    a file to write the numbers to, as JSON

Servers, clients and the control node share one machine here, where in life the control node is elsewhere. So that it
does not take the processors from the servers whose latency is measured, ansible-playbook runs with lower priority.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.fleet import PHASES, Fleet
from tests.harness import SLOW_SECONDS, Deploy, Repository, Run, failing_migration, wait_for
from tests.load import Load, Report

EXHAUSTIVE = os.environ.get("HARDSTAND_TESTS") == "exhaustive"
REQUESTS = int(os.environ.get("HARDSTAND_FLEET_REQUESTS", "200000" if EXHAUSTIVE else "20000"))
CLIENTS = int(os.environ.get("HARDSTAND_FLEET_CLIENTS", "16" if EXHAUSTIVE else "8"))
# Seconds between an answer and the client's next request.
PAUSE = 0 if EXHAUSTIVE else 0.01
NICE = int(os.environ.get("HARDSTAND_FLEET_NICE", "10"))
SUMMARY = os.environ.get("HARDSTAND_FLEET_SUMMARY", "")

# Two for each application server, one after another, so that no cut-over can miss them.
SLOW_CLIENTS = 6

# Seconds of load without a deploy: at the beginning, where the latency of a steady state comes from, and after each.
FIRST, BETWEEN = (20, 4) if EXHAUSTIVE else (10, 2)

# Ready until it is live, and only on the second server: the first one has been switched by then.
UNWELL = """    verdict = await readiness.check()
    instance = request.app.state.instance
    if instance.host == "{host}":
        import os

        if os.readlink("/srv/hardstand/run/live.sock") == f"{{instance.slot}}.sock":
            verdict = Verdict(ready=False, detail="unwell as soon as it is live")
"""


@dataclass
class Step:
    """One deploy of the run."""

    what: str
    good: bool
    done: Deploy
    before: str
    after: dict[str, str]
    locked: list[str]


@dataclass
class Outcome:
    """All that happened."""

    steps: list[Step] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    killed: str = ""
    blamed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good_steps(self) -> list[Step]:
        return [step for step in self.steps if step.good]

    @property
    def failed_steps(self) -> list[Step]:
        return [step for step in self.steps if not step.good]

    def summary(self) -> dict[str, Any]:
        """Return the numbers, for people and for machines."""
        groups = self.report.groups
        return {
            "requests": self.report.requests,
            "failed": self.report.failed - len(self.blamed),
            "failed_on_killed_server": len(self.blamed),
            "slow_requests": len(self.report.slow),
            "slow_requests_across_a_cut_over": sum(slow["spanned"] for slow in self.report.slow),
            "clients": CLIENTS,
            "steady": groups["steady"],
            "deploys": groups["deploy"],
            "p99_ratio": round(groups["deploy"]["p99"] / groups["steady"]["p99"], 2),
            "steps": [
                {
                    "what": step.what,
                    "exit_code": step.done.code,
                    "seconds": round(step.done.seconds, 1),
                    **self.report.windows[f"deploy {number}"],
                }
                for number, step in enumerate(self.steps)
            ],
        }


class Rolling:
    """The run while it is under way."""

    def __init__(self, fleet: Fleet, repository: Repository, load: Load) -> None:
        self.fleet, self.repository, self.load = fleet, repository, load
        self.outcome = Outcome()

    def steady(self, seconds: float) -> None:
        """Let the load go on by itself."""
        self.load.mark(f"steady {len(self.outcome.steps)}")
        time.sleep(seconds)

    def step(
        self,
        what: str,
        *,
        good: bool,
        playbook: str = "deploy.yml",
        arguments: tuple[str, ...] = ("--tags", "release"),
        meanwhile: Callable[[Run], None] | None = None,
    ) -> None:
        """Run one deploy, from one steady state to the next."""
        before = self.fleet.release()
        self.load.mark(f"deploy {len(self.outcome.steps)}")
        settings = {"release_repository": str(self.repository.path)}
        run = self.fleet.run(playbook, *arguments, nice=NICE, **settings)
        if meanwhile:
            meanwhile(run)
        done = run.wait()
        after, locked = self.fleet.serving(), self.fleet.locked()
        self.outcome.steps.append(Step(what, good, done, before, after, locked))
        assert (done.code == 0) == good, f"{what}:\n{done.output}"
        self.steady(BETWEEN)

    def deploy(self, what: str = "new commit", arguments: tuple[str, ...] = ("--tags", "release")) -> None:
        """Deploy a commit that is good."""
        self.repository.commit(what)
        self.step(what, good=True, arguments=arguments)

    @contextmanager
    def bad_commit(self) -> Iterator[None]:
        """Take back what was committed in the block, as whoever has just seen it fail does."""
        head = self.repository.git("rev-parse", "HEAD")
        yield
        self.repository.git("reset", "--quiet", "--hard", head)

    def deploy_unwell(self) -> None:
        """Deploy what does not get on with the second server, which shows when the first has switched."""
        second = list(self.fleet.apps)[1]
        with self.bad_commit():
            self.repository.edit(
                "Be unwell on one server",
                "app/health.py",
                "    verdict = await readiness.check()\n",
                UNWELL.format(host=second),
            )
            self.step("unhealthy on the second server", good=False)

    def deploy_failing_migration(self) -> None:
        """Deploy a migration that fails."""
        with self.bad_commit():
            self.repository.commit("Migrate what is not there", failing_migration(self.fleet.migration_head()))
            self.step("migration error", good=False)

    def deploy_and_lose_a_server(self) -> None:
        """Deploy, and take the power from the last server when the first has been cut over."""
        first, *_, last = self.fleet.apps

        def kill(run: Run) -> None:
            run.reaches(PHASES["switch"])
            run.reaches(rf"^changed: \[{first}\]")
            self.fleet.apps[last].kill()

        self.outcome.killed = last
        with self.bad_commit():
            self.repository.commit("Lose a server on the way")
            self.step("server killed during cut-over", good=False, meanwhile=kill)
        self.fleet.apps[last].boot()
        wait_for(lambda: "nothing" not in self.fleet.serving().values(), 60, f"{last} serves again")

    def ten_deploys_and_a_rollback(self) -> None:
        """Deploy as in a bad week."""
        self.deploy("new commit, all servers provisioned", arguments=())
        self.deploy()
        self.deploy_unwell()
        self.deploy("good after an unhealthy one")
        self.deploy_failing_migration()
        self.deploy("good after a failed migration")
        self.deploy_and_lose_a_server()
        self.deploy("good after a lost server")
        self.roll_back()
        self.deploy("new commit after a rollback")
        self.deploy()

    def one_of_each_kind(self) -> None:
        """Deploy what goes well, what fails in each way that there is, and what goes well after that."""
        self.deploy("new commit, all servers provisioned", arguments=())
        self.deploy_unwell()
        self.deploy_failing_migration()
        self.deploy_and_lose_a_server()
        self.deploy("good after a lost server")
        self.roll_back()

    def roll_back(self) -> None:
        """Go back to the release before."""
        self.step("rollback", good=True, playbook="playbooks/rollback.yml", arguments=())


@pytest.fixture(scope="module")
def outcome(fleet: Fleet, repository: Repository, pytestconfig: pytest.Config) -> Outcome:
    fleet.deploy(repository)
    with Load(fleet.target(clients=CLIENTS, pause=PAUSE, slow_clients=SLOW_CLIENTS, slow_seconds=SLOW_SECONDS)) as load:
        rolling = Rolling(fleet, repository, load)
        # Everything is warm, and the slow ones are under way.
        time.sleep(SLOW_SECONDS)
        rolling.steady(FIRST)
        if EXHAUSTIVE:
            rolling.ten_deploys_and_a_rollback()
        else:
            rolling.one_of_each_kind()
        while load.report().requests < REQUESTS:
            rolling.steady(5)
        outcome = rolling.outcome
        outcome.report = load.stop()
    outcome.blamed = fleet.blame(
        Report(failures=[failure for failure in outcome.report.failures if in_killed_window(outcome, failure)]),
        fleet.apps[outcome.killed],
    )
    tell(outcome, pytestconfig)
    return outcome


def in_killed_window(outcome: Outcome, failure: dict[str, Any]) -> bool:
    """Return whether a request failed in the deploy that lost a server."""
    number = next(number for number, step in enumerate(outcome.steps) if "killed" in step.what)
    return bool(failure["window"] == f"deploy {number}")


def tell(outcome: Outcome, config: pytest.Config) -> None:
    """Show the numbers: they are what this is about, also when all is well."""
    summary = outcome.summary()
    if SUMMARY:
        Path(SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    steps = summary.pop("steps")
    lines = [f"{name:<34} {value}" for name, value in summary.items()]
    row = "{:<42} {:>5} {:>8} {:>9} {:>7} {:>8} {:>8} {:>8}"
    lines.append(row.format("deploy", "exit", "seconds", "requests", "failed", "p50 ms", "p99 ms", "max ms"))
    for step in steps:
        numbers = (step["requests"], step["failed"], step["p50"], step["p99"], step["max"])
        lines.append(row.format(step["what"], step["exit_code"], step["seconds"], *numbers))
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n", flush=True)


def test_no_request_failed(outcome: Outcome) -> None:
    blamed = {failure["request_id"] for failure in outcome.blamed}
    others = [failure for failure in outcome.report.failures if failure["request_id"] not in blamed]
    assert others == []
    assert outcome.report.failed == len(outcome.report.failures), "more failures than the report tells"


def test_no_connection_was_closed_without_notice(outcome: Outcome) -> None:
    assert set(outcome.report.reconnected) <= {"announced"}


def test_there_were_enough_requests(outcome: Outcome) -> None:
    assert outcome.report.requests >= REQUESTS
    assert outcome.report.groups["deploy"]["requests"] > outcome.report.requests / 5


def test_the_deploys_that_had_to_fail_did(outcome: Outcome) -> None:
    assert len(outcome.steps) == (11 if EXHAUSTIVE else 6)
    assert [step.what for step in outcome.failed_steps] == [
        "unhealthy on the second server",
        "migration error",
        "server killed during cut-over",
    ]


def test_latency_during_deploys(outcome: Outcome) -> None:
    if EXHAUSTIVE:
        assert outcome.summary()["p99_ratio"] <= 3
    else:
        # Against servers that have little to do, the ratio says how busy this machine is with Ansible.
        assert outcome.report.groups["deploy"]["p99"] < 1000


def test_after_a_failure_every_reachable_server_serves_the_old_release(outcome: Outcome) -> None:
    for step in outcome.failed_steps:
        reachable = 2 if "killed" in step.what else 3
        assert list(step.after.values()) == [step.before] * reachable, step.what
        assert step.locked == []
    for number, step in enumerate(outcome.steps, 1):
        if not step.good:
            assert outcome.report.releases(f"steady {number}") == {step.before}, step.what


def test_after_a_good_deploy_every_server_serves_the_new_release(outcome: Outcome) -> None:
    for number, step in enumerate(outcome.steps, 1):
        if step.good:
            assert len(step.after) == 3
            assert len(set(step.after.values())) == 1
            new = next(iter(step.after.values()))
            assert new != step.before
            assert set(outcome.report.served[f"steady {number}"]) == set(step.after), "clients reach every server"
            assert outcome.report.releases(f"steady {number}") == {new}
            assert step.locked == []


def test_the_failing_deploys_had_been_cut_over_on_some_servers(outcome: Outcome) -> None:
    # Else nothing was switched back.
    for number, step in enumerate(outcome.steps):
        if not step.good and "migration" not in step.what:
            assert len(outcome.report.releases(f"deploy {number}")) == 2, step.what


def test_the_rollback_went_to_the_release_before(outcome: Outcome) -> None:
    rollback = next(number for number, step in enumerate(outcome.steps) if step.what == "rollback")
    assert set(outcome.steps[rollback].after.values()) == {outcome.steps[rollback - 1].before}


def test_requests_of_ten_seconds_were_under_way_at_every_cut_over(outcome: Outcome) -> None:
    hosts: set[str] = set()
    for number, step in enumerate(outcome.steps):
        if step.good:
            slow = [slow for slow in outcome.report.slow if slow["spanned"] and slow["window"] == f"deploy {number}"]
            assert len(slow) >= SLOW_CLIENTS / 2, step.what
            assert {one["release"] for one in slow} == {step.before}, step.what
            hosts |= {one["host"] for one in slow}
    # Which server a slow request is on is up to the load balancer.
    assert hosts == set(outcome.steps[0].after)


def test_the_reason_of_each_failure_is_told(outcome: Outcome) -> None:
    unwell, migration, killed = (step.done.output for step in outcome.failed_steps)
    assert "unwell as soon as it is live" in unwell
    assert "no_such_table" in migration
    assert outcome.killed in killed
