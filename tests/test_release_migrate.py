"""Module release_migrate: the new code with the new settings, as the right account, and the reason when it fails."""

from __future__ import annotations

import json
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import (
    APP,
    PYTHON,
    RELEASE_ID,
    SERVICE,
    build_action,
    eventually,
    load,
    run_module,
    start_module,
)
from tests.role_modules import result_of

PROJECT = Path(__file__).resolve().parents[1]
TOKEN = "s3cr3t-t0ken"
OWNER_PASSWORD = "0wner-passw0rd"
# An account apart from the application's.
MIGRATOR = "games"


class Release:
    """A release that has a migration, and no more."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "srv"
        self.directory = self.root / "releases" / RELEASE_ID
        (self.directory / "app").mkdir(parents=True)
        (self.directory / ".venv" / "bin").mkdir(parents=True)
        (self.root / "shared").mkdir()
        self.dotenv = self.directory / ".env"
        self.dotenv.write_text(build_action.encode_dotenv({"TOKEN": TOKEN, "A": "line\nline"}))
        self.dotenv.chmod(0o640)
        shutil.chown(self.dotenv, "root", SERVICE)
        self.migration = self.directory / ".venv" / "bin" / "migrate"
        self.about: dict[str, Any] = {
            "migrate_command": "migrate 'up to' head",
            "subdirectory": "app",
            "python_path": ["src", "lib"],
            "export_env": False,
            "migrate_timeout": 10,
            "secret_names": ["TOKEN"],
        }

    def script(self, script: str) -> None:
        self.migration.write_text(f"#!/bin/sh\n{script}\n")
        self.migration.chmod(0o755)

    def arguments(self, step: str, **changes: Any) -> dict[str, Any]:
        """Return the module's arguments; changes of what the release says go there."""
        about = {**self.about, **{name: changes.pop(name) for name in [*changes] if name in self.about}}
        (self.directory / "release.json").write_text(json.dumps(about))
        deploy = {"id": "d", "commit": "c", "who": "me", "from": "here", "started": 0, "lock": {}}
        arguments = {"app": APP, "root": str(self.root), "release_id": RELEASE_ID, "user": SERVICE, "deploy": deploy}
        if "secrets" in changes:
            changes["secrets"] = build_action.encode_dotenv(changes["secrets"])
        return {**arguments, "step": step, "application_user": SERVICE, **changes}

    def look(self, *, check: bool = False, **changes: Any) -> dict[str, Any]:
        return run_module("release_migrate", self.arguments("look", **changes), check=check)

    def run(self, script: str = "", *, check: bool = False, **changes: Any) -> dict[str, Any]:
        if script:
            self.script(script)
        return run_module("release_migrate", self.arguments("run", **changes), check=check)

    def records(self) -> list[dict[str, Any]]:
        file = self.root / "deploys.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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


def test_secrets_of_its_own_win_over_the_applications_and_come_with_an_account_of_its_own(release: Release) -> None:
    """That account reads .env like the application's, and has nothing of what the application may have written."""
    script = (
        'id -un; id -gn; echo "$HOME"; [ "$TOKEN" = ' + OWNER_PASSWORD + " ] && echo its own; head -c 2 ../.env; env"
    )
    result = release.run(script, export_env=True, secrets={"TOKEN": OWNER_PASSWORD}, user=MIGRATOR)
    group = pwd.getpwnam(SERVICE).pw_gid
    assert result["output"][:4] == [MIGRATOR, SERVICE, "/nonexistent", "its own"], group
    assert "TOKEN=********" in result["output"]
    assert OWNER_PASSWORD not in json.dumps(result)
    assert "failed" not in result


def test_the_application_cannot_see_the_secrets_of_a_migration(release: Release) -> None:
    release.script('echo $$ >"$PIDFILE"; sleep 60')
    pid_file = release.root.parent / "pid"
    secrets = {"OWNER": OWNER_PASSWORD, "PIDFILE": str(pid_file)}
    pid_file.touch()
    pid_file.chmod(0o666)
    process = start_module("release_migrate", release.arguments("run", secrets=secrets, user=MIGRATOR))
    pid = int(eventually(pid_file.read_text, "the migration runs"))
    service = pwd.getpwnam(SERVICE)
    seen = subprocess.run(
        ["cat", f"/proc/{pid}/cmdline", f"/proc/{pid}/environ"],
        user=service.pw_uid, group=service.pw_gid, extra_groups=[], capture_output=True, check=False,
    )  # fmt: skip
    assert b"migrate" in seen.stdout
    assert b"Permission denied" in seen.stderr
    assert OWNER_PASSWORD.encode() not in seen.stdout
    assert OWNER_PASSWORD.encode() in Path(f"/proc/{pid}/environ").read_bytes(), "root sees that it is there"
    process.terminate()
    process.communicate()
    found = subprocess.run(["grep", "-r", OWNER_PASSWORD, release.root], capture_output=True, check=False)
    assert found.stdout == b"", "nothing of it is on the disk"


