#!/usr/bin/python3 -B
"""Backups of a PostgreSQL server with pgBackRest: make them, watch them, restore them, prove that they can be restored.

Runs on the database server, and on the server that keeps the backups where that is another one; each has settings of
its own (see ``backup_host.py``). `prepare`, `retry`, `restore` and `discard` are for root, the others also for
PostgreSQL's account.

    postgresql_backup.py --app blog prepare [--new] [--adopt]     make the repository, or refuse one of other data
    postgresql_backup.py --app blog run [--type full|diff|incr]   make a backup; without a type, the one that is due
    postgresql_backup.py --app blog check                         is all well? Exit code 1 and the reason when not
    postgresql_backup.py --app blog retry                         make up for a backup that failed, once all is well
    postgresql_backup.py --app blog status                        the state file and the list of backups, as JSON
    postgresql_backup.py --app blog restore --to latest|MOMENT [--into service|beside] [--timeline N]
    postgresql_backup.py --app blog discard NAME                  remove what a restore has left, by its name
    postgresql_backup.py --app blog restore-check [--clean]       restore to a scratch instance and compare

The last three are in ``postgresql_restore.py``.
"""

from __future__ import annotations

import json
import os
import re
import time
import typing as t
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

if t.TYPE_CHECKING:
    from roles.postgresql_backup.files import backup_host as host
else:
    import backup_host as host

# What PostgreSQL says of its archiver. A file that is ready is one that waits to be archived.
ARCHIVER = """
SELECT json_build_object(
    'mode', current_setting('archive_mode'),
    'last_archived', extract(epoch FROM last_archived_time),
    'last_failed', extract(epoch FROM last_failed_time),
    'oldest_waiting', (SELECT extract(epoch FROM min(modification)) FROM pg_ls_archive_statusdir()
                       WHERE name LIKE '%.ready'))
FROM pg_stat_archiver
"""

# Free bytes below which a repository counts as full: two WAL segments.
LEAST_FREE = 32 * 2**20

# How often a backup that failed is tried again while all seems well, in seconds.
RETRY_EVERY = 3600.0


class Backup(t.NamedTuple):
    """One backup in the repository. Moments are seconds since the epoch."""

    label: str
    type: str
    started: float
    ended: float
    size: int
    stored: int
    start_lsn: int
    stop_lsn: int
    first_segment: str
    """The name of the WAL segment that recovery begins with."""

    @property
    def timeline(self) -> int:
        """PostgreSQL's timeline, of which every restore begins a new one."""
        return int(self.first_segment[:8], 16)


class Info(t.NamedTuple):
    """What the repository holds of the application."""

    backups: list[Backup]
    systems: dict[int, tuple[str, str]]
    """By number, PostgreSQL's version and the cluster's system identifier; the highest number is the present one."""
    problem: str


class History(t.NamedTuple):
    """A timeline and where those before it ended (in the WAL's positions), the first one first."""

    timeline: int
    ends: list[tuple[int, int]]

    @classmethod
    def parse(cls, timeline: int, text: str) -> History:
        """Return the history that PostgreSQL has written down for a timeline."""
        rows = (line.split() for line in text.splitlines())
        return cls(timeline, [(int(row[0]), lsn(row[1])) for row in rows if len(row) > 1 and row[0].isdecimal()])

    def timeline_at(self, position: int) -> int:
        """Return the newest timeline that has a position, as PostgreSQL's tliOfPointInHistory() does."""
        begins = [0, *(end for _, end in self.ends)]
        ends = [(found, end) for found, end in self.ends] + [(self.timeline, None)]
        for begin, (found, end) in reversed([*zip(begins, ends, strict=True)]):
            if begin <= position and (end is None or position < end):
                return found
        return self.timeline

    def timelines(self) -> list[int]:
        """Return all timelines that lead to this one, the first one first, and this one."""
        return [*(found for found, _ in self.ends), self.timeline]

    def has(self, backup: Backup) -> bool:
        """Return whether recovery from a backup can reach the end of this timeline."""
        return self.timeline_at(backup.start_lsn) == backup.timeline == self.timeline_at(backup.stop_lsn - 1)


