"""Restores of a PostgreSQL server: into the service, beside it, and to a scratch instance that is thrown away.

Part of ``postgresql_backup.py``, which see; runs on the database server.

Into the service, every step can be undone until PostgreSQL has reached the moment that was asked for: the old data
directory is renamed, and put back when anything fails or the program is stopped. If even that cannot be done, because
the server lost its power for example, the next call does it first: a file beside the state file says what was renamed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import time
import typing as t
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

if t.TYPE_CHECKING:
    from roles.postgresql_backup.files import backup_host as host
    from roles.postgresql_backup.files.postgresql_backup import Backup, Backups
else:
    import backup_host as host

# Seconds that the newest WAL may take to reach the repository.
ARCHIVE_PATIENCE = 120.0

# Room that a restored database needs beside its own size, for the WAL that is replayed.
ROOM = 1.1

# Exit code of restore_command when it is not known whether the archive has what PostgreSQL asks for. Of those above 125
# one that no shell uses.
ARCHIVE_UNREADABLE = 200

# What a row count goes by: tables that survive a crash, with what has been inserted and deleted so far.
TABLES = r"""
SELECT json_build_object(
    'name', format('%I.%I', n.nspname, c.relname), 'file', pg_relation_filenode(c.oid),
    'inserted', pg_stat_get_tuples_inserted(c.oid), 'deleted', pg_stat_get_tuples_deleted(c.oid))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