def test_a_failure_ends_the_deploy_with_its_words_and_without_secrets(release: Release) -> None:
    script = f"seq 100; echo 'password {TOKEN} or {OWNER_PASSWORD} is wrong' >&2; exit 3"
    result = release.run(script, secrets={"OWNER": f"postgresql://o:{OWNER_PASSWORD}@db/x"})
    lines = result["msg"].splitlines()
    assert lines[0] == "The migration `migrate 'up to' head` (release_migrate_command) failed with exit code 3."
    assert lines[-2:] == ["password ******** or ******** is wrong", "The release that was live still serves."]
    assert TOKEN not in json.dumps(result)
    assert OWNER_PASSWORD not in json.dumps(result)
    (record,) = release.records()
    assert (record["outcome"], record["reason"]) == ("failed: migrate", lines[0])


def test_one_that_takes_too_long_is_ended_with_all_that_it_started(release: Release) -> None:
    result = release.run(f"echo 'waiting with {TOKEN}'; sleep 30 & wait", migrate_timeout=1)
    assert "did not finish: migrate was stopped after 1 s.\nwaiting with ********" in result["msg"]
    assert "raise release_migrate_timeout" in result["msg"]


def test_check_mode_migrates_nothing(release: Release) -> None:
    assert release.run("touch $HOME/done", check=True)["changed"]
    assert not release.run(check=True, changes=False)["changed"]
    assert list((release.root / "shared").iterdir()) == []


def test_changed_is_what_look_has_foretold(release: Release) -> None:
    assert release.run("true", changes=True)["changed"]
    assert not release.run("true", changes=False)["changed"]


def test_of_another_tool_nothing_is_known_and_nothing_is_run(release: Release) -> None:
    release.script("touch $HOME/done")
    result = release.look()
    assert (result["pending"], result["changes"], result["ran"]) == (None, True, False)
    assert list((release.root / "shared").iterdir()) == []


def test_another_tool_can_be_asked_what_is_pending(release: Release) -> None:
    release.script('[ "$1" = --plan ] && printf "  app.0001  Add it\\n\\napp.0002\\n"')
    result = release.look(pending_command="migrate --plan")
    assert result["pending"] == [
        {"revision": "app.0001", "message": "Add it"},
        {"revision": "app.0002", "message": ""},
    ]
    assert (result["changes"], result["ran"], result["changed"]) == (True, False, False)
    release.script("true")
    assert not release.look(pending_command="migrate --plan")["changes"]
    release.script(f"echo {TOKEN}; exit 1")
    said = release.look(pending_command="migrate --plan")["msg"]
    assert said.startswith("`migrate --plan` (release_migrate_pending_command) failed with exit code 1.\n********\n")


def test_a_refusal_is_on_record(release: Release) -> None:
    run_module("release_migrate", release.arguments("refuse", reason="It would break it"), check=True)
    assert release.records() == []
    run_module("release_migrate", release.arguments("refuse", reason="It would break it"))
    (record,) = release.records()
    assert (record["outcome"], record["reason"]) == ("failed: migrate", "It would break it")


def test_check_mode_says_when_the_release_is_not_built(release: Release) -> None:
    arguments = release.arguments("look")
    (release.root / "current").symlink_to(f"releases/{RELEASE_ID}")
    (release.directory / "release.json").write_text('{"commit": "abc"}')
    result = run_module("release_migrate", {**arguments, "release_id": "11111111-22222222"}, check=True)
    assert (result["built"], result["live_commit"], result["changes"]) == (False, "abc", True)
    result = run_module("release_migrate", {**arguments, "release_id": "11111111-22222222"})
    assert "is not built here" in result["msg"]


# With Alembic ---------------------------------------------------------------------------------------------------------

