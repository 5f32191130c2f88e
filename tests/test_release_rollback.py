"""Rollback: which releases a host has that have served, and which of them the whole fleet goes back to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail

from tests.release_support import APP, load, run_module

choice = load("action_plugins/release_choice.py")

Survey = dict[str, Any]


class Releases:
    """A host's releases and its records, without anything that runs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, *names: str) -> None:
        for name in names:
            (self.root / "releases" / name).mkdir(parents=True)
            about = {"commit": f"commit of {name}", "subject": f"Subject of {name}"}
            (self.root / "releases" / name / "release.json").write_text(json.dumps(about))

    def record(self, *outcomes: str) -> None:
        """Add lines such as "a live" to deploys.jsonl; their times count up."""
        self.root.mkdir(exist_ok=True)
        with (self.root / "deploys.jsonl").open("a") as file:
            for outcome in outcomes:
                release, _, text = outcome.partition(" ")
                when = f"2026-11-24T00:00:{file.tell() // 10:02}Z"
                file.write(json.dumps({"release": release, "outcome": text, "when": when}) + "\n")

    def live(self, name: str) -> None:
        (self.root / "current").unlink(missing_ok=True)
        (self.root / "current").symlink_to(f"releases/{name}")

    def survey(self, *, check: bool = False) -> Survey:
        """Run module release_survey."""
        result = run_module("release_survey", {"app": APP, "root": str(self.root)}, check=check)
        assert result["changed"] is False
        return result


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path / "root")


def names(survey: Survey, quality: str) -> list[str]:
    return [release["release"] for release in survey["releases"] if release[quality]]


class TestSurvey:
    def test_a_host_that_nothing_was_deployed_to(self, releases: Releases) -> None:
        assert releases.survey().items() >= {"live": "", "releases": []}.items()

    def test_releases_in_the_order_in_which_they_last_went_live(self, releases: Releases) -> None:
        releases.make("a", "b", "c", "never")
        releases.record("a live", "b live", "c live", "b failed: start", "a live")
        releases.live("a")
        survey = releases.survey()
        assert survey["live"] == "a"
        assert [release["release"] for release in survey["releases"]] == ["a", "c", "b", "never"]
        assert names(survey, "served") == names(survey, "good") == ["a", "c", "b"]
        first, *_, last = survey["releases"]
        assert (first["commit"], first["subject"]) == ("commit of a", "Subject of a")
        assert first["when"] > survey["releases"][1]["when"] > ""
        assert last["when"] == ""

    def test_only_what_is_here_and_whole(self, releases: Releases) -> None:
        releases.make("a", "b", ".c.new")
        (releases.root / "releases" / "b" / "release.json").unlink()
        releases.record("a live", "b live", "gone live")
        assert [release["release"] for release in releases.survey()["releases"]] == ["a"]

    def test_one_that_was_left_by_a_rollback_until_it_is_deployed_again(self, releases: Releases) -> None:
        releases.make("a", "b")
        releases.record("a live", "b live", "b rolled back", "a live")
        survey = releases.survey()
        assert (names(survey, "served"), names(survey, "good")) == (["a", "b"], ["a"])
        releases.record("b live")
        assert names(releases.survey(), "good") == ["b", "a"]

    def test_one_whose_deploy_failed_has_not_served(self, releases: Releases) -> None:
        releases.make("a", "b")
        releases.record("a live", "b failed: switch", "b failed: undone")
        survey = releases.survey()
        assert (names(survey, "served"), names(survey, "good")) == (["a"], ["a"])

    def test_lines_that_a_crash_cut_short_are_passed_over(self, releases: Releases) -> None:
        releases.make("a")
        releases.record("a live")
        with (releases.root / "deploys.jsonl").open("a") as file:
            file.write('[1]\n{"release": "a", "outcome": "rolled ba')
        assert names(releases.survey(check=True), "good") == ["a"]

    def test_a_rollback_that_is_recorded_by_the_last_step(self, releases: Releases) -> None:
        """The two modules agree on what they write and read."""
        releases.make("a", "b")
        (releases.root / "venvs").mkdir()
        releases.record("a live", "b live")
        releases.live("a")
        deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 0}
        arguments = {"app": APP, "root": str(releases.root), "release_id": "a", "record": True, "deploy": deploy}
        assert run_module("release_finish", {**arguments, "rolled_back": "b"})["changed"]
        survey = releases.survey()
        assert (survey["live"], names(survey, "good"), names(survey, "served")) == ("a", ["a"], ["a", "b"])

    def test_a_rollback_to_what_serves_leaves_nothing(self, releases: Releases) -> None:
        releases.make("a")
        (releases.root / "venvs").mkdir()
        releases.live("a")
        deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 0}
        arguments = {"app": APP, "root": str(releases.root), "release_id": "a", "record": True, "deploy": deploy}
        run_module("release_finish", {**arguments, "rolled_back": "a"})
        assert "rolled back" not in (releases.root / "deploys.jsonl").read_text()
        assert names(releases.survey(), "good") == ["a"]


