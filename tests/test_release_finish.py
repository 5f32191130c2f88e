"""Module release_finish: what stays, what goes, what is on record, and whose lock is freed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import APP, Repository, load, run_module

finish = load("library/release_finish.py")
host = load("module_utils/release_host.py")


class Fleet:
    """A server's directories, with releases that need not run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("releases", "venvs/.locks", "shared"):
            (root / name).mkdir(parents=True)
        self.lock = root.parent / "lock"

    def release(self, name: str, venv: str, commit: str = "") -> None:
        """Make a release; the virtualenv too."""
        (self.root / "releases" / name).mkdir()
        (self.root / "venvs" / venv).mkdir(exist_ok=True)
        about = json.dumps({"venv": venv, "commit": commit})
        (self.root / "releases" / name / "release.json").write_text(about)

    def finish(self, release_id: str, *, record: bool = True, check: bool = False, **changes: Any) -> dict[str, Any]:
        """Run the module."""
        lock = {"path": str(self.lock), "token": "ours"}
        deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 0, "lock": lock}
        arguments = {"app": APP, "root": str(self.root), "release_id": release_id, "record": record, "deploy": deploy}
        return run_module("release_finish", arguments | {"keep": 3, "slot": "blue"} | changes, check=check)

    def names(self, directory: str) -> list[str]:
        return sorted(path.name for path in (self.root / directory).iterdir())

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "deploys.jsonl").read_text().splitlines()]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "root")


def live(*releases: str) -> list[dict[str, Any]]:
    return [{"release": release, "outcome": "live"} for release in releases]


@pytest.mark.parametrize(
    ("served", "now", "keep", "kept"),
    [
        ("a b c d", "d", 3, "b c d"),
        ("a b c d", "d", 1, "c d"),  # what a rollback goes to is always kept
        ("a b c d", "d", 9, "a b c d"),
        ("a b a b a b", "b", 2, "a b"),
        ("a b c a", "a", 2, "a c"),
        ("", "a", 5, "a"),
    ],
)
def test_the_newest_that_have_served_are_kept(served: str, now: str, keep: int, kept: str) -> None:
    assert finish.releases_to_keep(live(*served.split()), now, keep) == set(kept.split())


def test_failed_releases_are_never_counted() -> None:
    records = [*live("a", "b"), *({"release": f"f{n}", "outcome": "failed: cut-over"} for n in range(9)), *live("c")]
    assert finish.releases_to_keep(records, "c", 3) == {"a", "b", "c"}


def test_prunes_what_is_not_needed(fleet: Fleet) -> None:
    for name, venv in (("a", "v1"), ("b", "v2"), ("c", "v3"), ("d", "v3"), ("failed", "v4")):
        fleet.release(name, venv)
    (fleet.root / "releases" / ".e.new" / "left").mkdir(parents=True)
    for record in live("a", "b", "c"):
        host.append_record(host.Layout(str(fleet.root), APP), record)
    result = fleet.finish("d")
    assert fleet.names("releases") == ["b", "c", "d"]
    assert fleet.names("venvs") == [".locks", "v2", "v3"]
    assert sorted(result["removed"]) == [".e.new", "a", "failed", "v1", "v4"]
    assert fleet.names("shared") == []


def test_lets_git_forget_commits_that_no_release_has_even_after_it_has_packed_its_references(fleet: Fleet) -> None:
    mirror = Repository(fleet.root / "repo.git", "--bare")
    tree = mirror.git("write-tree")
    old, new = (mirror.git("commit-tree", tree, "-m", message) for message in ("old", "new"))
    for commit in (old, new):
        mirror.git("update-ref", f"refs/releases/{commit}", commit)
    mirror.git("pack-refs", "--all")
    fleet.release("a", "v1", old)
    fleet.release("b", "v1", new)
    fleet.finish("b")
    assert mirror.git("for-each-ref", "--format=%(objectname)", "refs/releases") == new


def test_records_a_deploy_in_one_line(fleet: Fleet) -> None:
    fleet.release("a", "v1")
    assert fleet.finish("a")["changed"]
    (record,) = fleet.records()
    assert record["seconds"] > 0
    assert record["when"].endswith("Z")
    expected = {
        "id": "d",
        "release": "a",
        "commit": "c",
        "who": "me",
        "from": "here",
        "outcome": "live",
        "slot": "blue",
    }
    assert record.items() >= expected.items()


def test_a_deploy_that_changed_nothing_leaves_no_trace(fleet: Fleet) -> None:
    fleet.release("a", "v1")
    fleet.finish("a")
    fleet.release("b", "v2")
    result = fleet.finish("a", record=False)
    assert (result["changed"], result["removed"]) == (False, [])
    assert len(fleet.records()) == 1
    assert fleet.names("releases") == ["a", "b"]


def test_what_was_made_live_by_a_run_that_was_cut_off_is_recorded_by_the_next(fleet: Fleet) -> None:
    """Otherwise it would be pruned as one that never served."""
    fleet.release("a", "v1")
    fleet.finish("a")
    fleet.release("b", "v1")
    assert fleet.finish("b", record=False)["changed"]
    fleet.release("c", "v1")
    fleet.finish("c", keep=2)
    assert fleet.names("releases") == ["b", "c"]


def test_a_line_that_a_crash_cut_short_takes_no_other_along(fleet: Fleet) -> None:
    fleet.release("a", "v1")
    (fleet.root / "deploys.jsonl").write_text('{"release": "x", "outcome": "live"}\n7\n{"release": "y", "outc')
    fleet.finish("a")
    records = host.read_records(host.Layout(str(fleet.root), APP))
    assert [record["release"] for record in records] == ["x", "a"]


def test_check_mode_changes_nothing(fleet: Fleet) -> None:
    fleet.release("a", "v1")
    fleet.lock.write_text('{"token": "ours"}')
    assert not fleet.finish("a", check=True)["changed"]
    assert not (fleet.root / "deploys.jsonl").exists()
    assert fleet.lock.exists()


@pytest.mark.parametrize(
    ("content", "freed"),
    [('{"token": "ours"}', True), ('{"token": "theirs"}', False), ("{}", False), ("[]", False), ("garbage", False)],
)
def test_only_our_own_lock_is_freed(fleet: Fleet, content: str, freed: bool) -> None:
    fleet.release("a", "v1")
    fleet.lock.write_text(content)
    fleet.finish("a")
    assert fleet.lock.exists() is not freed


def test_the_lock_is_freed_when_pruning_fails(fleet: Fleet) -> None:
    fleet.lock.write_text('{"token": "ours"}')
    (fleet.root / "releases").rmdir()
    result = fleet.finish("a")
    assert "Release a serves, but what it replaces could not be removed" in result["msg"]
    assert not fleet.lock.exists()


def test_no_lock_is_no_error(tmp_path: Path) -> None:
    assert not host.free_lock({})
    assert not host.free_lock({"path": str(tmp_path / "lock"), "token": "ours"})
    (tmp_path / "lock").write_text("{}")
    assert not host.free_lock({"path": str(tmp_path / "lock")})


def test_a_failure_is_recorded_and_leaves_the_lock_to_the_recovery(fleet: Fleet) -> None:
    fleet.lock.write_text('{"token": "ours"}')
    lock = {"path": str(fleet.lock), "token": "ours"}
    deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 1e12, "lock": lock}
    host.record_failure(host.Layout(str(fleet.root), APP), deploy, "b", "migrate", "First line.\nSecond line.")
    (record,) = fleet.records()
    assert (record["outcome"], record["reason"], record["seconds"]) == ("failed: migrate", "First line.", 0)
    assert fleet.lock.exists()