ENV_PY = """
import os, sqlite3
from alembic import context
from sqlalchemy import create_engine

print("whatever env.py prints")
try:
    context.get_revision_argument()
except KeyError:
    print("it looks")
else:
    with open(os.path.dirname(os.environ["DATABASE_URL"].removeprefix("sqlite:///")) + "/runs", "a") as file:
        file.write("1")
if context.is_offline_mode():
    context.configure(url="sqlite://", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(os.environ["DATABASE_URL"]).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
"""
REVISION = '''"""{message}"""
from alembic import op
revision = "{revision}"
down_revision = {follows!r}

def upgrade():
    {upgrade}
'''


@pytest.fixture(scope="session")
def alembic_venv() -> Iterator[Path]:
    """A virtualenv with Alembic and what the application needs besides, where other accounts reach it."""
    directory = Path(tempfile.mkdtemp(prefix="hardstand-alembic-"))
    directory.chmod(0o755)
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", PYTHON, directory / "venv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(directory / "venv/bin/python")]
    subprocess.run([*install, "-r", str(PROJECT / "requirements.txt")], check=True)
    yield directory / "venv"
    shutil.rmtree(directory)


class AlembicRelease(Release):
    """A release of an application with Alembic, whose database only the migration's secrets name."""

    def __init__(self, directory: Path, venv: Path) -> None:
        super().__init__(directory)
        shutil.rmtree(self.directory / ".venv")
        (self.directory / ".venv").symlink_to(venv)
        self.versions = self.directory / "app" / "migrations" / "versions"
        self.versions.mkdir(parents=True)
        (self.versions.parent / "env.py").write_text(ENV_PY)
        (self.directory / "app" / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s/migrations\n")
        database = directory / "database"
        database.mkdir()
        shutil.chown(database, MIGRATOR)
        self.file = database / "app.db"
        self.about["migrate_command"] = "alembic upgrade head"

    def arguments(self, step: str, **changes: Any) -> dict[str, Any]:
        secrets = {"DATABASE_URL": f"sqlite:///{self.file}", "OWNER": OWNER_PASSWORD}
        return super().arguments(step, **{"secrets": secrets, "user": MIGRATOR, **changes})

    def add(self, revision: str, upgrade: str, follows: str | None = None, message: str = "Change it") -> None:
        text = REVISION.format(revision=revision, follows=follows, upgrade=upgrade, message=message)
        (self.versions / f"{revision}.py").write_text(text)

    def runs(self) -> int:
        """Return how many times the migration command has run."""
        file = self.file.with_name("runs")
        return len(file.read_text()) if file.exists() else 0

    def tables(self) -> set[str]:
        with sqlite3.connect(self.file) as database:
            found = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        database.close()
        return found


@pytest.fixture
def migrating(open_directory: Path, alembic_venv: Path) -> AlembicRelease:
    release = AlembicRelease(open_directory, alembic_venv)
    release.add("r1", 'op.execute("CREATE TABLE t1 (a INT)")', message="Create t1\n\nAnd more words.")
    release.add("r2", 'op.execute("CREATE TABLE t2 (a INT)")', follows="r1")
    return release


PENDING = [{"revision": "r1", "message": "Create t1"}, {"revision": "r2", "message": "Change it"}]


@pytest.mark.parametrize("command", ["alembic upgrade head", "python -m alembic -c alembic.ini upgrade heads"])
def test_alembic_says_what_is_pending_and_nothing_is_run(migrating: AlembicRelease, command: str) -> None:
    result = migrating.look(migrate_command=command)
    assert (result["pending"], result["current"], result["changes"], result["ran"]) == (PENDING, [], True, False)
    assert migrating.tables() == set(), "not even Alembic's own table"
    assert not list(migrating.directory.rglob("__pycache__"))


def test_when_nothing_is_pending_the_command_has_run_in_the_same_breath(migrating: AlembicRelease) -> None:
    assert migrating.run()["changed"]
    assert (migrating.tables() >= {"t1", "t2"}, migrating.runs()) == (True, 1)
    result = migrating.look()
    assert migrating.runs() == 2
    assert (result["pending"], result["changes"], result["ran"], result["changed"]) == ([], False, True, False)


def test_check_mode_looks_and_runs_nothing(migrating: AlembicRelease) -> None:
    result = migrating.look(check=True)
    assert (result["pending"], result["built"], result["ran"]) == (PENDING, True, False)
    migrating.run()
    assert not migrating.look(check=True)["ran"]
    assert migrating.runs() == 1


def test_check_mode_is_no_failure_without_a_database_and_a_deploy_is(migrating: AlembicRelease) -> None:
    migrating.file.parent.chmod(0o000)
    shutil.chown(migrating.file.parent, "root")
    result = migrating.look(check=True)
    assert "unable to open database file" in result["unseen"]
    assert "failed" not in result
    result = migrating.look()
    assert "failed with exit code 1, before it has changed anything." in result["msg"]
    assert OWNER_PASSWORD not in json.dumps(result)
    assert [record["outcome"] for record in migrating.records()] == ["failed: migrate"]


def test_a_database_ahead_of_the_code_is_left_to_the_command(migrating: AlembicRelease) -> None:
    migrating.run()
    (migrating.versions / "r2.py").unlink()
    result = migrating.look()
    assert "Can't locate revision identified by 'r2'" in result["msg"]
    result = migrating.look(check=True)
    assert (result["current"], result["unknown"], result["pending"]) == (["r2"], ["r2"], [])


def test_a_failure_says_that_the_schema_is_as_it_was(migrating: AlembicRelease) -> None:
    migrating.run()
    migrating.add("r3", 'op.execute("SELECT no_such_function()")', follows="r2")
    result = migrating.run(current=migrating.look()["current"])
    assert "no such function: no_such_function" in result["msg"]
    assert "The database is as it was, at revision r2. Mend what is said above, and deploy again." in result["msg"]


def test_a_failure_says_what_has_been_committed_before_it(migrating: AlembicRelease) -> None:
    migrating.add("r3", 'op.execute("SELECT no_such_function()")', follows="r2")
    env = migrating.versions.parent / "env.py"
    env.write_text(ENV_PY.replace("connection=connection)", "connection=connection, transaction_per_migration=True)"))
    result = migrating.run(current=migrating.look()["current"])
    assert "The database was at revision none, and is now at r2" in result["msg"]


def test_an_interrupted_deploy_ends_its_migration(migrating: AlembicRelease) -> None:
    migrating.add("r3", 'import time; open("/proc/self/comm", "w").write("migrates"); time.sleep(60)', follows="r2")
    process = start_module("release_migrate", migrating.arguments("run"))

    def sleeping() -> bool:
        for name in Path("/proc").glob("[0-9]*/comm"):
            with suppress(FileNotFoundError, ProcessLookupError):
                if name.read_text() == "migrates\n":
                    return True
        return False

    eventually(sleeping, "it migrates")
    process.kill()
    with pytest.raises(AssertionError, match="the module broke"):
        result_of(process)
    eventually(lambda: not sleeping(), "it has ended")


# The application's own migrations -------------------------------------------------------------------------------------

gate = load("plugin_utils/release_gate.py")


def sql_of(venv: Path, code: Path, span: str) -> str:
    """Return the SQL of the application's migrations; there is no database."""
    env = {"DATABASE_URL": "postgresql://app@nowhere.invalid/x", "SECRET_KEY": "x" * 32}
    command = [str(venv / "bin" / "alembic"), "-c", "app/alembic.ini", "upgrade", span, "--sql"]
    return str(subprocess.run(command, cwd=code, env=env, capture_output=True, text=True, check=True).stdout)


def test_the_applications_own_migrations_pass_the_gate(alembic_venv: Path) -> None:
    text = sql_of(alembic_venv, PROJECT, "base:head")
    assert "CREATE TABLE posts" in text
    assert gate.judge(text, (15, 8)) == []


def test_expanding_passes_the_gate_and_contracting_does_not(alembic_venv: Path, open_directory: Path) -> None:
    """The README's worked example; tests/app/test_rename.py runs it."""
    shutil.copytree(PROJECT / "app", open_directory / "app", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (PROJECT / "tests/app/rename").glob("0*.py"):
        shutil.copy(file, open_directory / "app/migrations/versions")
    assert gate.judge(sql_of(alembic_venv, open_directory, "0001:0003"), (15, 8)) == []
    assert gate.judge(sql_of(alembic_venv, open_directory, "base:0004"), (15, 8)) == [], "on a fresh database"
    found = gate.judge(sql_of(alembic_venv, open_directory, "0003:0004"), (15, 8))
    assert {finding.revision for finding in found} == {"0004"}
    assert {finding.rule for finding in found} == {"ban-drop-column", "ban-drop-function"}