ORDER BY n.nspname, c.relname;
"""

# One line of JSON for each such table, all as of one moment.
COUNTS = r"""
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT format('SELECT json_build_object(''name'', %L, ''rows'', count(*)) FROM %I.%I',
              format('%I.%I', n.nspname, c.relname), n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
ORDER BY n.nspname, c.relname \gexec
SELECT 'SELECT json_build_object(''revisions'', coalesce(json_agg(version_num ORDER BY version_num), ''[]'')) FROM '
       || to_regclass('alembic_version') WHERE to_regclass('alembic_version') IS NOT NULL \gexec
COMMIT;
"""


class Counts(t.NamedTuple):
    """Rows by table, and the revisions of Alembic's version table."""

    rows: dict[str, int]
    revisions: list[str]


class Tables(t.NamedTuple):
    """What PostgreSQL has counted of each table: file, rows inserted, rows deleted."""

    activity: dict[str, tuple[int, int, int]]


def command(backups: Backups, arguments: argparse.Namespace) -> str:
    """Do what the command line says, and return what to tell."""
    if not backups.settings["has_database"]:
        raise host.BackupError("PostgreSQL runs on another server; a restore is made there.")
    if arguments.command == "restore-check":
        check = RestoreCheck(backups)
        return check.clean() if arguments.clean else check.run()
    if os.geteuid() != 0:
        raise host.BackupError(f"{arguments.command} stops and starts PostgreSQL: run it as root.")
    if arguments.command == "discard":
        return discard(backups, arguments.name)
    target = Target.parse(arguments.to, arguments.timeline)
    with host.exclusive(backups.lock):
        if arguments.into == "beside":
            return Beside(backups).restore(target)
        return Service(backups).restore(target)


class Target(t.NamedTuple):
    """The moment to restore to; None for all that there is."""

    moment: datetime | None
    timeline: str

    @classmethod
    def parse(cls, text: str, timeline: str) -> Target:
        """Return the target that an operator wrote; raises BackupError when it is none."""
        if not re.fullmatch(r"latest|current|[0-9]+", timeline):
            raise host.BackupError(f'timeline "{timeline}": say latest, current, or a number.')
        return cls(None if text.strip() == "latest" else host.parse_moment(text), timeline)

    def __str__(self) -> str:
        return f"{self.moment:%Y-%m-%d %H:%M:%S.%f} UTC".replace(".000000", "") if self.moment else "the latest moment"

    def options(self) -> list[str]:
        """Return pgBackRest's options for it."""
        options = [f"--target-timeline={self.timeline}"] if self.timeline != "latest" else []
        if self.moment:
            options += ["--type=time", f"--target={self.moment:%Y-%m-%d %H:%M:%S.%f}+00", "--target-action=promote"]
        return options


def choose(backups: Backups, target: Target, directory: Path) -> Backup:
    """Return the backup that a restore would start from, after checking that it can be restored into a directory.

    Raises:
        BackupError: there is none, it is of another version of PostgreSQL, or there is no room.
    """
    info = backups.repository.info()
    if info.problem:
        raise host.BackupError(f"The repository holds nothing of {backups.app}: {info.problem}.")
    usable = [found for found in info.backups if not target.moment or found.ended <= target.moment.timestamp()]
    history = backups.repository.history(target.timeline, info.systems) if usable else None
    if history:
        # A backup on a timeline that a restore has left behind leads nowhere.
        usable = [found for found in usable if history.has(found)]
        if not usable:
            raise host.BackupError(
                f"No backup from before {target} leads to timeline {history.timeline}; -e restore_timeline=NUMBER names"
                " another, on which that moment lies."
            )
    if not usable:
        oldest = f"; the oldest ended at {host.stamp(info.backups[0].ended)}" if info.backups else ""
        raise host.BackupError(f"There is no backup from before {target}{oldest}.")
    chosen = usable[-1]
    if not target.moment:
        refuse_gap(backups, chosen, history.timelines() if history else [chosen.timeline])
    version = (backups.cluster.binaries.parent).name
    stored, _ = info.systems[max(info.systems)]
    if stored != version:
        raise host.BackupError(
            f"The backups are of PostgreSQL {stored}, and this server has {version}. Restore on a server with the"
            f" Debian release that has {stored}, and upgrade it there."
        )
    needed, free = int(chosen.size * ROOM) + 64 * 2**20, host.free_bytes(directory)
    if free < needed:
        raise host.BackupError(
            f"{directory} has {host.people_bytes(free)} free, and the restored database needs"
            f" {host.people_bytes(needed)}: make room. What is there now is kept, so it does not count as free."
        )
    return chosen


def refuse_gap(backups: Backups, chosen: Backup, timelines: t.Sequence[int]) -> None:
    """Raise BackupError when the archive lacks WAL between a backup and the archive's end, on these timelines.

    To PostgreSQL the archive ends where a segment is missing. Only a moment that lies behind it would tell.
    """
    segments = backups.repository.segments()
    around = backups.repository.gap(segments, timelines, chosen.first_segment)
    if not around:
        return
    before, after = around
    if not before:
        raise host.BackupError(f"The archive lacks {after}, with which recovery from {chosen.label} begins.")
    raise host.BackupError(
        f"The archive lacks WAL between {before} and {after}, and without it nothing that was committed since can be"
        f" restored. Put the missing files back, or restore to a moment before {host.stamp(segments[before])}."
    )


def restore_command(data: Path, stanza: str) -> str:
    """Return how PostgreSQL asks for WAL: pgBackRest's own command, that fails in a way PostgreSQL heeds.

    pgBackRest returns 1 for WAL that the archive does not have, and more (25 to 125) when it could not look: the other
    server is away, or the file is damaged. To PostgreSQL all of these mean that the archive ends here, and it would
    take writes without all that comes after. It gives up for 126 and more (its documentation, on restore_command).
    """
    call = f'pgbackrest --pg1-path={data} --stanza={stanza} archive-get %f "%p"'
    return f"{call}; code=$?; [ $code -le 1 ] || exit {ARCHIVE_UNREADABLE}; exit $code"


def fetch(backups: Backups, chosen: Backup, target: Target, data: Path, *options: str) -> None:
    """Copy a backup into an empty directory, ready to recover."""
    host.say(f"Restoring {chosen.label} ({host.people_bytes(chosen.size)}) …")
    backups.repository.call(
        "restore",
        f"--pg1-path={data}",
        f"--set={chosen.label}",
        # Nobody is to see the data before it is what was asked for.
        "--recovery-option=hot_standby=off",
        f"--recovery-option=restore_command={restore_command(data, backups.repository.stanza)}",
        *target.options(),
        *options,
    )


def flush(backups: Backups, name: str) -> str:
    """End the WAL segment that is being written, and wait until all is archived; returns its name.

    Args:
        backups: of the application.
        name: of the restore point that the segment ends with.

    Raises:
        BackupError: PostgreSQL does not answer, or archives nothing.
    """
    cluster = backups.cluster
    if cluster.sql("SHOW archive_mode;") != "on":
        raise host.BackupError("PostgreSQL does not archive: archive_mode is off.")
    # A transaction, because recovery to a moment has reached it only when it meets a transaction that came after it.
    said = cluster.sql(
        f"SELECT pg_current_xact_id();\nSELECT pg_create_restore_point('{name}');\n"
        "SELECT pg_walfile_name(pg_switch_wal());"
    )
    segment = said.splitlines()[-1]
    # The file that says that a segment is ready to be archived is there when pg_switch_wal() returns.
    waiting = f"""SELECT count(*) FROM pg_ls_archive_statusdir()
        WHERE name ~ '^[0-9A-F]{{24}}\\.ready$' AND left(name, 24) <= '{segment}';"""  # noqa: S608 - PostgreSQL's own
    deadline = time.monotonic() + ARCHIVE_PATIENCE
    while cluster.sql(waiting) != "0":
        if time.monotonic() > deadline:
            raise host.BackupError(f"the newest WAL has not reached the repository within {ARCHIVE_PATIENCE:.0f} s")
        time.sleep(0.2)
    return segment


def last_words(backups: Backups) -> str:
    """Return why PostgreSQL did not start, from the end of its log."""
    version, name = backups.cluster.binaries.parent.name, backups.cluster.data.name
    log = Path(f"/var/log/postgresql/postgresql-{version}-{name}.log")
    lines: list[str] = []
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:]
    if not lines:
        done = host.run(
            ["journalctl", "--unit", backups.cluster.unit, "--lines", "60", "--no-pager", "--output", "cat"]
        )
        lines = done.stdout.splitlines()
    return fatal_of(lines)


