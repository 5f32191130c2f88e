"""What an operator does with the load balancer: take a server out, bring it in, close for maintenance, look around."""

from __future__ import annotations

import time

import pytest

from tests.fleet.fleet import LB_LOG, Fleet
from tests.harness import Repository, wait_for
from tests.load import Load

DRAIN, RESUME = "playbooks/drain.yml", "playbooks/resume.yml"
MAINTENANCE, STATUS = "playbooks/maintenance.yml", "playbooks/status.yml"


def connections(fleet: Fleet, name: str) -> list[str]:
    """Return the connections that the load balancer has to a server."""
    address = fleet.addresses[name]
    return fleet.lb.sh(f"ss --no-header --tcp --numeric state established dst {address}").splitlines()


@pytest.mark.usefixtures("release")
def test_drain_and_resume_under_load(fleet: Fleet) -> None:
    second = list(fleet.apps)[1]
    with Load(fleet.target(clients=8, slow_clients=3)) as load:
        wait_for(lambda: second in load.report().served.get("start", {}), 10, "requests on every server")
        fleet.expect(DRAIN, drain_host=second)
        assert fleet.drained() == {second}
        assert connections(fleet, second) == []
        load.mark("drained")
        time.sleep(3)
        assert connections(fleet, second) == []
        # It gets requests again before the playbook has ended.
        load.mark("resuming")
        fleet.expect(RESUME, resume_host=second)
        assert fleet.drained() == set()
        load.mark("resumed")
        wait_for(lambda: second in load.report().served.get("resumed", {}), 20, f"requests on {second} again")
        report = load.stop()
    assert report.kinds() == []
    assert set(report.reconnected) <= {"announced"}
    assert set(report.served["drained"]) == set(fleet.apps) - {second}
    assert set(report.served["resumed"]) == set(fleet.apps)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_draining_twice_changes_nothing(fleet: Fleet) -> None:
    first = next(iter(fleet.apps))
    try:
        fleet.expect(DRAIN, drain_host=first)
        assert fleet.expect(DRAIN, drain_host=first).changed == 0
    finally:
        fleet.expect(RESUME, resume_host=first)
    assert fleet.expect(RESUME, resume_host=first).changed == 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_the_last_server_is_not_drained(fleet: Fleet) -> None:
    *others, last = fleet.apps
    try:
        for name in others:
            fleet.expect(DRAIN, drain_host=name)
        refused = fleet.refuse(DRAIN, drain_host=last)
        assert last in refused.output
        assert fleet.drained() == set(others)
        assert fleet.lb.answers()
    finally:
        for name in others:
            fleet.expect(RESUME, resume_host=name)
    assert fleet.drained() == set()


@pytest.mark.usefixtures("release")
def test_a_server_that_an_operator_drained_stays_so_through_a_deploy(fleet: Fleet, repository: Repository) -> None:
    first = next(iter(fleet.apps))
    fleet.expect(DRAIN, drain_host=first)
    try:
        commit = repository.commit("While one is out")
        fleet.deploy(repository)
        assert fleet.check_whole().startswith(commit[:8])
        assert fleet.drained() == {first}
        assert first not in fleet.who_answers().served["start"]
    finally:
        fleet.expect(RESUME, resume_host=first)
    assert fleet.drained() == set()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_a_server_that_is_not_healthy_is_not_resumed(fleet: Fleet) -> None:
    first, server = next(iter(fleet.apps.items()))
    fleet.expect(DRAIN, drain_host=first)
    server.sh("systemctl stop supervisor")
    try:
        refused = fleet.refuse(RESUME, resume_host=first)
        assert first in refused.output
        assert fleet.drained() == {first}
    finally:
        server.sh("systemctl start supervisor")
    wait_for(lambda: fleet.serving()[first] != "nothing", 60, "the application is back")
    fleet.expect(RESUME, resume_host=first)
    assert fleet.drained() == set()