def survey(text: str, live: str) -> Survey:
    """Return what a host says: its releases, the last one to go live first; "-" is one left, "!" never served."""
    return {
        "live": live,
        "releases": [
            {
                "release": word.rstrip("-!"),
                "commit": f"commit of {word.rstrip('-!')}",
                "subject": "Say hello",
                "when": "" if word.endswith("!") else "2026-11-24T12:00:00Z",
                "served": not word.endswith("!"),
                "good": not word.endswith(("!", "-")),
            }
            for word in text.split()
        ],
    }


def chosen(surveys: Mapping[str, Survey], wanted: str = "") -> str:
    return str(choice.choose(surveys, wanted)["release"])


def refused(surveys: Mapping[str, Survey], wanted: str = "") -> str:
    with pytest.raises(AnsibleActionFail) as error:
        choice.choose(surveys, wanted)
    return str(error.value)


class TestChoice:
    @pytest.mark.parametrize(
        ("hosts", "release"),
        [
            # The last one before the live one.
            ({"app1": ("d c b a", "d")}, "c"),
            # After a rollback from d to c: what was left is nothing to go back to.
            ({"app1": ("c d- b a", "c")}, "b"),
            ({"app1": ("d! c b a", "c")}, "b"),
            # Only what all have, and what served well on all of them.
            ({"app1": ("d c b a", "d"), "app2": ("d b a", "d")}, "b"),
            ({"app1": ("d c b a", "d"), "app2": ("d c- b a", "d")}, "b"),
            ({"app1": ("d c b a", "d"), "app2": ("d b a c!", "d")}, "b"),
            # A host that was left out of a deploy is on another release; neither is an earlier one.
            ({"app1": ("d c b a", "d"), "app2": ("c b a", "c")}, "b"),
            # The order is the first host's.
            ({"app1": ("d c b", "d"), "app2": ("d b c", "d")}, "c"),
        ],
    )
    def test_without_a_name(self, hosts: dict[str, tuple[str, str]], release: str) -> None:
        assert chosen({name: survey(*said) for name, said in hosts.items()}) == release

    @pytest.mark.parametrize("releases", ["", "d", "d c-", "d c!"])
    def test_when_there_is_none(self, releases: str) -> None:
        message = refused({"app1": survey(releases, "d")})
        assert message.startswith("No earlier release has served well on every app host. All of them have:\n  ")
        for word in releases.split():
            assert f"\n  {word.rstrip('-!')}  " in message
        assert ("(none)" in message) == (not releases)

    @pytest.mark.parametrize(
        ("wanted", "release"),
        [("1234abcd-00000001", "1234abcd-00000001"), ("1234abcd", "1234abcd-00000001"), ("9", "9999abcd-00000001")],
    )
    def test_of_one_that_is_named_by_its_beginning(self, wanted: str, release: str) -> None:
        """Also one that was left by a rollback: whoever names it wants it."""
        surveys = {"app1": survey("1235abcd-00000001 1234abcd-00000001- 9999abcd-00000001", "1235abcd-00000001")}
        assert chosen(surveys, wanted) == release

    def test_of_a_name_that_says_too_little(self) -> None:
        message = refused({"app1": survey("1235abcd-00000001 1234abcd-00000001 99", "99")}, "123")
        assert message.startswith("rollback_to=123 is the beginning of 2 releases:\n  ")
        assert "\n  1234abcd-00000001  " in message

    def test_of_one_that_only_some_hosts_have(self) -> None:
        message = refused({"app1": survey("c b a", "c"), "app2": survey("c a", "c")}, "b")
        assert message.startswith("There is no release b on every app host. All of them have:\n  c  ")
        assert "\n  b  " not in message

    @pytest.mark.parametrize("second", ["b b-not-served!", "b-not-served b"])
    def test_of_one_that_has_not_served_everywhere(self, second: str) -> None:
        surveys = {"app1": survey("b b-not-served!", "b"), "app2": survey(second, "b")}
        message = refused(surveys, "b-n")
        assert message.startswith("Release b-not-served has never served on every app host, so it is nothing to go")
        assert "deploy its commit instead" in message


class TestList:
    def test_says_what_each_release_can_be_used_for(self) -> None:
        surveys = {"app1": survey("e d c- b a!", "e"), "app2": survey("e d c b a!", "d")}
        lines = choice.describe(choice.common_releases(surveys), len(surveys))
        assert [re.split(r" {2,}", line) for line in lines] == [
            ["e", "2026-11-24T12:00:00Z", "Say hello", "live on app1"],
            ["d", "2026-11-24T12:00:00Z", "Say hello", "live on app2"],
            ["c", "2026-11-24T12:00:00Z", "Say hello", "was left by a rollback; only when named"],
            ["b", "2026-11-24T12:00:00Z", "Say hello", "can be gone back to"],
            ["a", "-", "Say hello", "has never served"],
        ]
        assert len({line.index("Say hello") for line in lines}) == 1, "in columns"

    def test_shortens_long_subjects(self) -> None:
        said = survey("0123abcd-0123abcd", "0123abcd-0123abcd")
        said["releases"][0]["subject"] = "x" * 50
        (line,) = choice.describe(choice.common_releases({"app1": said}), 1)
        assert line.endswith(f"{'x' * 39}…  live")
        assert line.startswith("0123abcd-0123abcd  2026")