def fatal_of(lines: t.Sequence[str]) -> str:
    """Return PostgreSQL's last fatal message, with what recovery had reached before it, from lines of its log."""
    fatal = [line.partition("FATAL:")[2].strip() for line in lines if "FATAL:" in line]
    reached = [
        line.rpartition("log time ")[2].strip()
        for line in lines
        if "last completed transaction was at log time" in line
    ]
    text = fatal[-1] if fatal else "; ".join(line.strip() for line in lines[-3:])
    if "recovery ended before configured recovery target was reached" in text:
        until = f" The archive's last transaction is of {reached[-1]}." if reached else ""
        return f"The archive ends before that moment.{until} Restore to latest, or to an earlier moment"
    if found := re.search(rf'could not restore file "(\w+)" from archive: .*exit code {ARCHIVE_UNREADABLE}', text):
        # What pgBackRest has said of its last attempt comes before it.
        said = [line.partition("ERROR: ")[2].strip() for line in lines if re.search(r"ERROR: \[\d+\]", line)]
        return (
            f"{found[1]} is in the archive, or may be, and cannot be read: {said[-1] if said else 'see the log'}."
            " Mend that and restore again, or restore to a moment before it"
        )
    if "is not a child of this server's history" in text or "is not possible from checkpoint" in text:
        return (
            f"{text}. An earlier restore has begun a new timeline; -e restore_timeline=NUMBER names the one on which"
            " that moment lies"
        )
    return text


# Into the service -----------------------------------------------------------------------------------------------------


