"""Roles postgresql_backup and sqlite_backup: what their programs decide, and SQLite's backups for real.

pgBackRest and PostgreSQL themselves are for scenario `data`. Its outputs that are judged here were printed by them.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
FILES = PROJECT / "roles" / "postgresql_backup" / "files"
RESTIC = shutil.which("restic")


def load(path: Path) -> ModuleType:
    """Import a program's file under its own name, as its neighbours do."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


host = load(FILES / "backup_host.py")
backup = load(FILES / "postgresql_backup.py")
restore = load(FILES / "postgresql_restore.py")
sqlite = load(PROJECT / "roles" / "sqlite_backup" / "files" / "sqlite_backup.py")

Error: type[Exception] = host.BackupError


class TestMoments:
    """What an operator may write, and what becomes of it."""

    @pytest.mark.parametrize(
        "text",
        [
            "2026-11-24 18:00:00+00",
            "2026-11-24 18:00:00.000000+00:00",
            "2026-11-24T18:00Z",
            "2026-11-24 19:00+01",
            "2026-11-24 23:30:00+05:30",
        ],
    )
    def test_one_moment(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Later(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime(2027, 1, 1, tzinfo=tz)

        monkeypatch.setattr(host, "datetime", Later)
        assert host.parse_moment(text) == datetime(2026, 11, 24, 18, tzinfo=UTC)

    @pytest.mark.parametrize("text", ["yesterday", "2026-11-24", "2026-11-24 18:00:00", "2026-13-24 18:00:00+00", ""])
    def test_no_moment(self, text: str) -> None:
        with pytest.raises(Error, match="no moment with an offset"):
            host.parse_moment(text)

    def test_the_future(self) -> None:
        with pytest.raises(Error, match="is in the future"):
            host.parse_moment("2999-01-01 00:00:00+00")

    def test_a_target_becomes_options(self) -> None:
        assert restore.Target.parse("latest", "latest").options() == []
        target = restore.Target.parse("2020-11-24 19:00:00+01", "3")
        assert target.options() == [
            "--target-timeline=3",
            "--type=time",
            "--target=2020-11-24 18:00:00.000000+00",
            "--target-action=promote",
        ]
        assert str(target) == "2020-11-24 18:00:00 UTC"
        with pytest.raises(Error, match="say latest, current, or a number"):
            restore.Target.parse("latest", "two")

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
    @pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
    def test_a_schedule_comes_round(self, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TZ", zone)
        friday = datetime(2026, 11, 20, 3, tzinfo=UTC).timestamp()
        hour = 2 if zone == "UTC" else 1
        assert host.next_elapse("Sun *-*-* 02:00:00", friday) == datetime(2026, 11, 22, hour, tzinfo=UTC).timestamp()
        with pytest.raises(Error, match="does not come round"):
            host.next_elapse("someday", friday)

    def test_for_people(self) -> None:
        assert [host.people_bytes(count) for count in (7, 1500, 31_132_588, 2_100_000_000)] == [
            "7 B",
            "1.5 kB",
            "31 MB",
            "2.1 GB",
        ]
        assert [host.people_seconds(count) for count in (1, 300, 10_000, 200_000)] == ["1 s", "5 min", "3 h", "2 days"]


class TestStateFile:
    """What is known of the backups."""

    FIXED = (("kind", "postgresql"), ("max_age_hours", 26))

    def file(self, directory: Path) -> Any:
        return host.StateFile(directory / "blog.json", dict(self.FIXED))

    def test_before_the_first_backup(self, tmp_path: Path) -> None:
        state = self.file(tmp_path).read()
        assert (state["last"], state["last_success"], state["kind"]) == (None, None, "postgresql")
        assert not list(tmp_path.iterdir()), "reading writes nothing"

    def test_settings_win_over_what_was_written(self, tmp_path: Path) -> None:
        self.file(tmp_path).update(last={"ok": True})
        later = host.StateFile(tmp_path / "blog.json", {"kind": "postgresql", "max_age_hours": 8})
        assert later.read()["max_age_hours"] == 8
        assert later.read()["last"] == {"ok": True}

    def test_since_when_it_is_there(self, tmp_path: Path) -> None:
        file = self.file(tmp_path)
        created = file.update()["created"]
        (tmp_path / "blog.json").write_text(json.dumps({"created": "2020-01-01T00:00:00Z"}))
        assert file.update(last={})["created"] == "2020-01-01T00:00:00Z" != created

    def test_programs_at_once_lose_nothing(self, tmp_path: Path) -> None:
        script = (
            "import sys, runpy; from pathlib import Path; host = runpy.run_path(sys.argv[1]);"
            "file = host['StateFile'](Path(sys.argv[2]) / 'blog.json', {});"
            "[file.update(**{sys.argv[3]: number}) for number in range(200)]"
        )
        command = [sys.executable, "-c", script, str(FILES / "backup_host.py"), str(tmp_path)]
        programs = [subprocess.Popen([*command, part]) for part in ("last", "check", "archive", "restore")]
        assert [program.wait() for program in programs] == [0] * 4
        state = self.file(tmp_path).read()
        assert [state[part] for part in ("last", "check", "archive", "restore")] == [199] * 4
        assert [path.name for path in tmp_path.iterdir()] == ["blog.json"]

    def test_a_directory_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(Error, match="Cannot write"):
            host.StateFile(tmp_path / "gone" / "x.json", {}).update()

    @pytest.mark.parametrize(
        ("hours", "since", "last", "problem"),
        [
            (25, 1000, None, ""),
            (27, 1000, None, "the newest backup is 27 h old, and should be younger than 26 h"),
            (None, 0.5, None, ""),
            (None, 2, None, "there is no backup yet"),
            (
                None,
                0.5,
                {"ok": False, "message": "no room"},
                "there is no backup yet, and the first one failed: no room",
            ),
        ],
    )
    def test_how_old_is_too_old(self, hours: float | None, since: float, last: Any, problem: str) -> None:
        now = 1_800_000_000.0
        state = {"max_age_hours": 26, "created": host.stamp(now - 3600 * since), "last": last}
        newest = None if hours is None else now - 3600 * hours
        assert host.freshness_problem(state, newest, now) == problem


class TestCommands:
    """What is started ends, with all that it has started."""

    def test_a_limit_ends_the_whole_family(self, tmp_path: Path) -> None:
        ticks = tmp_path / "ticks"
        script = f"(while :; do echo >>{ticks}; sleep 0.02; done) & wait"
        with pytest.raises(Error, match=r"has not ended after 0\.3 s"):
            host.run(["sh", "-c", script], timeout=0.3)
        size = ticks.stat().st_size
        assert size > 0
        time.sleep(0.2)
        assert ticks.stat().st_size == size

    def test_what_an_earlier_run_has_left_is_ended_by_its_words(self) -> None:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "--pg1-path=/x", "--stanza=a"])
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "--pg1-path=/x", "--stanza=ab"])
        try:
            # Its command line is there when the new program has begun, and not before.
            while b"--stanza=a" not in Path(f"/proc/{left.pid}/cmdline").read_bytes():
                time.sleep(0.01)
            killer = threading.Thread(target=host.kill_all, args=(["--pg1-path=/x", "--stanza=a"],))
            killer.start()
            assert left.wait(10) == -9
            killer.join(10)
            assert other.poll() is None
        finally:
            for process in (left, other):
                process.kill()
                process.wait()

    def test_what_is_missing(self) -> None:
        with pytest.raises(Error, match="Cannot run /nowhere/x: No such file"):
            host.run(["/nowhere/x"])

    def test_one_at_a_time(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        order: list[str] = []
        inside = threading.Event()

        def first() -> None:
            with host.exclusive(tmp_path / ".lock"):
                inside.set()
                time.sleep(0.2)
                order.append("first")

        thread = threading.Thread(target=first)
        thread.start()
        inside.wait()
        with host.exclusive(tmp_path / ".lock"):
            order.append("second")
        thread.join()
        assert order == ["first", "second"]
        assert "waiting for it" in capsys.readouterr().out


class TestArchive:
    """Whether WAL reaches the repository, by what PostgreSQL says."""

    NOW = 1_800_000_000.0

    def judge(self, **changes: Any) -> dict[str, Any]:
        found = {"mode": "on", "last_archived": self.NOW - 30, "last_failed": None, "oldest_waiting": None}
        state: dict[str, Any] = backup.judge_archive(found | changes, 300, self.NOW)
        return state

    def test_it_does(self) -> None:
        state = self.judge()
        assert (state["ok"], state["lag_seconds"], state["failing_since"]) == (True, 0, None)
        assert state["last_archived"] == host.stamp(self.NOW - 30)

    def test_what_waits_for_a_moment_is_no_problem(self) -> None:
        assert self.judge(oldest_waiting=self.NOW - 20)["ok"]

    def test_a_failure_that_is_over(self) -> None:
        assert self.judge(last_failed=self.NOW - 60, oldest_waiting=self.NOW - 5)["ok"]

    def test_it_fails(self) -> None:
        state = self.judge(last_failed=self.NOW - 10, oldest_waiting=self.NOW - 70)
        assert (state["ok"], state["message"]) == (False, f"archiving fails since {host.stamp(self.NOW - 70)}")

    def test_it_lags(self) -> None:
        state = self.judge(oldest_waiting=self.NOW - 301)
        assert (state["ok"], state["lag_seconds"]) == (False, 301)

    def test_it_is_off(self) -> None:
        assert "archive_mode is off" in self.judge(mode="off")["message"]


INFO = """[{"archive":[{"database":{"id":1,"repo-key":1},"id":"17-1","max":"000000060000000000000006",
"min":"000000010000000000000001"}],
"backup":[{"archive":{"start":"000000010000000000000003","stop":"000000010000000000000004"},"backrest":{"format":5,"version":"2.55.1"},
"database":{"id":1,"repo-key":1},"error":false,"info":{"delta":31091629,"repository":{"delta":3725776,"size":3725776},
"size":31091629},"label":"20261124-191031F","lsn":{"start":"0/3000028","stop":"0/4000050"},"prior":null,"reference":null,
"timestamp":{"start":1795547431,"stop":1795547435},"type":"full"},{"archive":{"start":"000000030000000000000007",
"stop":"000000030000000000000007"},"backrest":{"format":5,"version":"2.55.1"},"database":{"id":1,"repo-key":1},"error":false,
"info":{"delta":31181741,"repository":{"delta":3726816,"size":3726816},"size":31181741},"label":"20261124-191306F",
"lsn":{"start":"0/7000028","stop":"0/7000120"},"prior":null,"reference":null,"timestamp":{"start":1795547586,"stop":1795547589},
"type":"full"}],"cipher":"aes-256-cbc","db":[{"id":1,"repo-key":1,"system-id":7711817056244391199,"version":"17"}],"name":"blog",
"repo":[{"cipher":"aes-256-cbc","key":1,"status":{"code":0,"message":"ok"}}],
"status":{"code":0,"lock":{"backup":{"held":false}},"message":"ok"}}]"""

# Of a timeline that began on the third: PostgreSQL writes down all those that it was told to follow.
HISTORY = """1\t0/5035BA8\tbefore 2026-11-24 19:11:56.723852+00


2\t0/503BDD8\tbefore 2026-11-24 19:12:36.165059+00


3\t0/D000000\tno recovery target specified

4\t0/10000000\tno recovery target specified

5\t0/503ED08\tbefore 2026-11-24 19:12:51.059393+00
"""


class TestRepository:
    """What pgBackRest says, and what is made of it."""

    @staticmethod
    def repository(output: str) -> Any:
        class Recorded(backup.Repository):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                self.stanza, self.path = "blog", ""

            def call(self, *_: str, **__: Any) -> str:
                return output

        return Recorded()

    def test_backups(self) -> None:
        info = self.repository(INFO).info()
        assert [found.label for found in info.backups] == ["20261124-191031F", "20261124-191306F"]
        assert info.backups[1][:6] == ("20261124-191306F", "full", 1795547586, 1795547589, 31181741, 3726816)
        assert [found.timeline for found in info.backups] == [1, 3]
        assert info.systems == {1: ("17", "7711817056244391199")}
        assert info.problem == ""

    def test_backups_of_a_cluster_before_this_one(self) -> None:
        listed = json.loads(INFO)
        listed[0]["db"].append({"id": 2, "repo-key": 1, "system-id": 5, "version": "17"})
        assert self.repository(json.dumps(listed)).info().backups == []

    def test_no_stanza(self) -> None:
        missing = (
            '[{"archive":[],"backup":[],"db":[],"name":"blog","status":{"code":1,"message":"missing stanza path"}}]'
        )
        assert self.repository(missing).info().problem == "missing stanza path"
        assert self.repository("[]").info().problem == "missing stanza path"

    def test_a_repository_that_is_not_reached(self) -> None:
        listed = [
            {
                "backup": [],
                "db": [],
                "name": "blog",
                "repo": [
                    {
                        "status": {
                            "code": 99,
                            "message": "[E] unable to connect to '10.0.0.9:8432'\n [E] on 9 retries: …",
                        }
                    }
                ],
                "status": {"code": 99, "message": "other"},
            }
        ]
        problem = self.repository(json.dumps(listed)).info().problem
        assert problem.startswith("the other server's pgBackRest")
        assert problem.endswith("unable to connect to '10.0.0.9:8432'")

    def test_which_backup_leads_to_a_timeline(self) -> None:
        history = backup.History.parse(6, HISTORY)
        first, second = self.repository(INFO).info().backups
        assert history.has(first)
        assert not history.has(second), "its timeline had ended before it"
        assert backup.History(1, []).has(first)
        assert [history.timeline_at(backup.lsn(at)) for at in ("0/5035BA7", "0/5035BA8", "0/503ED08")] == [1, 2, 6]

    @pytest.mark.parametrize(
        ("names", "around"),
        [
            (["1:0:FE", "1:0:FF", "1:1:0", "1:1:1"], None),
            # Longer segments: fewer to an upper part.
            (["1:0:FE", "1:1:0"], None),
            (["1:0:FE", "1:0:FF", "1:1:1"], ("1:0:FF", "1:1:1")),
            (["1:0:FE", "1:1:0", "1:1:2"], ("1:1:0", "1:1:2")),
            # Before the backup, and on a timeline that leads elsewhere.
            (["1:0:3", "1:0:FE", "1:0:FF", "2:1:0"], None),
            (["1:0:FE", "1:0:FF", "3:1:0", "3:1:5"], None),
            # One timeline goes on where another has ended.
            (["1:0:FE", "1:0:FF", "1:1:0", "2:1:0", "2:1:1"], None),
            (["1:0:FE", "1:0:FF", "2:1:1"], ("1:0:FF", "2:1:1")),
            # What the earlier one has beyond that was left behind, with its gaps.
            (["1:0:FE", "1:0:FF", "2:0:FF", "2:1:0", "1:1:7"], None),
            (["1:0:FF", "1:1:0"], ("", "1:0:FE")),
            ([], ("", "1:0:FE")),
        ],
    )
    def test_a_gap_in_the_archive(self, names: list[str], around: tuple[str, str] | None) -> None:
        def name(short: str) -> str:
            return "".join(f"{int(part, 16):08X}" for part in short.split(":")) if short else ""

        found = backup.Repository.gap([name(short) for short in names], [1, 2], name("1:0:FE"))
        assert found == (around and (name(around[0]), name(around[1])))

    def test_what_it_complains_of_is_one_line(self) -> None:
        output = (
            "2026-11-24 18:22:27.566 P00  ERROR: [055]: unable to load info file '/b/archive/blog/archive.info':\n"
            "                                    FileMissingError: unable to open missing file for read\n"
            "                                    HINT: has a stanza-create been performed?\n"
        )
        assert backup.error_of(output) == (
            "unable to load info file '/b/archive/blog/archive.info': FileMissingError: unable to open missing file for"
            " read"
        )

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            ("unable to connect to '10.0.0.9:8432': [111] Connection refused", "pgBackRest .* is not reached"),
            ("unable to find primary cluster - cannot proceed", "PostgreSQL does not answer"),
            ("no database found", "PostgreSQL does not answer"),
            ("CryptoError: unable to flush", "keeps its passphrase for good"),
        ],
    )
    def test_what_an_operator_hears_first(self, error: str, said: str) -> None:
        assert re.search(said, self.repository("").explain(error))

    def test_a_path_that_is_gone(self, tmp_path: Path) -> None:
        repository = self.repository("")
        repository.path, repository.user = str(tmp_path / "gone"), host.account(getpass.getuser())
        assert repository.explain("whatever").endswith("is not there; is its disk mounted?")
        repository.path = str(tmp_path)
        assert repository.path_problem() == ""
        assert not list(tmp_path.iterdir())