def lsn(text: str) -> int:
    """Return a position in the WAL, such as 0/3000028, as a number."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def error_of(output: str) -> str:
    """Return what pgBackRest complains of, on one line, without its hints for people who use it by hand."""
    found = re.findall(r"ERROR: \[\d+\]: (.*?)(?=\n\s*(?:HINT|P\d\d|\d{4}-|\[)|\Z)", output, re.DOTALL)
    return " ".join((found[0] if found else output).split())[:600]


class Repository:
    """pgBackRest's repository, as this server reaches it."""

    def __init__(self, settings: t.Mapping[str, t.Any]) -> None:
        self.stanza: str = settings["stanza"]
        # Empty when the repository is not a directory on this server.
        self.path: str = settings["repository_path"]
        self.user = host.account("postgres")

    def call(self, command: str, *options: str, timeout: float | None = None) -> str:
        """Run pgBackRest and return its output. Raises BackupError with the reason when it fails."""
        done = host.run(
            [
                "pgbackrest",
                f"--stanza={self.stanza}",
                "--log-level-console=off",
                "--log-level-stderr=error",
                command,
                *options,
            ],
            user=self.user,
            timeout=timeout,
        )
        if done.returncode:
            raise host.BackupError(self.explain(error_of(done.stderr) or f"pgbackrest {command} failed"))
        return done.stdout

    def explain(self, error: str) -> str:
        """Return pgBackRest's complaint, with what an operator would want to hear first."""
        if problem := self.path_problem():
            return problem
        # It says the same again for its further attempts.
        error = re.split(r" \[\w+\] on (?:\d+ retries|retry)", error)[0]
        if re.search(r"unable to connect to|unable to get address|HostConnectError|timeout connecting", error):
            return f"the other server's pgBackRest (systemctl status pgbackrest) is not reached: {error}"
        if "unable to find primary" in error or "no database found" in error:
            return f"PostgreSQL does not answer, or pgBackRest on its server does not: {error}"
        if "not match the database" in error:
            return f"these are backups of another PostgreSQL than the one that runs; a deploy says what to do ({error})"
        if "CryptoError" in error or "cipher" in error:
            return (
                f"the repository cannot be decrypted ({error}): postgresql_backup_passphrase is not the one that it was"
                " made with, and a repository keeps its passphrase for good. Put the old one back, or start a new"
                " repository in another path"
            )
        return error

    def path_problem(self) -> str:
        """Return why the repository's directory cannot be used; empty when it can, or is none of this server."""
        if not self.path:
            return ""
        directory = Path(self.path)
        with suppress(PermissionError):  # that we may not look is told below
            if not directory.is_dir():
                return f"the repository {self.path} is not there; is its disk mounted?"
        # In a process of its own, because we may be root, who may write anywhere.
        probe = host.run(["mktemp", f"--tmpdir={self.path}", ".hardstand.XXXXXXXX"], user=self.user)
        if probe.returncode:
            why = probe.stderr.strip().rpartition(": ")[2]
            return f"the repository {self.path} cannot be written to: {why}"
        Path(probe.stdout.strip()).unlink(missing_ok=True)
        if (free := host.free_bytes(directory)) < LEAST_FREE:
            return f"the repository {self.path} is full: {free // 2**20} MB left on its file system"
        return ""

    def info(self) -> Info:
        """Return what the repository holds. Raises BackupError when it cannot be read."""
        # A server that is gone is to be noticed soon; pgBackRest would try for three minutes.
        listed = json.loads(self.call("info", "--output=json", "--io-timeout=20", timeout=300))
        stanza = next((found for found in listed if found["name"] == self.stanza), None)
        if stanza is None:
            return Info([], {}, "missing stanza path")
        systems = {found["id"]: (found["version"], str(found["system-id"])) for found in stanza["db"]}
        backups = [
            Backup(
                found["label"],
                found["type"],
                found["timestamp"]["start"],
                found["timestamp"]["stop"],
                found["info"]["size"],
                found["info"]["repository"].get("delta", 0),
                lsn(found["lsn"]["start"]),
                lsn(found["lsn"]["stop"]),
                found["archive"]["start"],
            )
            for found in stanza["backup"]
            # Those of a cluster before this one, which is another after an upgrade, cannot be built upon.
            if not found.get("error") and found["database"]["id"] == max(systems)
        ]
        status = stanza["status"]
        # 0: all is well. 2: there is no backup yet. 99: something that the repository's own message says.
        if status["code"] in (0, 2):
            return Info(backups, systems, "")
        said = [repo["status"]["message"] for repo in stanza.get("repo", []) if status["code"] == 99]
        return Info(backups, systems, self.explain(" ".join(str((said or [status["message"]])[0]).split())))

    def history(self, timeline: str, systems: t.Mapping[int, tuple[str, str]]) -> History | None:
        """Return the history of a timeline; None when it is the backup's own.

        Args:
            timeline: latest, current (that of the backup), or a number.
            systems: as `Info` has them.
        """
        number = max(systems)
        directory = f"archive/{self.stanza}/{systems[number][0]}-{number}"
        if timeline == "current":
            return None
        if timeline == "latest":
            names = json.loads(self.call("repo-ls", "--output=json", "--filter=^[0-9A-F]{8}\\.history$", directory))
            wanted = max((int(name[:8], 16) for name in names if name.endswith(".history")), default=1)
        else:
            wanted = int(timeline)
        if wanted == 1:
            return History(1, [])
        return History.parse(wanted, self.call("repo-get", f"{directory}/{wanted:08X}.history"))

    def segments(self) -> dict[str, float]:
        """Return when each WAL segment reached the repository, in seconds since the epoch, by the segment's name."""
        listing = ["--output=json", "--recurse", "--filter=/[0-9A-F]{24}-", f"archive/{self.stanza}"]
        listed = json.loads(self.call("repo-ls", *listing, timeout=600))
        names = ((re.search(r"/([0-9A-F]{24})-", path), found) for path, found in listed.items())
        return {name[1]: float(found["time"]) for name, found in names if name and found.get("time")}

    @staticmethod
    def gap(names: t.Collection[str], timelines: t.Sequence[int], first: str) -> tuple[str, str] | None:
        """Return the names of two WAL segments between which there is not all WAL; None when there is no gap.

        Args:
            names: of the segments that there are, eight hexadecimal digits each for the timeline and for the upper and
                the lower part of the position.
            timelines: those that lead to where recovery goes, the first one first.
            first: name of the segment that recovery begins with. If that is missing, it comes after an empty name.
        """
        there: dict[str, str] = {}
        for timeline in reversed(timelines):
            # What an earlier one has from where this one began leads elsewhere.
            until = min(there, default="~")
            mine = {name[8:]: name for name in names if int(name[:8], 16) == timeline}
            there |= {position: name for position, name in mine.items() if first[8:] <= position < until}
        if first[8:] not in there:
            return "", first
        for one, two in pairwise(sorted(there)):
            high, low = int(one[:8], 16), int(one[8:], 16)
            # How many of them one upper part has depends on how long they are.
            if two not in (f"{high:08X}{low + 1:08X}", f"{high + 1:08X}{0:08X}"):
                return there[one], there[two]
        return None

    def last_archived(self) -> float | None:
        """Return when the newest WAL segment reached the repository, in seconds since the epoch; None if none has."""
        try:
            return max(self.segments().values(), default=None)
        except (host.BackupError, ValueError):
            return None


