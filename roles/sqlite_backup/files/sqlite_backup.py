#!/usr/bin/python3 -B
"""Backups of an SQLite file with restic: make them, watch them, restore them, prove that they can be restored.

Runs on the application server, as root; ``backup_host.py`` says where its settings are. Whatever opens the SQLite file
runs as the application's account: SQLite's files beside it (-wal, -shm) keep their owner, and root trusts no file that
the application may have prepared for it.

    sqlite_backup.py --app blog prepare [--new] [--adopt]   make the repository, or refuse one whose database is missing
    sqlite_backup.py --app blog run                         make a backup
    sqlite_backup.py --app blog check                       is all well? Exit code 1 and the reason when not
    sqlite_backup.py --app blog retry                       make up for a backup that failed, once all is well
    sqlite_backup.py --app blog status                      the state file and the list of backups, as JSON
    sqlite_backup.py --app blog restore --to latest|MOMENT [--into service|beside]
    sqlite_backup.py --app blog discard NAME                remove what a restore has left, by its name
    sqlite_backup.py --app blog restore-check               restore to a scratch directory and compare

A backup is a directory with the database, copied by SQLite's own online backup, and ``manifest.json``: the rows of each
table and the revision of its migrations, counted in the copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import time
import typing as t
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path

if t.TYPE_CHECKING:
    from roles.postgresql_backup.files import backup_host as host
else:
    import backup_host as host

TAG = "hardstand"
# Seconds that SQLite waits for a writer.
BUSY = 60.0
# Free bytes below which a repository counts as full.
LEAST_FREE = 16 * 2**20
# Bytes that a database needs beside its own size, for what is written meanwhile.
ROOM = 64 * 2**20
# How often a backup that failed is tried again while all seems well, in seconds.
RETRY_EVERY = 3600.0


class Snapshot(t.NamedTuple):
    """One backup in the repository; its moment in seconds since the epoch."""

    id: str
    time: float


# As the application's account -----------------------------------------------------------------------------------------


def open_existing(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open a database that is there; SQLite would make an empty one otherwise."""
    quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{quoted}?mode={mode}", uri=True, timeout=BUSY, isolation_level=None)


def survey(path: Path) -> host.State:
    """Return the rows of each table and the revisions of the migrations; raises BackupError for a damaged file."""
    with closing(open_existing(path)) as database:
        found = [str(row[0]) for row in database.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise host.BackupError(f"{path} is damaged: {'; '.join(found)[:300]}")
        names = [
            str(row[0])
            for row in database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
            )
        ]
        rows = {}
        for name in names:
            quoted = name.replace('"', '""')
            rows[name] = database.execute(f'SELECT count(*) FROM "{quoted}"').fetchone()[0]  # noqa: S608 - quoted
        revisions = []
        if "alembic_version" in names:
            revisions = sorted(str(row[0]) for row in database.execute("SELECT version_num FROM alembic_version"))
    return {"rows": rows, "revisions": revisions, "bytes": path.stat().st_size}


def copy(source: Path, target: Path) -> host.State:
    """Copy a database as of one moment, while it is in use, and check the copy."""
    with closing(open_existing(source)) as database, closing(sqlite3.connect(target)) as other:
        # All pages in one step, under one read lock: writers in WAL mode do not notice, and it always ends.
        database.backup(other)
    return survey(target)