class TestRestored:
    """How a restored database is judged."""

    @pytest.mark.parametrize(
        ("before", "after", "inserted", "deleted", "rewritten", "expected"),
        [
            (10, 10, 0, 0, False, (10, 10)),  # quiet: exactly
            (10, 15, 5, 0, False, (10, 15)),
            (10, 8, 0, 2, False, (8, 10)),
            (10, 10, 100, 100, False, (0, 110)),
            (10, 3, 3, 0, True, (0, 13)),  # TRUNCATE counts no row as deleted
        ],
    )
    def test_bounds(
        self, before: int, after: int, inserted: int, deleted: int, rewritten: bool, expected: tuple[int, int]
    ) -> None:
        assert restore.bounds(before, after, inserted, deleted, rewritten) == expected

    @staticmethod
    def verdicts(
        restored: dict[str, int], after: dict[str, int] | None = None, activity: dict[str, Any] | None = None
    ) -> list[str]:
        before = {"public.items": 10, "public.users": 2}
        quiet = dict.fromkeys(before, (1, 10, 0))
        found, problems = restore.compare(
            restore.Counts(before, ["r1"]),
            restore.Counts(restored, ["r1"]),
            restore.Counts(after or before, ["r1"]),
            restore.Tables(quiet),
            restore.Tables(quiet | (activity or {})),
        )
        assert problems == []
        return [f"{one.table} {one.problem}" for one in found if one.problem]

    def test_a_quiet_database_has_to_be_the_same(self) -> None:
        assert self.verdicts({"public.items": 10, "public.users": 2}) == []
        assert self.verdicts({"public.items": 9, "public.users": 2}) == ["public.items has 9 rows instead of 10"]
        assert self.verdicts({"public.items": 10}) == ["public.users is missing"]

    def test_writers_widen_what_may_be(self) -> None:
        busy = {"public.items": (1, 40, 20)}
        assert self.verdicts({"public.items": 0, "public.users": 2}, activity=busy) == []
        (said,) = self.verdicts({"public.items": 41, "public.users": 2}, activity=busy)
        assert said == "public.items has 41 rows instead of 0 to 40"

    def test_tables_that_come_and_go_are_not_compared(self) -> None:
        assert self.verdicts({"public.items": 10, "public.users": 2}, after={"public.items": 10, "public.new": 1}) == []

    def test_the_migrations(self) -> None:
        none = restore.Tables({})
        counts = [restore.Counts({}, [revision]) for revision in ("r1", "r0", "r1")]
        _, problems = restore.compare(*counts, none, none)
        assert problems == ["its migrations are at r0, and those of the service at r1"]

    def test_the_table(self) -> None:
        lines = restore.table_of([restore.Verdict("public.items", 10, 9, 10, "has 9 rows instead of 10")])
        assert lines == ["table         before  restored  after", "public.items      10         9     10  WRONG"]

    def test_why_recovery_ended(self) -> None:
        log = [
            "2026-11-24 19:15:51 UTC [9] LOG:  last completed transaction was at log time 2026-11-24 19:15:51.23+00",
            "2026-11-24 19:15:52 UTC [9] FATAL:  recovery ended before configured recovery target was reached",
        ]
        assert "last transaction is of 2026-11-24 19:15:51.23+00" in restore.fatal_of(log)
        child = ["2026 FATAL:  requested timeline 6 is not a child of this server's history"]
        assert "-e restore_timeline=NUMBER" in restore.fatal_of(child)
        failed = 'could not restore file "00000001000000000000000A" from archive'
        unread = [
            "2026-11-27 09:40:51.1 P00  ERROR: [095]: unable to flush",
            f"2026 FATAL:  {failed}: child process exited with exit code 200",
        ]
        assert "00000001000000000000000A is in the archive, or may be" in restore.fatal_of(unread)
        assert "[095]: unable to flush" in restore.fatal_of(unread)
        assert restore.fatal_of(["LOG:  a", "LOG:  b"]) == "LOG:  a; LOG:  b"

    @pytest.mark.parametrize(("said", "heard"), [(0, 0), (1, 1), (25, 200), (49, 200), (125, 200)])
    def test_what_postgresql_hears_of_the_archive(self, said: int, heard: int, tmp_path: Path) -> None:
        (tmp_path / "pgbackrest").write_text(f"#!/bin/sh\nexit {said}\n", encoding="utf-8")
        (tmp_path / "pgbackrest").chmod(0o755)
        command = restore.restore_command(Path("/data"), "blog")
        done = subprocess.run(["/bin/sh", "-c", command], env={"PATH": str(tmp_path)}, check=False)
        assert done.returncode == heard

    def test_settings_that_recovery_needs(self) -> None:
        text = "wal_level setting:                    replica\nmax_connections setting:              100\n"
        text += "max_prepared_xacts setting:           7\ntrack_commit_timestamp setting:       off\n"
        assert restore.control_settings(text) == ["max_connections=100", "max_prepared_transactions=7"]


