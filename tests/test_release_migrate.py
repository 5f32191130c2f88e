"""Module release_migrate: the new code with the new settings, as the service account, and the reason when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import APP, RELEASE_ID, SERVICE, build_action, run_module

TOKEN = "s3cr3t-t0ken"


class Release:
    """A release that has a migration, and no more."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "srv"
        self.directory = self.root / "releases" / RELEASE_ID
        (self.directory / "app").mkdir(parents=True)
        (self.directory / ".venv" / "bin").mkdir(parents=True)
        (self.root / "shared").mkdir()
        (self.directory / ".env").write_text(build_action.encode_dotenv({"TOKEN": TOKEN, "A": "line\nline"}))
        self.migration = self.directory / ".venv" / "bin" / "migrate"

    def run(self, script: str, *, check: bool = False, **changes: Any) -> dict[str, Any]:
        self.migration.write_text(f"#!/bin/sh\n{script}\n")
        self.migration.chmod(0o755)
        about: dict[str, Any] = {
            "migrate_command": "migrate 'up to' head",
            "subdirectory": "app",
            "python_path": ["src", "lib"],
        }
        about |= {"export_env": False, "migrate_timeout": 10, "secret_names": ["TOKEN"]} | changes
        (self.directory / "release.json").write_text(json.dumps(about))
        deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 0, "lock": {}}
        arguments = {"app": APP, "root": str(self.root), "release_id": RELEASE_ID, "user": SERVICE, "deploy": deploy}
        return run_module("release_migrate", arguments, check=check)


@pytest.fixture
def release(open_directory: Path) -> Release:
    return Release(open_directory)


def test_runs_in_the_release_as_the_service_account(release: Release) -> None:
    script = 'id -un; pwd; printf "%s\\n" "$HOME" "$PYTHONPATH" "$HARDSTAND_RELEASE" "$1|$2" "${TOKEN:-none}"'
    result = release.run(script)
    assert result["changed"]
    application = release.directory / "app"
    path = f"{application}/src:{application}/lib"
    assert result["output"] == [
        SERVICE, str(application), f"{release.root}/shared", path, RELEASE_ID, "up to|head", "none",
    ]  # fmt: skip


def test_has_the_settings_in_its_environment_where_the_application_wants_them_there(release: Release) -> None:
    result = release.run('printf "%s\\n" "$TOKEN" "$A"', export_env=True)
    assert result["output"] == ["********", "line", "line"]


def test_a_failure_ends_the_deploy_with_its_words_and_without_secrets(release: Release) -> None:
    result = release.run(f"seq 100; echo 'password {TOKEN} is wrong' >&2; exit 3")
    lines = result["msg"].splitlines()
    assert lines[0] == "The migration `migrate 'up to' head` (release_migrate_command) failed with exit code 3."
    assert lines[-2:] == ["password ******** is wrong", "The release that was live still serves."]
    assert TOKEN not in json.dumps(result)
    record = json.loads((release.root / "deploys.jsonl").read_text())
    assert (record["outcome"], record["reason"]) == ("failed: migrate", lines[0])


def test_one_that_takes_too_long_is_ended_with_all_that_it_started(release: Release) -> None:
    result = release.run(f"echo 'waiting with {TOKEN}'; sleep 30 & wait", migrate_timeout=1)
    assert "did not finish: migrate was stopped after 1 s.\nwaiting with ********" in result["msg"]


def test_check_mode_migrates_nothing(release: Release) -> None:
    assert release.run("touch $HOME/done", check=True)["changed"]
    assert list((release.root / "shared").iterdir()) == []