def place(source: Path, target: Path, kept: str) -> host.State:
    """Put a database in place of another that nobody has open, which keeps another name.

    There is a whole database at `target` at every moment.

    Args:
        source: the new one; it is copied.
        target: where it goes.
        kept: name for the old one; empty when there must be none.
    """
    staged = target.with_name(f".{target.name}.restoring")
    shutil.copyfile(source, staged)
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staged.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o640)
    beside = [suffix for suffix in ("-wal", "-shm", "-journal") if Path(f"{target}{suffix}").exists()]
    if kept:
        for suffix in ("", *beside):
            os.link(f"{target}{suffix}", target.with_name(f"{kept}{suffix}"))
        # What is in its WAL alone goes into the file, whichever of the two is there should we be cut off. A damaged one
        # cannot take it in, and SQLite may drop it: hence the links.
        with suppress(sqlite3.Error), closing(open_existing(target)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in beside:
            link = target.with_name(f"{kept}{suffix}")
            if not link.stat().st_size or suffix == "-shm":
                link.unlink()
    for suffix in beside:
        # Or it would be taken for the new one's.
        Path(f"{target}{suffix}").unlink(missing_ok=True)
    staged.replace(target)
    return {}


WORKERS: dict[str, t.Callable[..., host.State]] = {"copy": copy, "survey": survey, "place": place}


# restic ---------------------------------------------------------------------------------------------------------------


class Repository:
    """restic's repository."""

    def __init__(self, settings: t.Mapping[str, t.Any]) -> None:
        self.app: str = settings["app"]
        # Empty when the repository is not a directory on this server.
        self.path: str = settings["repository_path"]
        self.env = {
            **settings["environment"],
            "RESTIC_REPOSITORY": settings["restic_repository"],
            "RESTIC_PASSWORD_FILE": settings["passphrase_file"],
            "RESTIC_CACHE_DIR": settings["cache_directory"],
        }

    def call(self, *arguments: str, timeout: float | None = None) -> str:
        """Run restic and return its output. Raises BackupError with the reason when it fails."""
        done = host.run(["restic", *arguments], env=self.env, timeout=timeout)
        if done.returncode:
            raise host.BackupError(self.explain(" ".join((done.stderr or done.stdout).split())))
        return done.stdout

    def explain(self, error: str) -> str:
        """Return restic's complaint, with what an operator would want to hear first."""
        if problem := self.path_problem():
            return problem
        if "wrong password" in error:
            return (
                "the repository cannot be decrypted: vault_backup_passphrase is not the one that it was made with. Put"
                " the old one back, or start a new repository in another place"
            )
        return error[:600]

    def path_problem(self) -> str:
        """Return why the repository's directory cannot be used; empty when it can, or is none of this server."""
        if not self.path:
            return ""
        directory = Path(self.path)
        if not (directory / "config").exists():
            return f"the repository {self.path} is not there; is its disk mounted?"
        try:
            probe = directory / f".hardstand.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            return f"the repository {self.path} cannot be written to: {error.strerror}"
        if (free := host.free_bytes(directory)) < LEAST_FREE:
            return f"the repository {self.path} is full: {free // 2**20} MB left on its file system"
        return ""

    def exists(self) -> bool:
        """Return whether there is a repository. Raises BackupError when that cannot be known."""
        if self.path:
            return (Path(self.path) / "config").exists()
        done = host.run(["restic", "cat", "config"], env=self.env)
        if done.returncode == 0:
            return True
        # restic 0.17 has an exit code of its own for it; earlier ones say it.
        if done.returncode == 10 or "Is there a repository at the following location" in done.stderr:
            return False
        raise host.BackupError(self.explain(" ".join(done.stderr.split())))

    def snapshots(self) -> list[Snapshot]:
        """Return the backups, oldest first. Raises BackupError when they cannot be read."""
        listed = json.loads(
            self.call("snapshots", "--json", "--no-lock", "--host", self.app, "--tag", TAG, timeout=300)
        )
        # Nanoseconds are more than datetime takes.
        found = [
            Snapshot(one["short_id"], datetime.fromisoformat(short_fraction(one["time"])).timestamp()) for one in listed
        ]
        return sorted(found, key=lambda one: one.time)


def short_fraction(text: str) -> str:
    """Return a moment of RFC 3339 with six digits of a second, as datetime.fromisoformat takes it."""
    head, point, rest = text.partition(".")
    if not point:
        return text.replace("Z", "+00:00")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return f"{head}.{digits[:6].ljust(6, '0')}{rest[len(digits) :].replace('Z', '+00:00')}"


# The commands ---------------------------------------------------------------------------------------------------------


class Backups:
    """The backups of one application's SQLite file."""

    def __init__(self, app: str, settings: dict[str, t.Any]) -> None:
        self.app = app
        self.settings = settings
        self.database = Path(settings["database"])
        self.repository = Repository(settings)
        fixed = {name: settings[name] for name in ("kind", "repository", "max_age_hours")} | {"runs_backups": True}
        states = Path(settings["state_directory"])
        self.file = host.StateFile(states / f"{app}.json", fixed)
        self.lock = states / f".{app}.lock"
        self.scratch = states / f".{app}"
        self.unit = f"hardstand-backup-{app}.service"

    def work(self, command: str, *paths: Path | str) -> host.State:
        """Have one of WORKERS done by the application's account."""
        done = host.run(
            [sys.executable, "-B", __file__, "--app", self.app, "work", command, *(str(path) for path in paths)],
            user=host.account(self.settings["account"]),
        )
        if done.returncode:
            raise host.BackupError(done.stderr.strip().removeprefix("error: ") or f"{command} failed")
        return t.cast("host.State", json.loads(done.stdout))

    @contextlib.contextmanager
    def room(self, needed: int) -> t.Iterator[Path]:
        """Yield a directory that is thrown away, with so much room; `data` in it is the application's account's."""
        if self.scratch.exists():
            shutil.rmtree(self.scratch)
        if (free := host.free_bytes(self.scratch.parent)) < needed:
            raise host.BackupError(
                f"{self.scratch.parent} has {host.people_bytes(free)} free, and {host.people_bytes(needed)} are needed"
            )
        try:
            self.scratch.mkdir()
            self.scratch.chmod(0o711)
            data = self.scratch / "data"
            data.mkdir(mode=0o700)
            self.give(data)
            yield self.scratch
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def give(self, path: Path) -> None:
        """Make the application's account the owner of a path, or of a link, not of what it leads to."""
        user = host.account(self.settings["account"])
        os.chown(path, user.uid, user.gid, follow_symlinks=False)

    # prepare, run, check

    def prepare(self, new: bool, adopt: bool) -> str:
        """Make the repository where there is none, start the timers and the first backup; returns what was done.

        Args:
            new: make a repository although backups were made to one before.
            adopt: begin with an empty database although there are backups of one.

        Raises:
            BackupError: the repository or the database is missing, and nobody has said what to do.
        """
        done = []
        if not self.file.path.exists():
            self.file.update()
            done.append("the state file")
        made, first = self.prepare_repository(new, adopt)
        done += [*made, *host.start_timers(self.settings["timers"])]
        # What the timer does at any other time is no change of the server.
        said = "The first backup is under way." if first else "All is as it should be."
        return f"changed: {', '.join(done)}" if done else said

    def prepare_repository(self, new: bool, adopt: bool) -> tuple[list[str], bool]:
        """Do what `prepare` does but for the timers; returns what was made, and whether a first backup was started."""
        done: list[str] = []
        last = self.file.read()["last_success"]
        exists = self.repository.exists()
        if exists and last and self.repository.path and self.database.exists():
            # restic takes a second to say anything.
            return done, False
        if not exists:
            if last and not new:
                raise host.BackupError(
                    f"The repository {self.settings['repository']} is not there, and backups were made to it, the last"
                    f" at {last['ended']}. If its disk is not mounted, mount it. If it is gone for good, deploy with"
                    " -e sqlite_backup_new=true, which makes a new one."
                )
            if self.repository.path:
                Path(self.repository.path).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.repository.call("init")
            done.append(f"the repository {self.settings['repository']}")
        snapshots = self.repository.snapshots() if exists else []
        if self.database.exists():
            if not snapshots and not host.run(["systemctl", "is-active", self.unit]).stdout.startswith("activating"):
                host.run(["systemctl", "start", "--no-block", self.unit])
                return done, True
        elif snapshots and not adopt:
            raise host.BackupError(
                f"There is no {self.database}, and there are backups of it in {self.settings['repository']}, the"
                f" newest of {host.stamp(snapshots[-1].time)}. To bring it back: ansible-playbook playbooks/restore.yml"
                " -i <inventory> -e restore_to=latest, then deploy again. To begin with an empty one: deploy with"
                " -e sqlite_backup_adopt=true."
            )
        return done, False

    def run(self) -> str:
        """Make a backup and write down how it went; returns a line about it."""
        with host.exclusive(self.lock):
            started = time.time()
            last: host.State = {"started": host.stamp(started), "ok": False, "label": None, "type": "full", "bytes": 0}
            try:
                made = self.make()
            except BaseException as error:
                reason = str(error) or type(error).__name__
                self.file.update(last={**last, "ended": host.stamp(), "message": reason})
                raise
            stored, size = host.people_bytes(made["bytes"]), host.people_bytes(made["size"])
            message = (
                f"backup {made['label']} of {self.app}: {stored} added in {self.settings['repository']}, of a database"
                f" of {size}; took {host.people_seconds(time.time() - started)}"
            )
            last |= {"ended": host.stamp(), "ok": True, "message": message, **made}
            self.file.update(last=last, last_success=last)
        host.run(["systemctl", "reset-failed", self.unit])
        self.look()
        return message

    def make(self) -> host.State:
        """Copy, check, store and thin out; returns the new backup's `label`, `bytes` (stored) and `size`."""
        if not self.database.exists():
            raise host.BackupError(f"there is no {self.database}")
        if problem := self.repository.path_problem():
            raise host.BackupError(problem)
        with self.room(self.database.stat().st_size + ROOM) as scratch:
            manifest = self.work("copy", self.database, scratch / "data" / "database")
            (scratch / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
            # Of a run that was killed; those of a run that is under way stay.
            self.repository.call("unlock")
            output = self.repository.call("backup", "--json", "--host", self.app, "--tag", TAG, str(scratch))
        summary = next(line for line in map(json.loads, output.splitlines()) if line.get("message_type") == "summary")
        keep = [f"--keep-{name}={count}" for name, count in self.settings["keep"].items() if count]
        # By host and tag, not by path: a backup is the same one wherever it was put together.
        self.repository.call("forget", "--host", self.app, "--tag", TAG, "--group-by", "host,tags", "--prune", *keep)
        return {"label": summary["snapshot_id"][:8], "bytes": summary["data_added"], "size": manifest["bytes"]}

    def check(self) -> str:
        """Look whether the repository can be used and the newest backup is young; raises BackupError if not."""
        now, problem = time.time(), ""
        try:
            problem = self.repository.path_problem()
            if not problem:
                snapshots = self.repository.snapshots()
                newest = snapshots[-1].time if snapshots else None
                # Before the first deploy there is nothing to back up.
                if newest is not None or self.database.exists():
                    problem = host.freshness_problem(self.file.read(), newest, now)
        except host.BackupError as error:
            problem = str(error)
        failed = {"check_failed": host.stamp(now)} if problem else {}
        self.file.update(check={"time": host.stamp(now), "ok": not problem, "message": problem}, **failed)
        if problem:
            raise host.BackupError(f"Backups of {self.app}: {problem}")
        return f"The backups of {self.app} are in order."

    def look(self) -> None:
        """Have the unit of `check` look now, so that nothing goes on complaining of what is over."""
        host.run(["systemctl", "start", "--no-block", f"hardstand-backup-check-{self.app}.service"])

    def retry(self) -> str:
        """Start the backup's unit when there should be a backup and the last one failed, or none was made."""
        state, now = self.file.read(), time.time()
        last = state["last"]
        if not self.database.exists() or (last and last["ok"]):
            return "There is no failed backup to make up for."
        ended = host.seconds_of(last.get("ended")) if last else None
        mended = last and str(state.get("check_failed") or "") >= str(last.get("ended"))
        if ended is not None and now - ended < RETRY_EVERY and not mended:
            return "The backup that failed will be tried again later."
        host.run(["systemctl", "start", "--no-block", self.unit])
        return "Making a backup." if not last else "Making up for the backup that failed."

    def status(self) -> str:
        """Return the state file and the list of backups, as JSON."""
        found: host.State = {"state": self.file.read(), "backups": [], "problem": ""}
        try:
            found["backups"] = [snapshot._asdict() for snapshot in self.repository.snapshots()]
        except host.BackupError as error:
            found["problem"] = str(error)
        return json.dumps(found)

    # restore, discard, restore-check

    def fetch(self, snapshot: Snapshot, scratch: Path) -> tuple[Path, host.State]:
        """Restore a backup below a directory and check it; returns the database and its manifest."""
        target = scratch / "restored"
        self.repository.call("restore", snapshot.id, "--target", str(target))
        target.chmod(0o711)
        # Below the path that it was put together at.
        found = next((path for path in target.rglob("manifest.json") if (path.parent / "data").is_dir()), None)
        if found is None:
            raise host.BackupError(f"There is no database in backup {snapshot.id}.")
        manifest = json.loads(found.read_text(encoding="utf-8"))
        database = found.parent / "data" / "database"
        # The account may have another number on this server.
        for path in (database.parent, database):
            self.give(path)
        restored = self.work("survey", database)
        if restored["rows"] != manifest["rows"] or restored["revisions"] != manifest["revisions"]:
            raise host.BackupError(f"Backup {snapshot.id} is not what it was when it was made.")
        return database, restored

    def choose(self, to: str) -> Snapshot:
        """Return the newest backup, or the newest from before a moment. Raises BackupError when there is none."""
        snapshots = self.repository.snapshots()
        if to != "latest":
            moment = host.parse_moment(to).timestamp()
            usable = [snapshot for snapshot in snapshots if snapshot.time <= moment]
            if not usable and snapshots:
                raise host.BackupError(
                    f"There is no backup from before {to}; the oldest is of {host.stamp(snapshots[0].time)}."
                )
            snapshots = usable
        if not snapshots:
            raise host.BackupError(f"There is no backup in {self.settings['repository']}.")
        return snapshots[-1]

    def restore(self, to: str, into: str) -> str:
        """Restore, and return a report. Raises BackupError, with the old database in its place, when it fails."""
        with host.exclusive(self.lock):
            snapshot = self.choose(to)
            now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            size = self.database.stat().st_size if self.database.exists() else 0
            self.make_directory()
            with self.room(2 * size + ROOM) as scratch:
                database, restored = self.fetch(snapshot, scratch)
                if into == "beside":
                    beside = self.database.with_name(f"{self.database.name}.restored-{now}")
                    self.work("place", database, beside, "")
                    where = f"beside the service: {beside}\nRemove it: {how_to_discard(beside.name)}"
                else:
                    kept = f"{self.database.name}.before-{now}" if self.database.exists() else ""
                    with self.programs_stopped():
                        self.work("place", database, self.database, kept or "-")
                    where = "into the service."
                    if kept:
                        where += f"\nThe data from before is kept: {self.database.with_name(kept)}"
                        where += f"\nRemove it: {how_to_discard(kept)}"
            moment, tables = host.stamp(snapshot.time), restored["rows"]
            self.file.update(restore={"time": host.stamp(), "to": to, "label": snapshot.id, "last_transaction": moment})
            return (
                f"Restored {self.app} from backup {snapshot.id}, {len(tables)} tables and {sum(tables.values())} rows,"
                f" {where}\nIt is of {moment}; what was written later is not in it."
            )

    def make_directory(self) -> None:
        """Make the database's directory where a release has not done so yet, as role release makes it."""
        if not self.database.parent.is_dir():
            self.database.parent.mkdir(mode=0o750, parents=True)
            self.give(self.database.parent)

    @contextlib.contextmanager
    def programs_stopped(self) -> t.Iterator[None]:
        """Stop what has the database open, and start it again afterwards, come what may."""
        running = []
        with suppress(host.BackupError):  # no Supervisor: nothing was ever deployed
            listed = host.run(["supervisorctl", "status"]).stdout
            rows = [line.split() for line in listed.splitlines()]
            up = ("RUNNING", "STARTING", "BACKOFF")
            running = [row[0] for row in rows if len(row) > 1 and row[0] in self.settings["programs"] and row[1] in up]
        try:
            for program in running:
                host.say(f"Stopping {program}.")
                if host.run(["supervisorctl", "stop", program]).returncode:
                    raise host.BackupError(f"Supervisor cannot stop {program}; nothing was changed.")
            yield
        finally:
            for program in running:
                host.run(["supervisorctl", "start", program])

    def left_behind(self) -> list[str]:
        """Return the names of what restores have left."""
        names = (path.name for kind in ("before", "restored") for path in self.database.parent.glob(f"*.{kind}-*"))
        return sorted(name for name in names if name.startswith(f"{self.database.name}."))

    def discard(self, name: str) -> str:
        """Remove what a restore has left."""
        found = self.left_behind()
        if name not in found:
            raise host.BackupError(f"There is no {name} to discard; there is {', '.join(found) or 'nothing'}.")
        path = self.database.with_name(name)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        return f"Removed {path}."

    def restore_check(self) -> str:
        """Restore the newest backup, compare it with what it was made from, write down and return the result."""
        started = host.stamp()
        try:
            with host.exclusive(self.lock):
                snapshot = self.choose("latest")
                self.repository.call("check")
                size = self.database.stat().st_size if self.database.exists() else 0
                with self.room(2 * size + ROOM) as scratch:
                    _, restored = self.fetch(snapshot, scratch)
                    live = (
                        self.work("survey", self.database) if self.database.exists() else {"rows": {}, "revisions": []}
                    )
        except BaseException as error:
            reason = str(error) or type(error).__name__
            self.record(started, None, False, 0, reason)
            raise
        rows = sum(restored["rows"].values())
        message = f"{len(restored['rows'])} tables, {rows} rows"
        self.record(started, snapshot.id, True, len(restored["rows"]), message)
        lines = table_of(restored["rows"], live["rows"])
        if restored["revisions"] != live["revisions"]:
            was, now = (", ".join(found) or "none" for found in (restored["revisions"], live["revisions"]))
            lines.append(f"The service has been migrated since, from {was} to {now}.")
        lines += [
            "",
            f"Backup {snapshot.id} of {host.stamp(snapshot.time)} restores to what it was made from: {message}.",
        ]
        return "\n".join(lines)

    def record(self, started: str, label: str | None, ok: bool, tables: int, message: str) -> None:
        """Write the result of a restore check down."""
        found = {
            "started": started,
            "ended": host.stamp(),
            "ok": ok,
            "label": label,
            "tables": tables,
            "message": message,
        }
        self.file.update(restore_check=found)


def how_to_discard(name: str) -> str:
    """Return the command that removes what a restore has left."""
    return f"ansible-playbook playbooks/restore.yml -i <inventory> -e restore_discard={name}"


def table_of(restored: t.Mapping[str, int], live: t.Mapping[str, int]) -> list[str]:
    """Return the rows of each table, in the backup and in the service now, as lines."""
    rows = [("table", "restored", "service now")]
    rows += [(name, str(restored.get(name, "-")), str(live.get(name, "-"))) for name in sorted({*restored, *live})]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0].ljust(widths[0])}  {row[1].rjust(widths[1])}  {row[2].rjust(widths[2])}" for row in rows]


