"""Preflight of a fleet: which servers take part, in which order they are locked, and that all are locked or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.local_project import LOCK, UNLOCK, LocalProject
from tests.release_support import eventually
from tests.role_templates import evaluate

GROUPS = {"all": ["app1", "app2", "app3", "lb1"], "app": ["app1", "app2", "app3"], "lb": ["lb1", "app1"]}
FLEET = ["app1", "app2", "app3", "lb1"]


def of_preflight(expression: str, play: list[str] = FLEET, **variables: Any) -> Any:
    """Return what a variable of the role comes to in a play of these servers."""
    return evaluate("preflight", expression, **{"groups": GROUPS, "ansible_play_hosts_all": play} | variables)


class TestWhoTakesPart:
    def problems(self, play: list[str] = FLEET, **variables: Any) -> list[str]:
        found: list[str] = of_preflight("_preflight_fleet_problems", play, **variables)
        return found

    @pytest.mark.parametrize(
        "without", ["", [], "app3", ["app3"], "app2,app3", " app2 , app3 ", ["app2", "app3"], "app3,", "lb1"]
    )
    def test_all_but_those_that_a_deploy_does_without(self, without: str | list[str]) -> None:
        assert self.problems(preflight_without=without) == []
        names = [name for name in FLEET if name in without]
        assert of_preflight("_preflight_without", preflight_without=without) == names

    def test_one_that_there_is_not_is_named_with_those_that_there_are(self) -> None:
        assert self.problems(preflight_without="app2,ap3,x") == [
            f"preflight_without names {name}, which is no server of this inventory (app1, app2, app3, lb1)."
            for name in ("ap3", "x")
        ]

    @pytest.mark.parametrize(
        ("play", "without"), [(FLEET, "app1,app2,app3"), (["lb1"], "app1,app2,app3"), ([], ["app1", "app2", "app3"])]
    )
    def test_one_application_server_at_least(self, play: list[str], without: str | list[str]) -> None:
        problem, *_ = self.problems(play, preflight_without=without)
        assert problem == "No server of group app takes part in this run; look at --limit and preflight_without."

    def test_a_limit_does_not_split_a_fleet(self) -> None:
        (problem,) = self.problems(["app1", "lb1"])
        assert problem.startswith("--limit leaves out app2, app3, and a fleet is deployed to as a whole")
        assert "or leave servers out on purpose: -e preflight_without=app2,app3." in problem
        (problem,) = self.problems(["app1", "lb1"], preflight_without="app2")
        assert problem.startswith("--limit leaves out app3, and")

    def test_a_limit_that_leaves_out_what_the_deploy_does_without(self) -> None:
        assert self.problems(["app1", "lb1"], preflight_without="app2,app3") == []

    def test_servers_that_are_no_fleet_may_be_chosen_among(self) -> None:
        assert self.problems(["app2"], preflight_independent_hosts=True) == []
        assert len(self.problems([], preflight_independent_hosts=True)) == 1

    @pytest.mark.parametrize(
        ("play", "without", "first"),
        [
            (FLEET, "", "app1"),
            (list(reversed(FLEET)), "", "app1"),
            (FLEET, "app1", "app2"),
            (["lb1", "app3", "app2"], "", "app2"),
        ],
    )
    def test_the_first_is_the_same_for_every_run(self, play: list[str], without: str, first: str) -> None:
        assert of_preflight("_preflight_first", play, preflight_without=without) == first


class TestWithADatabaseServer:
    GROUPS: ClassVar[dict[str, list[str]]] = {
        "all": ["app1", "app2", "db1", "b1"], "app": ["app1", "app2"], "db": ["db1"], "backup": ["b1"],
    }  # fmt: skip

    def problems(self, play: list[str] | None = None, **variables: Any) -> list[str]:
        hostvars = {name: {"inventory_hostname": name, "ansible_facts": {}} for name in self.GROUPS["all"]}
        for name, own in variables.pop("own", {}).items():
            hostvars[name] |= own
        known = {"groups": self.GROUPS, "hostvars": hostvars} | variables
        found: list[str] = of_preflight("_preflight_fleet_problems", play or self.GROUPS["all"], **known)
        return found

    def test_all_of_them_take_part(self) -> None:
        assert self.problems() == []
        (problem,) = self.problems(["app1", "app2", "db1"])
        assert problem.startswith("--limit leaves out b1, and")

    def test_no_deploy_does_without_it(self) -> None:
        (problem,) = self.problems(preflight_without="db1")
        assert problem == "preflight_without names db1, the database server: no release starts without it."

    @pytest.mark.parametrize("name", ["app2", "b1"])
    def test_who_is_left_out_must_have_an_address_that_is_known(self, name: str) -> None:
        (problem,) = self.problems(preflight_without=name)
        assert problem.startswith(f"preflight_without names {name}, and the database server has to know its address")
        assert self.problems(preflight_without=name, own={name: {"internal_address": "10.0.0.9"}}) == []

    NEEDS: ClassVar[list[dict[str, Any]]] = [
        {"host": "app1", "workers": 4, "each": 5, "connections": 40},
        {"host": "app2", "workers": 1, "each": 5, "connections": 10},
    ]

    def database(self, releases: tuple[str, str] = ("trixie", "trixie"), **variables: Any) -> list[str]:
        hostvars = {
            name: {"ansible_facts": {"distribution_release": release}}
            for name, release in zip(("db1", "b1"), releases, strict=True)
        }
        known: dict[str, Any] = {"groups": self.GROUPS, "hostvars": hostvars, "preflight_database_needs": self.NEEDS}
        found: list[str] = of_preflight("_preflight_database_problems", **known | variables)
        return found

    def test_connections_that_nobody_has_limited_are_enough(self) -> None:
        assert self.database() == []
        assert self.database(preflight_database_own_max_connections=70, preflight_database_reserved=20) == []
        assert self.database(preflight_database_max_connections=52) == []

    def test_connections_that_are_too_few_are_counted(self) -> None:
        assert self.database(
            preflight_database_own_max_connections=69,
            preflight_database_reserved=20,
            __preflight_settings={"settings_file": "inventories/prod/group_vars/all/vars.yml"},
        ) == [
            "postgresql_max_connections is 69, and this deploy may need 70 connections to the database:",
            "  app1: 4 workers × 5 connections × 2 releases during a deploy = 40",
            "  app2: 1 worker × 5 connections × 2 releases during a deploy = 10",
            "  for all else: 20",
            (
                "Raise it, or lower release_workers or DATABASE_POOL_SIZE (release_env), in"
                " inventories/prod/group_vars/all/vars.yml. Without it, it follows from the sum."
            ),
        ]

    def test_connections_of_a_managed_database_are_counted_where_its_limit_is_known(self) -> None:
        first, *_, last = self.database(preflight_database_max_connections=51)
        assert first.startswith("preflight_database_max_connections is 51, and this deploy may need 52 connections")
        assert "follows from the sum" not in last

    def test_backups_need_the_same_debian(self) -> None:
        (problem,) = self.database(("trixie", "bookworm"))
        assert problem.startswith("db1 and b1 run different releases of Debian (trixie, bookworm), and pgBackRest")


class TestWhoIsGone:
    @pytest.mark.parametrize(
        ("here", "passed", "gone"),
        [
            (["app1", "app2"], ["app1", "app2"], []),
            (["app1"], ["app1", "app2", "lb1"], ["app2"]),
            # Left out from the beginning, so nobody waits for it.
            (["app1", "app2"], ["app1", "app2", "lb1"], []),
        ],
    )
    def test_of_those_that_the_run_began_with(self, here: list[str], passed: list[str], gone: list[str]) -> None:
        groups = {**GROUPS, "preflight_passed": passed}
        assert of_preflight("_preflight_lost", groups=groups, ansible_play_hosts=here) == gone

    def test_of_this_play(self) -> None:
        lost = of_preflight("_preflight_lost_here", ansible_play_hosts=["app1", "lb1"], preflight_without="app3")
        assert lost == ["app2"]


OURS = {"path": "/lock", "token": "ours"}


class TestWhatThisRunHolds:
    @pytest.mark.parametrize(
        ("variables", "held"),
        [
            ({}, {}),
            ({"__preflight_host": {"lock": OURS}}, OURS),
            ({"__preflight_host": {"lock": {}}, "__preflight_lock": {"lock": OURS}}, OURS),
            ({"__preflight_host": {"lock": OURS}, "__preflight_lock": {"skipped": True}}, OURS),
            ({"__preflight_host": {"lock": {}}, "__preflight_lock": {"lock": {}}}, {}),
            ({"__preflight_host": {"failed": True}, "__preflight_lock": {"failed": True}}, {}),
            # A recovery is told, and gives back only what has this token.
            ({"preflight_takeover_token": "t"}, {"path": "/run/lock/hardstand-blog.lock", "token": "t"}),
            ({"preflight_takeover_token": "t", "__preflight_host": {"lock": OURS}}, OURS),
        ],
    )
    def test_is_what_it_gives_back(self, variables: dict[str, Any], held: dict[str, str]) -> None:
        assert of_preflight("_preflight_held", app_name="blog", **variables) == held


@pytest.fixture
def project(tmp_path: Path) -> LocalProject:
    """A fleet, and whatever its runs begin leaves a note."""
    made = LocalProject(tmp_path)
    made.hosts(["app1", "app2"], ["lb1"])
    return made


def deploy(project: LocalProject) -> str:
    return LOCK + project.play(project.task("note")) + UNLOCK


class TestLocks:
    def test_the_first_servers_lock_comes_before_any_other(self, project: LocalProject) -> None:
        """Of two runs at once, one gets all of them: the other holds nothing while it waits."""
        project.lock_of_another("app1")
        with project.start(deploy(project), "-e", "preflight_lock_wait=60") as run:
            eventually(lambda: "app1: waiting 60 s for the deploy of ann@laptop" in run.output(), "it waits", 30)
            assert project.locked() == ["app1"]
            (project.locks / "app1-blog.lock").unlink()
            assert run.code() == 0, run.output()
        assert {note["host"] for note in project.notes()} == {"app1", "app2"}
        assert project.locked() == []

    def test_without_the_first_it_is_the_next_ones(self, project: LocalProject) -> None:
        project.lock_of_another("app1")
        project.lock_of_another("app2")
        code, output = project.run(deploy(project), "-e", "preflight_without=app1")
        assert code == 2, output
        assert "app2 is being deployed to by ann@laptop" in output
        assert project.locked() == ["app1", "app2"]
        (project.locks / "app2-blog.lock").unlink()
        code, output = project.run(deploy(project), "-e", "preflight_without=app1")
        assert code == 0, output
        assert [note["host"] for note in project.notes()] == ["app2"]
        assert project.locked() == ["app1"]

    @pytest.mark.parametrize("gone", ["app1", "lb1"])
    def test_a_server_that_cannot_be_reached_ends_the_run_and_locks_nobody(
        self, project: LocalProject, gone: str
    ) -> None:
        unreachable = {
            "ansible_connection": "ssh",
            "ansible_host": "127.0.0.1",
            "ansible_port": 1,
            "ansible_ssh_common_args": "-F none -o BatchMode=yes",
        }
        project.hosts(["app1", "app2"], ["lb1"], **{gone: unreachable})
        code, output = project.run(deploy(project))
        assert code == 4, output
        assert f"{gone} (127.0.0.1, port 1) cannot be reached: connect to host 127.0.0.1 port 1" in output
        assert f"To deploy to the other servers without it: -e preflight_without={gone}" in output
        assert project.notes() == []
        assert project.locked() == []
        assert "did not end by itself" not in output, "there is nothing to recover"
        code, output = project.run(deploy(project), "-e", f"preflight_without={gone}")
        assert code == 0, output
        assert {note["host"] for note in project.notes()} == {"app1", "app2"} - {gone}

    def test_so_does_one_that_cannot_be_deployed_to(self, project: LocalProject) -> None:
        project.hosts(["app1", "app2"], ["lb1"], app2={"preflight_min_free_mb": 10**12})
        code, output = project.run(deploy(project))
        assert code == 2, output
        assert "make room, or lower preflight_min_free_mb" in output
        assert project.notes() == []
        assert project.locked() == [], output

    def test_a_database_with_too_few_connections_ends_the_run_and_locks_nobody(self, project: LocalProject) -> None:
        variables = {"release_workers": 2, "preflight_database_max_connections": 5, "preflight_database_check": True}
        code, output = project.run(deploy(project), "-e", json.dumps(variables))
        assert code == 2, output
        assert "preflight_database_max_connections is 5, and this deploy may need 42 connections" in output
        assert project.notes() == []
        assert project.locked() == [], output
        assert "did not end by itself" not in output

    def test_a_mistake_in_who_takes_part_locks_nobody(self, project: LocalProject) -> None:
        code, output = project.run(deploy(project), "-e", "preflight_without=app9")
        assert code == 2, output
        assert "preflight_without names app9, which is no server of this inventory (app1, app2, lb1)." in output
        assert project.locked() == []


class TestRecovery:
    """playbooks/recover.yml by hand, and how it comes by the locks."""

    def test_takes_the_locks_of_the_run_that_it_is_told_and_frees_them(self, project: LocalProject) -> None:
        for name in ("app1", "app2", "lb1"):
            project.lock_of_another(name)
        code, output = project.run("playbooks/recover.yml")
        assert code != 0, output
        assert "is being deployed to by ann@laptop" in output
        assert project.locked() == ["app1", "app2", "lb1"]
        code, output = project.run("playbooks/recover.yml", "-e", "preflight_takeover_token=theirs")
        assert code == 0, output
        assert output.count("unchanged") == 2
        assert project.locked() == []

    def test_that_only_unlocks_frees_what_has_the_token(self, project: LocalProject) -> None:
        project.lock_of_another("app1", "died")
        project.lock_of_another("app2", "theirs")
        options = ["-e", "preflight_takeover_token=died", "-e", "recover_forward=unlock"]
        code, output = project.run("playbooks/recover.yml", *options)
        assert code == 0, output
        assert project.locked() == ["app2"]