class Cluster:
    """The PostgreSQL server on this host."""

    def __init__(self, settings: t.Mapping[str, t.Any]) -> None:
        self.user = host.account("postgres")
        self.unit: str = settings["unit"]
        self.port: int = settings["port"]
        self.database: str = settings["database"]
        self.data = Path(settings["data_directory"])
        self.binaries = Path(settings["bin_directory"])

    def sql(self, script: str, database: str = "postgres", where: Path | None = None, port: int | None = None) -> str:
        """Run SQL as PostgreSQL's own account, on the local socket, and return what it prints.

        Args:
            script: what psql reads, statements and its own commands.
            database: where.
            where: directory of the socket; Debian's unless given.
            port: the port that names the socket; the server's unless given.

        Raises:
            BackupError: PostgreSQL does not answer, or refuses the SQL.
        """
        command = ["psql", "--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set=ON_ERROR_STOP=1"]
        command += [f"--port={port or self.port}", f"--dbname={database}"]
        command += [f"--host={where}"] if where else []
        # Limits are for the application: what is asked here may take as long as it takes.
        options = {
            "PGOPTIONS": "-c statement_timeout=0 -c idle_in_transaction_session_timeout=0",
            "PGCONNECT_TIMEOUT": "10",
        }
        done = host.run(command, user=self.user, env=options, stdin=script)
        if done.returncode:
            said = " ".join(done.stderr.partition("\tIs the server running")[0].split())
            # psql(1): 2 is a connection that went bad, or never came about.
            what = "does not answer" if done.returncode == 2 else "refuses what it is asked"
            raise host.BackupError(f"PostgreSQL {what}: {said}")
        return done.stdout.strip()

    def archiver(self, limit: float, now: float) -> host.State:
        """Return the state of the archive: the state file's part `archive`.

        Args:
            limit: seconds that a WAL segment may wait.
            now: the present, in seconds since the epoch.
        """
        try:
            found = json.loads(self.sql(ARCHIVER))
        except host.BackupError as error:
            return {
                "ok": False,
                "last_archived": None,
                "failing_since": None,
                "lag_seconds": None,
                "message": str(error),
            }
        return judge_archive(found, limit, now)