class Service:
    """A restore in place of the data that the service has now, which is kept."""

    def __init__(self, backups: Backups) -> None:
        self.backups = backups
        self.cluster = backups.cluster
        self.data = backups.cluster.data
        # What has been renamed and not been done with yet.
        self.note = backups.file.path.parent / f".{backups.app}.restoring"

    def restore(self, target: Target) -> str:
        """Restore, and return a report. Raises BackupError, with the old data in its place, when it fails."""
        self.undo()
        self.refuse_what_cannot_be_kept()
        chosen = choose(self.backups, target, self.data.parent)
        # It need not run: that may be why there is a restore.
        ran = self.state() == "active"
        flushed = self.flush()
        started = time.time()
        kept = self.data.with_name(f"{self.data.name}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}")
        try:
            host.say("Stopping PostgreSQL.")
            self.systemctl("stop")
            host.write_file(self.note, json.dumps({"kept": str(kept)}) + "\n", 0o600)
            self.data.rename(kept)
            self.data.mkdir(mode=0o700)
            os.chown(self.data, self.cluster.user.uid, self.cluster.user.gid)
            fetch(self.backups, chosen, target, self.data)
            self.systemctl("start", "--no-block")
            self.wait_until_recovered()
        except BaseException as error:
            host.say("The restore has failed; putting the old data back.")
            self.undo()
            if ran:
                self.systemctl("start")
            if isinstance(error, host.BackupError):
                now = "runs as before" if ran else "does not run, as before"
                raise host.BackupError(f"{error}. The old data is in its place again, and PostgreSQL {now}.") from None
            raise
        self.note.unlink()
        self.backups.look()
        return self.report(target, chosen, kept, flushed, started)

    def flush(self) -> str:
        """Send what PostgreSQL has not archived yet to the repository; returns why that was not possible."""
        try:
            system = self.cluster.sql("SELECT system_identifier FROM pg_control_system();")
            systems = self.backups.repository.info().systems
            if systems and systems[max(systems)][1] != system:
                return "this PostgreSQL is new, and not the one that was backed up"
            flush(self.backups, f"hardstand_restore_{int(time.time())}")
        except host.BackupError as error:
            return str(error)
        return ""

    def refuse_what_cannot_be_kept(self) -> None:
        """Raise BackupError when the data directory cannot be renamed and taken back as a whole."""
        if not self.data.is_dir():
            raise host.BackupError(
                f"There is no {self.data}: deploy first, so that there is a PostgreSQL to restore into."
            )
        if self.data.is_mount():
            raise host.BackupError(
                f"{self.data} is a mount point, and cannot be kept by renaming it. Mount its file system one directory"
                " higher."
            )
        spaces = self.data / "pg_tblspc"
        if spaces.is_dir() and any(spaces.iterdir()):
            raise host.BackupError(
                f"{self.data} has tablespaces outside of it, which cannot be kept by renaming it. Restore beside the"
                " service, or with pgBackRest by hand."
            )

    def systemctl(self, action: str, *options: str) -> None:
        """Start or stop PostgreSQL's unit; raises BackupError with its last words when that fails."""
        done = host.run(["systemctl", action, *options, self.cluster.unit])
        if done.returncode:
            raise host.BackupError(f"systemctl {action} {self.cluster.unit} failed: {last_words(self.backups)}")

    def state(self) -> str:
        """Return what systemd says of PostgreSQL's unit, such as `active`, `failed` or `inactive`."""
        shown = host.run(["systemctl", "show", self.cluster.unit, "--property", "ActiveState,SubState"]).stdout
        state = dict(line.partition("=")[::2] for line in shown.splitlines())
        # One that ends is started again, and would end again for the same reason.
        return "failed" if state.get("SubState", "").startswith("auto-restart") else state.get("ActiveState", "unknown")

    def wait_until_recovered(self) -> None:
        """Return when PostgreSQL has reached the target and takes writes. Raises BackupError when it gives up."""
        told = time.monotonic()
        while True:
            with suppress(host.BackupError):
                if self.cluster.sql("SELECT pg_is_in_recovery();") == "f":
                    return
            if self.state() in ("failed", "inactive"):
                raise host.BackupError(last_words(self.backups))
            if time.monotonic() - told > 30:
                told = time.monotonic()
                host.say("PostgreSQL replays WAL …")
            time.sleep(0.2)

    def undo(self) -> None:
        """Put back what an earlier call, or this one, has renamed; nothing when there is nothing."""
        # One that outlives a restore that was killed would write by name, into whatever has that name then.
        host.kill_all([f"--pg1-path={self.data}", f"--stanza={self.backups.repository.stanza}"])
        kept = Path(str(host.read_json(self.note).get("kept", "")))
        if kept.name and kept.is_dir():
            self.systemctl("stop")
            if self.data.is_dir():
                shutil.rmtree(self.data)
            kept.rename(self.data)
            self.note.unlink()
            # It need not start: that may be why there was a restore.
            host.run(["systemctl", "start", self.cluster.unit])
        self.note.unlink(missing_ok=True)

    def report(self, target: Target, chosen: Backup, kept: Path, flushed: str, started: float) -> str:
        """Write down what was restored, and return it as text."""
        found = json.loads(
            self.cluster.sql(
                "SELECT json_build_object('last', extract(epoch FROM pg_last_xact_replay_timestamp()),"
                " 'timeline', (SELECT timeline_id FROM pg_control_checkpoint()));"
            )
        )
        last, taken = found["last"], host.people_seconds(time.time() - started)
        lines = [
            f"Restored {self.backups.app} to {target}, from {chosen.label}, in {taken}; timeline {found['timeline']}.",
            f"Last transaction: {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M:%S.%f} UTC."
            if last
            else f"No transaction has come after the backup, which ended at {host.stamp(chosen.ended)}.",
        ]
        if not target.moment and not flushed:
            lines.append("Nothing is lost of what was committed before the restore began: all WAL was archived.")
        elif not target.moment:
            interval = self.backups.settings["archive_timeout"]
            archived = self.backups.repository.last_archived()
            if archived:
                lines.append(f"The newest WAL in the repository is of {host.stamp(archived)}.")
            lines += [
                f"What had not been archived by then could not be added: {flushed}.",
                f"Lost is what was committed after the last transaction: as PostgreSQL archives every {interval} s",
                f"(postgresql_archive_timeout), at most its last {interval} s, unless archiving had been failing.",
            ]
        lines.append(f"The data from before is kept: {kept}")
        self.backups.file.update(
            restore={
                "time": host.stamp(),
                "to": str(target),
                "label": chosen.label,
                "last_transaction": host.stamp(last) if last else None,
                "timeline": found["timeline"],
                "kept": str(kept),
            }
        )
        return "\n".join(lines)


