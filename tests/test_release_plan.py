"""Which commit a deploy runs: found once, on the control node, and refused by name when there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ansible.errors import AnsibleActionFail

from tests.release_support import Repository, alive, eventually, plan_action

resolve_path = plan_action.resolve_path
resolve_url = plan_action.resolve_url


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Two commits on main, another branch, two tags of the first commit."""
    made = Repository(tmp_path / "repository")
    made.commit({"file": "1"})
    made.git("tag", "light")
    made.git("tag", "--annotate", "-m", "Release", "annotated")
    made.git("branch", "feature/one")
    made.commit({"file": "2"})
    return made


class TestAPath:
    @pytest.mark.parametrize(
        ("version", "same_as"),
        [
            ("HEAD", "main"),
            ("main", "main"),
            ("feature/one", "main~1"),
            ("light", "main~1"),
            ("annotated", "main~1"),
            ("refs/heads/main", "main"),
        ],
    )
    def test_names_of_commits(self, repository: Repository, version: str, same_as: str) -> None:
        commit = repository.git("rev-parse", same_as)
        for name in (version, commit, commit[:9]):
            assert resolve_path(str(repository.path), name, False) == (commit, False)

    @pytest.mark.parametrize("version", ["production", "main~7", "-h", "--all", "", "light:file"])
    def test_unknown_names_are_answered_with_the_known_ones(self, repository: Repository, version: str) -> None:
        with pytest.raises(AnsibleActionFail) as error:
            resolve_path(str(repository.path), version, False)
        message = str(error.value)
        assert f"release_version is {version!r}, which {repository.path} has neither as a branch, tag nor" in message
        assert "(feature/one, main, annotated, light)" in message

    def test_a_directory_without_a_repository(self, tmp_path: Path) -> None:
        with pytest.raises(AnsibleActionFail, match="which is no git repository here"):
            resolve_path(str(tmp_path), "HEAD", False)
        with pytest.raises(AnsibleActionFail, match="No such file or directory"):
            resolve_path(str(tmp_path / "nowhere"), "HEAD", False)

    def test_a_repository_without_a_commit(self, tmp_path: Path) -> None:
        empty = Repository(tmp_path / "empty")
        with pytest.raises(AnsibleActionFail, match="it has no commit yet"):
            resolve_path(str(empty.path), "HEAD", True)

    def test_a_bare_repository(self, repository: Repository, tmp_path: Path) -> None:
        bare = tmp_path / "bare.git"
        repository.git("clone", "--quiet", "--bare", ".", str(bare))
        commit = repository.git("rev-parse", "main")
        assert resolve_path(str(bare), "HEAD", False) == (commit, False)
        assert resolve_path(str(bare), "main", True) == (commit, False)
        subprocess.run(["git", "-C", bare, "symbolic-ref", "HEAD", "refs/heads/not-there"], check=True)
        assert resolve_path(str(bare), "main", False) == (commit, False)

    def test_inside_a_hook_of_another_repository(
        self, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = Repository(tmp_path / "other")
        other.commit({"file": "other"})
        monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
        monkeypatch.setenv("GIT_INDEX_FILE", str(other.path / ".git" / "index"))
        commit = repository.git("rev-parse", "main")
        assert resolve_path(str(repository.path), "main", False) == (commit, False)


class TestUncommittedChanges:
    @pytest.fixture
    def dirty(self, repository: Repository) -> Repository:
        """One file changed, one new, one staged, one ignored."""
        repository.commit({".gitignore": "ignored\n"})
        repository.write({"file": "changed", "new/file": "new", "staged": "staged", "ignored": "ignored"})
        repository.git("add", "staged")
        return repository

    @staticmethod
    def state(repository: Repository) -> tuple[str, ...]:
        index = (repository.path / ".git" / "index").read_bytes().hex()
        return index, repository.git("for-each-ref"), repository.git("status", "--porcelain", "--branch")

    def test_are_refused_by_name(self, dirty: Repository) -> None:
        with pytest.raises(AnsibleActionFail) as error:
            resolve_path(str(dirty.path), "HEAD", False)
        message = str(error.value)
        assert "has uncommitted changes, which no commit names:\n M file\nA  staged\n?? new/\n" in message
        assert "-e release_allow_uncommitted=true" in message

    def test_become_a_commit_on_request_and_change_nothing(self, dirty: Repository) -> None:
        before = self.state(dirty)
        commit, uncommitted = resolve_path(str(dirty.path), "main", True)
        assert uncommitted
        assert self.state(dirty) == before
        assert dirty.git("rev-parse", f"{commit}^") == dirty.git("rev-parse", "main")
        assert dirty.git("ls-tree", "-r", "--name-only", commit).split() == [".gitignore", "file", "new/file", "staged"]
        assert dirty.git("show", f"{commit}:file") == "changed"

    def test_are_the_same_commit_as_long_as_they_are_the_same(
        self, dirty: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = resolve_path(str(dirty.path), "HEAD", True)
        monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody else")
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        assert resolve_path(str(dirty.path), "HEAD", True) == first
        dirty.write({"file": "changed again"})
        assert resolve_path(str(dirty.path), "HEAD", True) != first

    def test_do_not_matter_to_another_version(self, dirty: Repository) -> None:
        for allowed in (False, True):
            commit, uncommitted = resolve_path(str(dirty.path), "light", allowed)
            assert commit == dirty.git("rev-parse", "light")
            assert not uncommitted

    def test_that_are_none_are_ignored(self, repository: Repository) -> None:
        assert resolve_path(str(repository.path), "HEAD", True) == (repository.git("rev-parse", "HEAD"), False)


class TestAUrl:
    @pytest.mark.parametrize(
        ("repository", "url"),
        [
            ("https://example.org/blog.git", True),
            ("ssh://git@example.org/blog.git", True),
            ("git@example.org:me/blog.git", True),
            ("file:///srv/blog.git", True),
            ("/srv/blog", False),
            ("~/blog", False),
            ("../blog", False),
            ("/srv/a@b:c", False),
        ],
    )
    def test_is_told_from_a_path(self, repository: str, url: bool) -> None:
        assert plan_action.is_url(repository) is url

    @pytest.mark.parametrize(
        ("version", "same_as"),
        [("HEAD", "main"), ("main", "main"), ("feature/one", "main~1"), ("light", "main~1"), ("annotated", "main~1")],
    )
    def test_names_of_commits(self, repository: Repository, version: str, same_as: str) -> None:
        commit = repository.git("rev-parse", same_as)
        assert resolve_url(f"file://{repository.path}", version, "") == commit

    def test_a_branch_is_not_mistaken_for_one_that_ends_like_it(self, repository: Repository) -> None:
        repository.git("branch", "old/main", "light")
        assert resolve_url(f"file://{repository.path}", "main", "") == repository.git("rev-parse", "main")
        with pytest.raises(AnsibleActionFail, match="release_version is 'one', which release_repository has neither"):
            resolve_url(f"file://{repository.path}", "one", "")

    def test_a_full_sha_is_taken_without_asking(self) -> None:
        assert resolve_url("https://nowhere.invalid/blog.git", "a" * 40, "") == "a" * 40

    def test_an_abbreviated_sha_is_refused(self, repository: Repository) -> None:
        with pytest.raises(AnsibleActionFail, match="a commit must be given in full"):
            resolve_url(f"file://{repository.path}", repository.git("rev-parse", "main")[:9], "")

    def test_unreachable_without_showing_its_password(self) -> None:
        with pytest.raises(AnsibleActionFail) as error:
            resolve_url("http://me:hunter22@127.0.0.1:9/blog.git", "main", "")
        assert "release_repository cannot be read from the control node:" in str(error.value)
        assert "hunter22" not in str(error.value)

    def test_one_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ssh = tmp_path / "ssh"
        ssh.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
        ssh.chmod(0o700)
        monkeypatch.setenv("GIT_SSH_COMMAND", str(ssh))
        monkeypatch.setattr(plan_action, "_TIMEOUT", 1)
        with pytest.raises(AnsibleActionFail, match="does not answer within 1 s"):
            resolve_url("git@example.org:blog.git", "main", "")
        pid = int((tmp_path / "pid").read_text())
        eventually(lambda: not alive(pid), "the connection ends")


class TestOneOfSeveralWorktrees:
    def test_its_own_changes_count(self, repository: Repository, tmp_path: Path) -> None:
        repository.git("worktree", "add", "--quiet", str(tmp_path / "second"), "feature/one")
        repository.write({"file": "changed"})
        assert resolve_path(str(tmp_path / "second"), "HEAD", False)[0] == repository.git("rev-parse", "feature/one")