def judge_archive(found: t.Mapping[str, t.Any], limit: float, now: float) -> host.State:
    """Return the state file's part `archive` from what PostgreSQL says; arguments as `Cluster.archiver` has them."""
    archived, failed, waiting = found["last_archived"], found["last_failed"], found["oldest_waiting"]
    lag = max(now - waiting, 0) if waiting is not None else 0.0
    failing = failed is not None and waiting is not None and failed > (archived or 0)
    message = ""
    if found["mode"] == "off":
        message = "PostgreSQL does not archive (archive_mode is off); deploy, and restart it when that is asked for"
    elif failing:
        message = f"archiving fails since {host.stamp(waiting)}"
    elif lag > limit:
        message = f"WAL waits to be archived since {host.stamp(waiting)}"
    return {
        "ok": not message,
        "last_archived": host.stamp(archived) if archived is not None else None,
        "failing_since": host.stamp(waiting) if message and waiting is not None else None,
        "lag_seconds": round(lag),
        "message": message,
    }


class Backups:
    """The backups of one application, as this server has to do with them."""

    def __init__(self, app: str, settings: dict[str, t.Any]) -> None:
        self.app = app
        self.settings = settings
        self.repository = Repository(settings)
        self.cluster = Cluster(settings)
        fixed = {name: settings[name] for name in ("kind", "repository", "runs_backups", "max_age_hours")}
        self.file = host.StateFile(Path(settings["state_directory"]) / f"{app}.json", fixed)
        self.lock = self.file.path.parent / f".{app}.lock"
        self.unit = f"hardstand-backup-{app}.service"

    # prepare ----------------------------------------------------------------------------------------------------------

    def prepare(self, new: bool, adopt: bool) -> str:
        """Make the repository where there is none, start the timers and the first backup; returns what was done.

        Args:
            new: make one although backups were made to one before.
            adopt: take backups of a PostgreSQL that is not the one of the repository's backups.

        Raises:
            BackupError: the repository is missing or holds the backups of other data, and nobody has said what to do.
        """
        done = []
        if not self.file.path.exists():
            self.file.update()
            done.append("the state file")
        if self.settings["runs_backups"]:
            done += self.prepare_repository(new, adopt)
        done += host.start_timers(self.settings["timers"])
        return f"changed: {', '.join(done)}" if done else "All is as it should be."

    def prepare_repository(self, new: bool, adopt: bool) -> list[str]:
        """Do what `prepare` does on the server that makes the backups."""
        done = []
        directory, info = Path(self.repository.path or "/"), Info([], {}, "missing")
        if directory.is_dir():
            info = self.repository.info()
        if info.problem and not info.problem.startswith("missing"):
            raise host.BackupError(f"The repository cannot be used: {info.problem}.")
        if info.problem:
            self.make_repository(directory, new)
            done.append(f"the repository {self.settings['repository']}")
        elif self.differs():
            if not adopt:
                raise host.BackupError(self.refusal())
            self.repository.call("stanza-upgrade")
            info = self.repository.info()
            done.append("that backups are of this PostgreSQL from now on")
        if not info.backups and not host.run(["systemctl", "is-active", self.unit]).stdout.startswith("activating"):
            host.run(["systemctl", "start", "--no-block", self.unit])
            done.append("the first backup, which is under way")
        return done

    def make_repository(self, directory: Path, new: bool) -> None:
        """Make an empty repository, unless one should be there."""
        last = self.file.read()["last_success"]
        if last and not new:
            raise host.BackupError(
                f"The repository {self.settings['repository']} holds nothing of {self.app}, and backups were made to"
                f" it, the last at {last['ended']}. If its disk is not mounted, mount it. If it is gone for good,"
                " deploy with -e postgresql_backup_new=true, which makes a new one."
            )
        if not directory.is_dir():
            directory.mkdir(mode=0o750, parents=True)
            os.chown(directory, self.repository.user.uid, self.repository.user.gid)
        self.repository.call("stanza-create")
        try:
            # PostgreSQL may have tried before there was a repository, and would wait for a minute.
            self.repository.call("check", timeout=300)
        except host.BackupError as error:
            host.say(f"WAL does not arrive yet: {error}")

    def differs(self) -> bool:
        """Return whether the repository is of another PostgreSQL than the one that runs."""
        try:
            # Changes nothing where the stanza is there, and compares it with PostgreSQL.
            self.repository.call("stanza-create")
        except host.BackupError as error:
            if "not match the database" not in str(error):
                raise
            return True
        return False

    def refusal(self) -> str:
        """Return what to say when a server's data is not that of its backups."""
        return (
            f"The PostgreSQL of {self.app} is not the one whose backups are in {self.settings['repository']}: it is new"
            " and empty, or was upgraded. Nothing was changed, and nothing is archived until this is settled. To bring"
            " the data back: ansible-playbook playbooks/restore.yml -i <inventory> -e restore_to=latest, then deploy"
            " again. Only to go on with the data that is there now: deploy with -e postgresql_backup_adopt=true. The"
            " backups stay either way."
        )

    # run --------------------------------------------------------------------------------------------------------------

    def run(self, kind: str | None) -> str:
        """Make a backup and write down how it went; returns a line about it.

        Args:
            kind: full, diff or incr; None for what the schedule says.
        """
        if not self.settings["runs_backups"]:
            raise host.BackupError(
                f"The backups are made on the server that keeps them: {self.settings['repository']}."
            )
        with host.exclusive(self.lock):
            started = time.time()
            last: host.State = {"started": host.stamp(started), "ok": False, "label": None, "type": kind, "bytes": 0}
            try:
                last["type"] = kind = kind or self.due(started)
                self.repository.call("backup", f"--type={kind}")
                made = self.newest(started)
            except BaseException as error:
                reason = str(error) or type(error).__name__
                self.file.update(last={**last, "ended": host.stamp(), "message": reason})
                raise
            stored, size = host.people_bytes(made.stored), host.people_bytes(made.size)
            taken = host.people_seconds(max(time.time() - started, 0))
            message = (
                f"{made.type} backup {made.label} of {self.app}: {stored} in {self.settings['repository']},"
                f" of a database of {size}; took {taken}"
            )
            last |= {"ended": host.stamp(), "ok": True, "label": made.label, "type": made.type}
            last |= {"bytes": made.stored, "size": made.size, "message": message}
            self.file.update(last=last, last_success=last)
        if os.geteuid() == 0:
            # The unit may have failed before, and this has made up for it.
            host.run(["systemctl", "reset-failed", self.unit])
            self.look()
        return message

    def newest(self, since: float) -> Backup:
        """Return the backup that was just made."""
        backups = self.repository.info().backups
        if not backups or backups[-1].ended < since - 60:
            raise host.BackupError("pgBackRest has reported no error, and made no backup.")
        return backups[-1]

    def due(self, now: float) -> str:
        """Return which backup is due: full when its schedule has come round since the last one, else diff."""
        info = self.repository.info()
        if info.problem:
            raise host.BackupError(info.problem)
        full = [backup.started for backup in info.backups if backup.type == "full"]
        return "full" if not full or host.next_elapse(self.settings["full_calendar"], full[-1]) <= now else "diff"

    # check ------------------------------------------------------------------------------------------------------------

    def check(self) -> str:
        """Look whether WAL arrives in the repository and the newest backup is young; raises BackupError if not."""
        now = time.time()
        archive, problems = None, []
        if self.settings["has_database"]:
            archive = self.cluster.archiver(self.settings["archive_lag_seconds"], now)
            begun = archive["last_archived"] or not self.is_new(now)
            problems += [archive["message"]] if archive["message"] and begun else []
        try:
            problems += self.repository_problems(now)
        except host.BackupError as error:
            # First, because it is the cause.
            problems.insert(0, str(error))
        message = "; ".join(problems)
        failed = {"check_failed": host.stamp(now)} if problems else {}
        self.file.update(
            archive=archive, check={"time": host.stamp(now), "ok": not problems, "message": message}, **failed
        )
        if problems:
            raise host.BackupError(f"Backups of {self.app}: {message}")
        return f"The backups of {self.app} are in order."

    def repository_problems(self, now: float) -> list[str]:
        """Return what is wrong with the repository. Raises BackupError for what keeps it from being used at all."""
        if problem := self.repository.path_problem():
            raise host.BackupError(problem)
        info = self.repository.info()
        if info.problem.startswith("missing") and not self.settings["runs_backups"] and self.is_new(now):
            return []  # The other server is about to make it.
        if info.problem.startswith("missing"):
            hint = "; if it is gone for good, see -e postgresql_backup_new=true in roles/postgresql_backup/README.md"
            raise host.BackupError(f"the repository holds nothing of {self.app} ({info.problem}){hint}")
        if info.problem:
            raise host.BackupError(info.problem)
        if not self.settings["runs_backups"]:
            return []
        # Ends a WAL segment and waits until it is in the repository: all of the way, from PostgreSQL to the disk.
        self.repository.call("check", timeout=300)
        newest = info.backups[-1].ended if info.backups else None
        problem = host.freshness_problem(self.file.read(), newest, now)
        return [problem] if problem else []

    def is_new(self, now: float) -> bool:
        """Return whether backups have only just been set up here."""
        return now - (host.seconds_of(self.file.read()["created"]) or now) < host.GRACE_HOURS * 3600

    def look(self) -> None:
        """Have the unit of `check` look now, so that nothing goes on complaining of what is over."""
        host.run(["systemctl", "start", "--no-block", f"hardstand-backup-check-{self.app}.service"])

    def retry(self) -> str:
        """Start the backup's unit when the last backup failed and nothing seems to be in its way any more."""
        last, now = self.file.read()["last"], time.time()
        if not self.settings["runs_backups"] or not last or last["ok"]:
            return "There is no failed backup to make up for."
        if now - (host.seconds_of(last.get("ended")) or 0) < RETRY_EVERY and not self.was_broken(last):
            return "The backup that failed will be tried again later."
        host.run(["systemctl", "start", "--no-block", self.unit])
        return "Making up for the backup that failed."

    def was_broken(self, last: t.Mapping[str, t.Any]) -> bool:
        """Return whether a check has failed since the last backup did: what it met has then been mended."""
        failed = host.read_json(self.file.path).get("check_failed")
        return bool(failed and failed >= str(last.get("ended")))

    # status -----------------------------------------------------------------------------------------------------------

    def status(self) -> str:
        """Return the state file and the list of backups, as JSON."""
        found: host.State = {"state": self.file.read(), "backups": [], "problem": ""}
        try:
            info = self.repository.info()
            found |= {"backups": [backup._asdict() for backup in info.backups], "problem": info.problem}
        except host.BackupError as error:
            found["problem"] = str(error)
        return json.dumps(found)