# An instance of its own -----------------------------------------------------------------------------------------------


def control_settings(text: str) -> list[str]:
    """Return the settings that recovery must not find smaller than they were, from what pg_controldata prints."""
    names = {
        "max_connections": "max_connections",
        "max_worker_processes": "max_worker_processes",
        "max_wal_senders": "max_wal_senders",
        "max_prepared_xacts": "max_prepared_transactions",
        "max_locks_per_xact": "max_locks_per_transaction",
    }
    found = re.findall(r"^(\w+) setting:\s+(\d+)$", text, re.MULTILINE)
    return [f"{names[name]}={value}" for name, value in found if name in names]


class Instance:
    """A PostgreSQL server beside the service: on a local socket alone, and archiving nothing."""

    def __init__(self, backups: Backups, directory: Path, port: int) -> None:
        self.backups = backups
        self.directory = directory
        self.data = directory / "data"
        self.port = port
        self.user = backups.cluster.user

    def make(self) -> None:
        """Make the directories, empty."""
        for path in (self.directory, self.data):
            path.mkdir(mode=0o700, parents=True)
            if os.geteuid() == 0:
                os.chown(path, self.user.uid, self.user.gid)

    def fetch(self, chosen: Backup, target: Target, *options: str) -> None:
        """Copy a backup there."""
        fetch(
            self.backups,
            chosen,
            target,
            self.data,
            "--archive-mode=off",
            f"--tablespace-map-all={self.directory / 'tablespaces'}",
            *options,
        )
        for name, text in {"postgresql.conf": "", "pg_hba.conf": "local all all peer\n", "pg_ident.conf": ""}.items():
            path = self.data / name
            path.write_text(text, encoding="utf-8")
            if os.geteuid() == 0:
                os.chown(path, self.user.uid, self.user.gid)

    def command(self, *more: str) -> list[str]:
        """Return the command that runs it. What it says counts more than anything that the backup has brought along."""
        done = host.run([str(self.backups.cluster.binaries / "pg_controldata"), str(self.data)], user=self.user)
        settings = [
            "listen_addresses=",
            f"unix_socket_directories={self.directory}",
            f"port={self.port}",
            f"config_file={self.data / 'postgresql.conf'}",
            f"hba_file={self.data / 'pg_hba.conf'}",
            f"ident_file={self.data / 'pg_ident.conf'}",
            "external_pid_file=",
            "archive_mode=off",
            "hot_standby=off",
            "ssl=off",
            "shared_preload_libraries=",
            # A subscription would take what its publisher has for the service.
            "max_logical_replication_workers=0",
            "logging_collector=off",
            "log_destination=stderr",
            "shared_buffers=32MB",
            *control_settings(done.stdout),
            *more,
        ]
        options = [word for setting in settings for word in ("-c", setting)]
        return [str(self.backups.cluster.binaries / "postgres"), "-D", str(self.data), *options]

    def sql(self, script: str, database: str) -> str:
        """Run SQL there."""
        return self.backups.cluster.sql(script, database, self.directory, self.port)

    def wait_until_recovered(self, problem: t.Callable[[], str]) -> None:
        """Return when it takes writes; raises BackupError when `problem` says that it has ended."""
        while True:
            with suppress(host.BackupError):
                if self.sql("SELECT pg_is_in_recovery();", "postgres") == "f":
                    return
            if text := problem():
                raise host.BackupError(text)
            time.sleep(0.2)