@pytest.mark.usefixtures("release")
def test_drained_servers_stay_drained_when_the_load_balancer_boots(fleet: Fleet) -> None:
    first = next(iter(fleet.apps))
    fleet.expect(DRAIN, drain_host=first)
    try:
        fleet.lb.kill()
        fleet.lb.boot()
        fleet.lb.refresh()
        wait_for(fleet.lb.answers, 60, "an answer after the boot")
        assert fleet.drained() == {first}
        assert set(fleet.who_answers().served["start"]) == set(fleet.apps) - {first}
    finally:
        fleet.expect(RESUME, resume_host=first)
    assert set(fleet.who_answers().served["start"]) == set(fleet.apps)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_kill_an_application_server_under_load(fleet: Fleet, pytestconfig: pytest.Config) -> None:
    *others, last = fleet.apps
    with Load(fleet.target(clients=8, slow_clients=3)) as load:
        wait_for(lambda: last in load.report().served.get("start", {}), 10, "requests on every server")
        load.mark("killed")
        fleet.apps[last].kill()
        time.sleep(15)
        load.mark("later")
        time.sleep(5)
        fleet.apps[last].boot()
        wait_for(lambda: fleet.serving().get(last, "nothing") != "nothing", 60, f"{last} serves again")
        load.mark("back")
        wait_for(lambda: last in load.report().served.get("back", {}), 60, f"the load balancer uses {last} again")
        report = load.stop()
    blamed = fleet.blame(report, fleet.apps[last])
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{len(blamed)} of {report.requests} requests failed: they were on the server when it was killed")
    assert len(blamed) == report.failed, report.kinds()
    assert {failure["window"] for failure in blamed} <= {"killed"}
    assert report.windows["later"]["p50"] < 500
    assert set(report.served["later"]) == set(others)


@pytest.mark.usefixtures("release")
def test_maintenance(fleet: Fleet) -> None:
    nginx = fleet.lb.pids(r"^nginx: (master|worker)")
    fleet.expect(MAINTENANCE, maintenance="on", maintenance_message="Back at noon")
    try:
        for accept, kind in (("text/html", "text/html"), ("application/json", "application/json")):
            reply = fleet.lb.request("GET", "/api/info", headers={"Accept": accept})
            assert reply.status == 503
            assert int(reply.headers["Retry-After"]) > 0
            assert reply.headers["Content-Type"].startswith(kind)
            assert b"Back at noon" in reply.body
        assert fleet.lb.request("POST", "/api/posts", {"title": "x", "body": "x"}).status == 503
        assert fleet.lb.request("GET", "/health/ready").status == 200
        status = fleet.expect(STATUS, status_fail=False)
        assert "maintenance" in status.output.lower()
        assert fleet.expect(MAINTENANCE, maintenance="on", maintenance_message="Back at noon").changed == 0
    finally:
        fleet.expect(MAINTENANCE, maintenance="off")
    assert fleet.lb.request("GET", "/api/info").status == 200
    assert fleet.expect(MAINTENANCE, maintenance="off").changed == 0
    assert fleet.lb.pids(r"^nginx: (master|worker)") == nginx


@pytest.mark.usefixtures("release")
def test_status(fleet: Fleet, repository: Repository) -> None:
    # A deploy that went well is the last one that is known.
    repository.commit("For the status")
    fleet.deploy(repository)
    release = fleet.check_whole()
    before = fleet.state()
    run = fleet.expect(STATUS)
    assert run.changed == 0
    assert fleet.state() == before
    for name in fleet.apps:
        row = next(line for line in run.output.splitlines() if name in line and release in line)
        assert "blue" in row or "green" in row
    assert fleet.lb.name in run.output


@pytest.mark.exhaustive
def test_status_of_a_fleet_that_is_not_well(fleet: Fleet, release: str) -> None:
    first, *_, last = fleet.apps
    fleet.expect(DRAIN, drain_host=first)
    fleet.apps[last].kill()
    try:
        run = fleet.refuse(STATUS)
        assert any(first in line and release in line for line in run.output.splitlines()), run.output
        assert "drained" in run.output
        assert any(last in line and "reach" in line for line in run.output.splitlines()), run.output
    finally:
        fleet.apps[last].boot()
        fleet.expect(RESUME, resume_host=first)
    wait_for(lambda: len(set(fleet.serving().values())) == 1, 60, f"{last} serves again")


def test_the_log_names_the_server_that_answered(fleet: Fleet) -> None:
    fleet.lb.request("GET", "/api/info?logged=fleet")
    line = wait_for(lambda: fleet.lb.sh(f"grep logged=fleet {LB_LOG} | tail -1", check=False), 5, "a line in the log")
    assert any(f"{fleet.addresses[name]}:" in line for name in fleet.apps)