# SQLite ---------------------------------------------------------------------------------------------------------------


def make_database(path: Path, rows: int) -> None:
    """Make a database in WAL mode, as the application does."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, text TEXT)")
    database.execute("CREATE TABLE alembic_version (version_num TEXT)")
    database.execute("INSERT INTO alembic_version VALUES ('r1')")
    database.executemany("INSERT INTO items (text) VALUES (?)", [("x" * 100,)] * rows)
    database.close()


def count(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        return int(database.execute("SELECT count(*) FROM items").fetchone()[0])
    finally:
        database.close()


class TestSqliteFiles:
    """What is done to the SQLite file itself."""

    def test_a_copy_under_writers_is_whole(self, tmp_path: Path) -> None:
        source = tmp_path / "app.db"
        make_database(source, 1000)
        stop = threading.Event()

        def write() -> None:
            database = sqlite3.connect(source, timeout=30, isolation_level=None)
            while not stop.is_set():
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT INTO items (text) VALUES (?)", [("y" * 100,)] * 10)
                database.execute("COMMIT")
            database.close()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            found = [sqlite.copy(source, tmp_path / f"copy{number}") for number in range(5)]
        finally:
            stop.set()
            thread.join()
        rows = [one["rows"]["items"] for one in found]
        assert rows == sorted(rows)
        assert all(number % 10 == 0 for number in rows), "no transaction is cut in two"
        assert found[0]["revisions"] == ["r1"]
        assert not list(tmp_path.glob("copy*-*"))

    def test_a_damaged_one_is_refused(self, tmp_path: Path) -> None:
        source = tmp_path / "app.db"
        make_database(source, 1000)
        with source.open("r+b") as file:
            file.seek(4096 * 3)
            file.write(os.urandom(4096 * 4))
        with pytest.raises((Error, sqlite3.DatabaseError)):
            sqlite.copy(source, tmp_path / "copy")

    def test_one_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(sqlite3.OperationalError):
            sqlite.survey(tmp_path / "gone.db")
        assert not list(tmp_path.iterdir())

    def test_the_old_one_is_kept_with_what_was_in_its_wal_alone(self, tmp_path: Path) -> None:
        target, source = tmp_path / "app.db", tmp_path / "new"
        make_database(target, 5)
        # Somebody who was killed: the last rows are in the WAL alone.
        script = (
            f"import sqlite3, os; d = sqlite3.connect({str(target)!r}, isolation_level=None);"
            "d.execute(\"INSERT INTO items (text) VALUES ('last')\"); os._exit(0)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
        assert Path(f"{target}-wal").stat().st_size > 0
        make_database(source, 3)
        target.chmod(0o640)
        sqlite.place(source, target, "app.db.before-1")
        assert count(target) == 3
        assert count(tmp_path / "app.db.before-1") == 6
        assert target.stat().st_mode & 0o777 == 0o640

    def test_a_damaged_one_is_kept_as_it_is(self, tmp_path: Path) -> None:
        target, source = tmp_path / "app.db", tmp_path / "new"
        target.write_bytes(b"no database")
        Path(f"{target}-wal").write_bytes(b"its wal")
        make_database(source, 3)
        sqlite.place(source, target, "app.db.before-1")
        assert count(target) == 3
        assert (tmp_path / "app.db.before-1").read_bytes() == b"no database"
        assert (tmp_path / "app.db.before-1-wal").read_bytes() == b"its wal"

    def test_moments_of_restic(self) -> None:
        for text in ("2026-11-24T19:00:16.123456789Z", "2026-11-24T19:00:16.1Z", "2026-11-24T20:00:16+01:00"):
            moment = datetime.fromisoformat(sqlite.short_fraction(text))
            assert moment.astimezone(UTC).replace(microsecond=0) == datetime(2026, 11, 24, 19, 0, 16, tzinfo=UTC)


@pytest.mark.skipif(not RESTIC, reason="needs restic, which bin/setup installs")
class TestSqliteBackups:
    """Everything but systemd and Supervisor, for real."""

    @pytest.fixture
    def backups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        (tmp_path / "state").mkdir()
        (tmp_path / "shared").mkdir()
        (tmp_path / "passphrase").write_text("0123456789abcdef\n")
        settings = {
            "kind": "sqlite",
            "app": "blog",
            "account": getpass.getuser(),
            "database": str(tmp_path / "shared" / "app.db"),
            "repository": str(tmp_path / "repository"),
            "restic_repository": str(tmp_path / "repository"),
            "repository_path": str(tmp_path / "repository"),
            "environment": {},
            "passphrase_file": str(tmp_path / "passphrase"),
            "cache_directory": str(tmp_path / "cache"),
            "keep": {"last": 2},
            "max_age_hours": 26,
            "state_directory": str(tmp_path / "state"),
            "programs": [],
            "timers": {},
        }
        run: Callable[..., subprocess.CompletedProcess[str]] = host.run

        def without_systemd(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            if command[0] in ("systemctl", "supervisorctl"):
                return subprocess.CompletedProcess(command, 0, "", "")
            # Wherever restic is here.
            command = [str(RESTIC) if command[0] == "restic" else command[0], *command[1:]]
            return run(command, **options)

        monkeypatch.setattr(host, "run", without_systemd)
        return sqlite.Backups("blog", settings)

    def test_from_the_first_backup_to_a_restore(self, backups: Any) -> None:
        assert backups.prepare(False, False).startswith("changed: the state file, the repository")
        assert backups.prepare(False, False) == "All is as it should be."
        assert backups.check() == "The backups of blog are in order.", "nothing to back up is no problem"
        make_database(backups.database, 100)
        assert backups.prepare(False, False) == "The first backup is under way."
        assert "backup " in backups.run()
        assert backups.prepare(False, False) == "All is as it should be."
        state = backups.file.read()
        assert state["last_success"] == state["last"]
        assert state["last"]["bytes"] > 0
        assert backups.check() == "The backups of blog are in order."
        assert "2 tables, 101 rows" in backups.restore_check()
        assert backups.file.read()["restore_check"]["ok"]

        database = sqlite3.connect(backups.database, isolation_level=None)
        database.execute("DELETE FROM items")
        database.close()
        assert "into the service" in backups.restore("latest", "service")
        assert count(backups.database) == 100
        (kept,) = backups.left_behind()
        assert count(backups.database.with_name(kept)) == 0
        assert "beside the service" in backups.restore("latest", "beside")
        for name in backups.left_behind():
            backups.discard(name)
        assert [path.name for path in backups.database.parent.iterdir()] == ["app.db"]
        assert not backups.scratch.exists()

    def test_a_moment_before_the_first_backup(self, backups: Any) -> None:
        make_database(backups.database, 1)
        backups.prepare(False, False)
        backups.run()
        with pytest.raises(Error, match="There is no backup from before"):
            backups.restore("2020-01-01 00:00:00+00", "service")
        with pytest.raises(Error, match="There is no x to discard"):
            backups.discard("x")

    def test_what_is_kept(self, backups: Any) -> None:
        make_database(backups.database, 1)
        backups.prepare(False, False)
        for _ in range(3):
            backups.run()
        assert len(backups.repository.snapshots()) == 2

    def test_a_repository_that_is_gone_and_comes_back(self, backups: Any) -> None:
        make_database(backups.database, 1)
        backups.prepare(False, False)
        backups.run()
        repository = Path(backups.repository.path)
        repository.rename(repository.with_name("elsewhere"))
        for attempt in (backups.check, backups.run):
            with pytest.raises(Error, match="is not there; is its disk mounted"):
                attempt()
        assert backups.file.read()["last"]["ok"] is False
        assert backups.file.read()["last_success"]["ok"] is True
        with pytest.raises(Error, match="-e sqlite_backup_new=true"):
            backups.prepare(False, False)
        assert not repository.exists()
        repository.with_name("elsewhere").rename(repository)
        assert backups.check() == "The backups of blog are in order."

    def test_a_server_that_has_lost_its_database(self, backups: Any) -> None:
        make_database(backups.database, 7)
        backups.prepare(False, False)
        backups.run()
        shutil.rmtree(backups.database.parent)
        with pytest.raises(Error, match="-e restore_to=latest"):
            backups.prepare(False, False)
        assert backups.prepare(False, True) == "All is as it should be."
        backups.restore("latest", "service")
        assert count(backups.database) == 7

    def test_another_passphrase(self, backups: Any, tmp_path: Path) -> None:
        make_database(backups.database, 1)
        backups.prepare(False, False)
        (tmp_path / "passphrase").write_text("another one, longer\n")
        with pytest.raises(Error, match="vault_backup_passphrase is not the one"):
            backups.run()