class Beside:
    """A restore that is there to be looked into, until it is discarded."""

    NAME = "beside"

    def __init__(self, backups: Backups) -> None:
        self.backups = backups
        self.unit = f"hardstand-beside-{backups.app}.service"
        directory = Path(backups.settings["scratch_directory"]) / f"{backups.app}-{self.NAME}"
        self.instance = Instance(backups, directory, backups.settings["beside_port"])

    def restore(self, target: Target) -> str:
        """Restore beside the service, and return how to look into it."""
        directory = self.instance.directory
        if directory.exists():
            raise host.BackupError(
                f"There is a restore beside the service already, in {directory}. Remove it: {how_to_discard(self.NAME)}"
            )
        chosen = choose(self.backups, target, directory.parent)
        note = Service(self.backups).flush()
        if note:
            host.say(f"The newest WAL could not be archived first: {note}")
        started = time.time()
        try:
            self.instance.make()
            self.instance.fetch(chosen, target)
            self.start()
            self.instance.wait_until_recovered(self.problem)
        except BaseException:
            self.remove()
            raise
        last = self.instance.sql("SELECT pg_last_xact_replay_timestamp();", "postgres")
        look = f"runuser -u postgres -- psql -h {directory} -p {self.instance.port} {self.backups.cluster.database}"
        taken = host.people_seconds(time.time() - started)
        return "\n".join(
            [
                f"Restored {self.backups.app} to {target}, from {chosen.label}, beside the service, in {taken}.",
                f"Last transaction: {last or 'none after the backup'}.",
                f"Look into it, as root on this server: {look}",
                f"Remove it: {how_to_discard(self.NAME)}",
            ]
        )

    def start(self) -> None:
        """Run it as a unit of its own, until it is discarded or the server is restarted."""
        done = host.run(
            [
                "systemd-run",
                "--quiet",
                f"--unit={self.unit}",
                f"--uid={self.instance.user.name}",
                "--property=KillSignal=SIGINT",
                *self.instance.command(),
            ]
        )
        if done.returncode:
            raise host.BackupError(f"It did not start: {done.stderr.strip()}")

    def problem(self) -> str:
        """Return why it has ended; empty while it runs."""
        if host.run(["systemctl", "is-active", self.unit]).stdout.strip() not in ("failed", "inactive"):
            return ""
        done = host.run(["journalctl", "--unit", self.unit, "--lines", "60", "--no-pager", "--output", "cat"])
        return fatal_of(done.stdout.splitlines())

    def remove(self) -> None:
        """Stop it and remove all of it."""
        host.run(["systemctl", "stop", self.unit])
        host.run(["systemctl", "reset-failed", self.unit])
        shutil.rmtree(self.instance.directory, ignore_errors=True)


def how_to_discard(name: str) -> str:
    """Return the command that removes what a restore has left."""
    return f"ansible-playbook playbooks/restore.yml -i <inventory> -e restore_discard={name}"


def left_behind(backups: Backups) -> dict[str, Path]:
    """Return what restores have left, by name."""
    data = backups.cluster.data
    found = {path.name: path for path in sorted(data.parent.glob(f"{data.name}.before-*"))}
    beside = Beside(backups)
    if beside.instance.directory.exists():
        found[beside.NAME] = beside.instance.directory
    return found