def main() -> t.NoReturn:
    """Run one command."""
    parser, commands = host.parser("Backups of a PostgreSQL server with pgBackRest.")
    prepare = commands.add_parser("prepare")
    prepare.add_argument("--new", action="store_true")
    prepare.add_argument("--adopt", action="store_true")
    run = commands.add_parser("run")
    run.add_argument("--type", choices=["full", "diff", "incr"])
    for name in ("check", "retry", "status"):
        commands.add_parser(name)
    restore = commands.add_parser("restore")
    restore.add_argument("--to", required=True)
    restore.add_argument("--into", choices=["service", "beside"], default="service")
    restore.add_argument("--timeline", default="latest")
    discard = commands.add_parser("discard")
    discard.add_argument("name")
    restore_check = commands.add_parser("restore-check")
    restore_check.add_argument("--clean", action="store_true")
    arguments = parser.parse_args()

    def work() -> str:
        backups = Backups(arguments.app, host.settings_of(arguments))
        if arguments.command == "prepare":
            return backups.prepare(arguments.new, arguments.adopt)
        if arguments.command == "run":
            return backups.run(arguments.type)
        if arguments.command in ("check", "retry", "status"):
            return str(getattr(backups, arguments.command)())
        if t.TYPE_CHECKING:
            from roles.postgresql_backup.files import postgresql_restore
        else:
            import postgresql_restore
        return str(postgresql_restore.command(backups, arguments))

    host.call(work)


if __name__ == "__main__":
    main()