def main() -> t.NoReturn:
    """Run one command."""
    parser, commands = host.parser("Backups of an application's SQLite file with restic.")
    prepare = commands.add_parser("prepare")
    prepare.add_argument("--new", action="store_true")
    prepare.add_argument("--adopt", action="store_true")
    for name in ("run", "check", "retry", "status", "restore-check"):
        commands.add_parser(name)
    restore = commands.add_parser("restore")
    restore.add_argument("--to", required=True)
    restore.add_argument("--into", choices=["service", "beside"], default="service")
    discard = commands.add_parser("discard")
    discard.add_argument("name")
    worker = commands.add_parser("work")
    worker.add_argument("job", choices=sorted(WORKERS))
    worker.add_argument("paths", nargs="+")
    arguments = parser.parse_args()

    def work() -> str:
        if arguments.command == "work":
            # The last argument of `place` is a name; - stands for none.
            given = [Path(path) for path in arguments.paths[:2]]
            names = ["" if name == "-" else name for name in arguments.paths[2:]]
            try:
                return json.dumps(WORKERS[arguments.job](*given, *names))
            except (OSError, sqlite3.Error) as error:
                raise host.BackupError(f"SQLite: {error}") from None
        backups = Backups(arguments.app, host.settings_of(arguments))
        if arguments.command == "prepare":
            return backups.prepare(arguments.new, arguments.adopt)
        if arguments.command == "restore":
            return backups.restore(arguments.to, arguments.into)
        if arguments.command == "discard":
            return backups.discard(arguments.name)
        return str(getattr(backups, arguments.command.replace("-", "_"))())

    host.call(work)


if __name__ == "__main__":
    main()