def discard(backups: Backups, name: str) -> str:
    """Remove what a restore has left."""
    with host.exclusive(backups.lock):
        Service(backups).undo()
        found = left_behind(backups)
        if name not in found:
            raise host.BackupError(f"There is no {name} to discard; there is {', '.join(found) or 'nothing'}.")
        if name == Beside.NAME:
            Beside(backups).remove()
        else:
            shutil.rmtree(found[name])
        return f"Removed {found[name]}."


# The proof ------------------------------------------------------------------------------------------------------------


class Verdict(t.NamedTuple):
    """What became of one table: rows before and after the moment that was restored, and in the restored database."""

    table: str
    before: int
    restored: int | None
    after: int
    problem: str


def bounds(before: int, after: int, inserted: int, deleted: int, rewritten: bool) -> tuple[int, int]:
    """Return the fewest and the most rows that a table may have had at a moment between two counts.

    Args:
        before: rows at the first count.
        after: rows at the last count.
        inserted: rows inserted around these counts and between them; more is harmless.
        deleted: rows deleted, likewise.
        rewritten: whether the table may have been emptied at once, which PostgreSQL does not count as deleting.
    """
    lowest = 0 if rewritten else max(min(before - deleted, after - inserted), 0)
    return lowest, max(before + inserted, after + deleted) if inserted or deleted or before != after else before


def compare(
    before: Counts, restored: Counts, after: Counts, first: Tables, last: Tables
) -> tuple[list[Verdict], list[str]]:
    """Return a verdict on each table, and what is wrong beside tables.

    Args:
        before: counts before the moment that was restored.
        restored: counts in the restored database.
        after: counts after that moment.
        first: what PostgreSQL had counted before all of them.
        last: the same after all of them.
    """
    verdicts = []
    for table in sorted(before.rows.keys() & after.rows.keys()):
        one, two = before.rows[table], after.rows[table]
        old, new = first.activity.get(table), last.activity.get(table)
        if old is None or new is None:
            continue  # made or dropped meanwhile
        # Counters start again when somebody resets them, and then say nothing.
        reset = new[1] < old[1] or new[2] < old[2]
        low, high = bounds(one, two, new[1] - old[1], new[2] - old[2], old[0] != new[0] or reset)
        found = restored.rows.get(table)
        problem = ""
        if found is None:
            problem = "is missing"
        elif found < low or (found > high and not reset):
            expected = str(low) if low == high else f"{low} to {high}"
            problem = f"has {found} rows instead of {expected}"
        verdicts.append(Verdict(table, one, found, two, problem))
    problems = []
    if restored.revisions not in (before.revisions, after.revisions):
        problems.append(
            f"its migrations are at {', '.join(restored.revisions) or 'none'}, and those of the service at"
            f" {', '.join(after.revisions) or 'none'}"
        )
    return verdicts, problems


def counts_of(output: str) -> Counts:
    """Return what the script COUNTS has printed."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rows = {line["name"]: int(line["rows"]) for line in lines if "name" in line}
    revisions = [str(name) for line in lines for name in line.get("revisions", [])]
    return Counts(rows, revisions)


def tables_of(output: str) -> Tables:
    """Return what the script TABLES has printed."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return Tables({line["name"]: (line["file"], line["inserted"], line["deleted"]) for line in lines})


class RestoreCheck:
    """Proves that the newest backup and all WAL since make a database, in an instance that is thrown away."""

    def __init__(self, backups: Backups) -> None:
        self.backups = backups
        directory = Path(backups.settings["scratch_directory"]) / f"{backups.app}-check"
        self.instance = Instance(backups, directory, backups.settings["beside_port"])
        self.server: subprocess.Popen[str] | None = None
        # Of the migrations that the restored database has had.
        self.revisions: list[str] = []

    def run(self) -> str:
        """Restore, compare, write down and return the result. Raises BackupError when it is not what it should be."""
        started = time.time()
        with host.exclusive(self.backups.lock):
            try:
                chosen, verdicts, problems = self.prove()
            except BaseException as error:
                self.record(started, None, [], [str(error) or type(error).__name__])
                raise
            finally:
                self.clean()
            problems = [f"table {found.table} {found.problem}" for found in verdicts if found.problem] + problems
            self.record(started, chosen, verdicts, problems)
        lines = [*table_of(verdicts), ""]
        if problems:
            raise host.BackupError(
                "\n".join(
                    [*lines, f"Backup {chosen.label} does not restore to what the service has: {'; '.join(problems)}."]
                )
            )
        lines.append(
            f"Backup {chosen.label} and all WAL since restore to what the service has:"
            f" {len(verdicts)} tables, {sum(found.restored or 0 for found in verdicts)} rows"
            f"{', migrations at ' + ', '.join(self.revisions) if self.revisions else ''};"
            f" {host.people_seconds(time.time() - started)}."
        )
        return "\n".join(lines)

    def prove(self) -> tuple[Backup, list[Verdict], list[str]]:
        """Return the backup, the verdicts on its tables, and what else is wrong."""
        self.clean()
        cluster, database = self.backups.cluster, self.backups.cluster.database
        everything = Target(None, "latest")
        chosen = choose(self.backups, everything, self.instance.directory.parent)
        name = f"hardstand_check_{int(time.time())}"
        first = tables_of(cluster.sql(TABLES, database))
        before = counts_of(cluster.sql(COUNTS, database))
        flush(self.backups, name)
        after = counts_of(cluster.sql(COUNTS, database))
        self.instance.make()
        self.instance.fetch(chosen, everything, "--type=name", f"--target={name}", "--target-action=promote")
        self.start()
        self.instance.wait_until_recovered(self.problem)
        restored = counts_of(self.instance.sql(COUNTS, database))
        self.revisions = restored.revisions
        # Last, because a session tells only some time after its transaction what it has inserted.
        last = tables_of(cluster.sql(TABLES, database))
        return chosen, *compare(before, restored, after, first, last)

    def start(self) -> None:
        """Run the instance as a child; it ends with us, and with our unit."""
        identity: dict[str, t.Any] = {}
        if os.geteuid() == 0:
            user = self.instance.user
            identity = {"user": user.uid, "group": user.gid, "extra_groups": os.getgrouplist(user.name, user.gid)}
        log = self.instance.directory / "log"
        with log.open("w", encoding="utf-8") as file:
            self.server = subprocess.Popen(  # noqa: S603
                # It is thrown away, so it may forget what it writes, and has nothing to tidy up.
                self.instance.command("fsync=off", "autovacuum=off"),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
                **identity,
            )

    def problem(self) -> str:
        """Return why the instance has ended; empty while it runs."""
        if self.server is None or self.server.poll() is None:
            return ""
        log = (self.instance.directory / "log").read_text(encoding="utf-8", errors="replace")
        return f"The restored database does not start: {fatal_of(log.splitlines())}"

    def clean(self) -> str:
        """Stop the instance and remove all of it, also one that an earlier run has left."""
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGQUIT)
            self.server.wait()
        self.server = None
        directory = self.instance.directory
        with suppress(OSError, ValueError, IndexError):
            pid = int((self.instance.data / "postmaster.pid").read_text(encoding="ascii").split()[0])
            # It may be another process by now.
            if str(self.instance.data).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGQUIT)
                while Path(f"/proc/{pid}").exists():
                    time.sleep(0.1)
        if directory.exists():
            shutil.rmtree(directory)
        return ""

    def record(self, started: float, chosen: Backup | None, verdicts: list[Verdict], problems: list[str]) -> None:
        """Write the result down."""
        message = (
            "; ".join(problems) or f"{len(verdicts)} tables, {sum(found.restored or 0 for found in verdicts)} rows"
        )
        self.backups.file.update(
            restore_check={
                "started": host.stamp(started),
                "ended": host.stamp(),
                "ok": not problems,
                "label": chosen.label if chosen else None,
                "tables": len(verdicts),
                "message": message,
            }
        )


def table_of(verdicts: t.Sequence[Verdict]) -> list[str]:
    """Return the verdicts as lines of a table."""
    rows = [("table", "before", "restored", "after", "")]
    for found in verdicts:
        rows.append(
            (found.table, str(found.before), str(found.restored), str(found.after), "WRONG" if found.problem else "ok")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *numbers, verdict in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join([*cells, verdict]).rstrip())
    return lines
