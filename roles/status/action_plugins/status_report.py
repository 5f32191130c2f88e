"""Action plugin: one table of the whole fleet, and a line for each thing that is wrong.

Runs once, on the control node, and opens no connection.

Arguments:
    hosts: names of the servers, in the order of the table.
    app_hosts: those that run the application.
    lb_hosts: those that are load balancers.
    found: what ``status_host`` returned, by host; a host may be missing.
    limits: ``certificate_days``, ``disk_free_mb`` and ``disk_free_percent`` below which there is something to do.
    format: ``table`` or ``json``.
    fail: whether to fail when something is wrong.

Returns ``problems``, each with the ``hosts`` that have it and a ``text``, and ``notes``, of the same form, on what can
wait. A failure says only how many problems there are: they have just been shown.
"""

from __future__ import annotations

import json
import runpy
import typing as t
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ansible.plugins.action import ActionBase

# Knows whether the process that holds a lock is still there, when it ran on this machine.
PREFLIGHT = Path(__file__).resolve().parents[2] / "preflight" / "action_plugins" / "preflight_host.py"

# Share of PostgreSQL's connections from which on they are about to run out.
CONNECTIONS_USED = 0.9

# How long backups are new, so that there need not be one; and how long a look at them may be ago.
NEW = timedelta(hours=1)
UNSEEN = timedelta(hours=1)

# A server that renews a certificate by itself does so when a third of the lifetime is left, and tries twice a day. One
# failure may be anybody's; with less than this share left, a renewal is overdue whatever is said of it.
RENEWAL_FAILURES = 2
RENEWAL_OVERDUE = 1 / 4
RENEWAL_UNSEEN = timedelta(days=2)

# What does what waits.
PATCH = "playbooks/patch.yml"

# How much later than every so many days updates may come by themselves; that a server was off is no reason to say so.
UPDATES_LATE = timedelta(days=2)

# Characters in a line. A wider terminal gives more room to the commit's subject.
WIDTH = 120

Facts = Mapping[str, t.Any]


class Problem(t.NamedTuple):
    """One thing that is wrong, or to be known, on some hosts or, when there are none, with the fleet."""

    hosts: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.hosts)}: {self.text}" if self.hosts else self.text


def moment(text: object) -> datetime | None:
    """Return a moment that a server wrote down, or None when it is none."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def when(text: object, now: datetime) -> str:
    """Return a moment as a narrow column shows it: the time of day, or the date of what is older (UTC)."""
    then = moment(text)
    if then is None:
        return "-"
    if now - then < timedelta(hours=20):
        return f"{then:%H:%M}"
    return f"{then:%b %d}" if now - then < timedelta(days=300) else f"{then:%Y-%m}"


def size(megabytes: int) -> str:
    """Return MB as people read them."""
    return f"{megabytes}M" if megabytes < 10_000 else f"{megabytes // 1024}G"


def tightest(disks: Iterable[Facts]) -> Facts | None:
    """Return the file system with the least of its space left."""
    return min(disks, key=lambda disk: disk["free_percent"], default=None)


def certificate_days(status: Facts) -> int | None:
    """Return the days until the first of a host's certificates ends; None when none can be read."""
    return min((found["days"] for found in status["certificates"] if found["days"] is not None), default=None)


# The table ------------------------------------------------------------------------------------------------------------

COLUMNS = ("host", "release", "subject", "slot", "since", "work", "health", "cert", "disk", "last deploy", "by")
SUBJECT = COLUMNS.index("subject")


def health(status: Facts) -> str:
    """Return a host's health in a word."""
    application, answer = status["app"], status["answer"]
    if status["nginx"] not in (None, "active") or (status["database"] and status["database"]["problem"]):
        return "down"
    if application and not application["healthy"]:
        code = application["health"].partition(" ")[0]
        return code if code.isdecimal() else "down"
    if answer and not answer["ok"]:
        code = answer["said"].partition(" ")[0]
        return code if code.isdecimal() else "down"
    return "ok"


def row(host: str, status: Facts | None, now: datetime) -> list[str]:
    """Return a host's cells."""
    if status is None:
        return [host, "unreachable", *["-"] * (len(COLUMNS) - 2)]
    application = status["app"] or {}
    days, disk, last = certificate_days(status), tightest(status["disks"]), status["last_deploy"] or {}
    deployed = f"{str(last['outcome']).partition(':')[0]} {when(last['when'], now)}" if last else "-"
    release, subject = purpose(status)
    wanted = application.get("workers_wanted")
    return [
        host,
        release,
        subject,
        application.get("slot") or "-",
        when(application.get("since"), now),
        f"{application['workers']}/{wanted}" if wanted is not None else "-",
        health(status),
        "-" if days is None else f"{days}d",
        f"{disk['free_percent']}% {size(disk['free_mb'])}" if disk else "-",
        deployed,
        str(last.get("who") or "-"),
    ]


def purpose(status: Facts) -> tuple[str, str]:
    """Return what a host is for, and a word on that: its release and the commit's subject, if it has one."""
    if status["app"] is not None:
        return status["app"]["release"] or "none", status["app"]["subject"]
    if status["nginx"] is not None:
        members = status["pool"] or {}
        serving = sum(not member["drained"] for member in members.values())
        return "(balancer)", f"{serving} of {len(members)} members"
    if status["database"] is not None:
        return "(database)", f"PostgreSQL {status['database']['version'] or '?'}"
    return "(backup)", "-"


def people_bytes(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def data_line(host: str, status: Facts, now: datetime) -> str:
    """Return a line on a host's database and backups; empty when it has neither."""
    parts = []
    if (database := status["database"]) and not database["problem"]:
        parts.append(f"PostgreSQL {database['version']}")
        parts.append(f"{database['connections']} of {database['max_connections']} connections")
    backup = status["backup"] or {}
    if last := backup.get("last_success"):
        size = f", of a database of {people_bytes(last['size'])}" if last.get("size") else ""
        what = f"{last['type']} backup {when(last['ended'], now)}, {people_bytes(last['bytes'])}{size}"
        parts.append(f"{what} in {backup['repository']}")
    elif backup.get("runs_backups"):
        parts.append(f"no backup yet in {backup['repository']}")
    if archive := backup.get("archive"):
        parts.append(f"WAL archived {when(archive['last_archived'], now)}")
    if tried := backup.get("restore_check"):
        parts.append(f"restore tried {when(tried['ended'], now)}: {'ok' if tried['ok'] else 'failed'}")
    if status["backup_note"]:
        parts.append(status["backup_note"])
    return f"{host}: {'; '.join(parts)}" if parts else ""


def cut(text: str, width: int) -> str:
    """Return a text in at most so many characters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def table(rows: list[list[str]], width: int) -> str:
    """Return the rows below their headings, in at most `width` characters when that can be had."""
    rows = [list(COLUMNS), *([*cells[:-1], cut(cells[-1], 14)] for cells in rows)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    room = width - sum(widths) + widths[SUBJECT] - 2 * (len(COLUMNS) - 1)
    widths[SUBJECT] = max(min(widths[SUBJECT], room), len("subject"))
    lines = []
    for cells in rows:
        cells[SUBJECT] = cut(cells[SUBJECT], widths[SUBJECT])
        lines.append("  ".join(cell.ljust(widths[column]) for column, cell in enumerate(cells)).rstrip())
    return "\n".join(lines)


# What is wrong --------------------------------------------------------------------------------------------------------


def together(found: Iterable[tuple[str, str]]) -> Iterator[Problem]:
    """Yield one problem for each text, with all the hosts that have it."""
    by_text: dict[str, list[str]] = {}
    for host, text in found:
        by_text.setdefault(text, []).append(host)
    for text, hosts in by_text.items():
        yield Problem(tuple(hosts), text)


class Fleet:
    """All that was found, and what of it is wrong."""

    def __init__(self, arguments: Facts) -> None:
        self.hosts: list[str] = list(arguments["hosts"])
        self.app_hosts = [host for host in self.hosts if host in arguments["app_hosts"]]
        self.lb_hosts = [host for host in self.hosts if host in arguments["lb_hosts"]]
        self.limits = arguments["limits"]
        found = arguments["found"]
        self.unreachable: dict[str, str] = {}
        self.statuses: dict[str, Facts] = {}
        for host in self.hosts:
            result = found.get(host) or {}
            if result.get("status"):
                self.statuses[host] = result["status"]
            else:
                self.unreachable[host] = result.get("problem") or "was not asked"

    def problems(self, is_dead: t.Callable[[Facts], bool]) -> list[Problem]:
        """Return everything that is wrong, the worst first.

        Args:
            is_dead: whether the holder of a lock ran on this machine and is gone.
        """
        return [
            *together(self.unreachable.items()),
            *self.releases(),
            *together((host, text) for host, status in self.statuses.items() for text in self.service(status)),
            *together((host, text) for host, status in self.statuses.items() for text in self.database(status)),
            *self.pools(),
            *self.maintenance(),
            *self.locks(is_dead),
            *self.last_deploys(),
            *together((host, text) for host, status in self.statuses.items() for text in self.backups(status)),
            *together((host, text) for host, status in self.statuses.items() for text in self.resources(status)),
        ]

    def notes(self) -> list[Problem]:
        """Return what has to be done some day, and is no problem until then."""
        return list(together((host, text) for host, status in self.statuses.items() for text in self.system(status)))

    @staticmethod
    def system(status: Facts) -> Iterator[str]:
        """Yield what waits on a host's operating system."""
        found, now = status["system"], moment(status["time"])
        if found["reboot"]:
            yield f"waits for a reboot, for {' and '.join(found['reboot'])}: {PATCH}"
        if found["outside"]:
            units = " and ".join(found["outside"])
            yield f"{units} started before its sandbox was set up, and is without it until the next start: {PATCH}"
        if (updates := found["updates"]) and now is not None:
            last = moment(updates["last"]) or now
            if now - last > timedelta(days=updates["days"]) + UPDATES_LATE:
                yield f"no unattended updates since {updates['last']}; see /var/log/unattended-upgrades there"

    def releases(self) -> Iterator[Problem]:
        """Yield a problem when the fleet is not on one release."""
        by_release: dict[str, list[str]] = {}
        for host in self.app_hosts:
            if host in self.statuses:
                by_release.setdefault(self.statuses[host]["app"]["release"] or "none", []).append(host)
        if len(by_release) > 1:
            told = "; ".join(f"{release} on {', '.join(hosts)}" for release, hosts in by_release.items())
            yield Problem((), f"more than one release: {told}. Deploy, or roll back with playbooks/rollback.yml")

    def service(self, status: Facts) -> Iterator[str]:
        """Yield what keeps a host from serving as it should."""
        application, answer = status["app"], status["answer"]
        if status["nginx"] not in (None, "active"):
            yield f"nginx is {status['nginx']}; see `systemctl status nginx` there"
        if application and not application["healthy"]:
            state = (
                f" (Supervisor says {application['state']})" if application["state"] not in (None, "RUNNING") else ""
            )
            yield f"not healthy{state}: {application['health']}"
        elif answer and not answer["ok"] and status["nginx"] == "active":
            yield f"does not answer clients: {answer['said']}"
        if not application:
            return
        wanted = application["workers_wanted"]
        if application["state"] == "RUNNING" and wanted is not None and application["workers"] < wanted:
            yield f"{application['workers']} of {wanted} workers run"
        if application.get("configured") is False:
            yield f"runs something else than {application['release']}, which `current` names; deploy again"
        pending = application["pending"]
        if pending and not status["lock"]:
            who = f" by {pending['who']}" if pending["who"] else ""
            yield (
                f"a deploy of {pending['to']}{who} was cut off half-way; playbooks/recover.yml puts the fleet back on"
                " one release"
            )

    def database(self, status: Facts) -> Iterator[str]:
        """Yield what is wrong with a host's PostgreSQL."""
        found = status["database"]
        if not found:
            return
        if found["problem"]:
            yield f"PostgreSQL does not answer: {found['problem']}"
            return
        if found["connections"] >= CONNECTIONS_USED * found["max_connections"]:
            yield f"{found['connections']} of PostgreSQL's {found['max_connections']} connections are in use"
        if found["pending_restart"]:
            yield (
                f"PostgreSQL needs a restart to use what is configured for {', '.join(found['pending_restart'])}:"
                " deploy with -e postgresql_restart=true at a quiet time"
            )

    def backups(self, status: Facts) -> Iterator[str]:
        """Yield what is wrong with the backups that a host makes, or that are made of it."""
        backup, now = status["backup"], moment(status["time"])
        if backup is not None and now is not None:
            if not backup:
                yield "has no backups yet; deploy.yml sets them up"
            else:
                yield from self.backup(backup, now)
        for path in status["kept"]:
            name = "beside" if path.endswith("-beside") else path.rpartition("/")[2]
            yield f"keeps what a restore has left in {path}; remove it: playbooks/restore.yml -e restore_discard={name}"

    @staticmethod
    def backup(backup: Facts, now: datetime) -> Iterator[str]:
        """Yield what is wrong with backups, by the state file of the program that makes them."""
        last, success, check, tried = (backup.get(part) for part in ("last", "last_success", "check", "restore_check"))
        told = ""
        new = now - (moment(backup.get("created")) or now) < NEW
        if last and not last["ok"]:
            told = last["message"]
            yield f"the last backup, at {last['ended']}, failed: {told}"
        elif backup.get("runs_backups") and not success and not new:
            yield "there is no backup yet; make one: playbooks/backup.yml"
        if backup.get("runs_backups") and success:
            age = now - (moment(success["ended"]) or now)
            if age > timedelta(hours=backup["max_age_hours"]):
                yield (
                    f"the newest backup is of {success['ended']}, and should not be older than"
                    f" {backup['max_age_hours']} hours"
                )
        if check and not check["ok"] and check["message"] not in told:
            yield f"backups: {check['message']} (seen at {check['time']})"
        if (not check and not new) or (check and now - (moment(check["time"]) or now) > UNSEEN):
            since = f" since {check['time']}" if check else ""
            yield f"nothing has looked after the backups{since}; see `systemctl list-timers 'hardstand-*'` there"
        if tried and not tried["ok"]:
            yield f"the last restore check, at {tried['ended']}, failed: {tried['message']}"

    def resources(self, status: Facts) -> Iterator[str]:
        """Yield what is about to run out on a host."""
        for found in status["certificates"]:
            renewal = status["renewals"].get(Path(found["path"]).stem)
            if found["problem"]:
                yield f"certificate {found['path']} {found['problem']}"
            elif found["days"] < 0:
                yield f"certificate {found['path']} ended on {found['ends']}"
            elif renewal is None and found["days"] < self.limits["certificate_days"]:
                yield f"certificate {found['path']} ends in {found['days']} days, on {found['ends']}"
            if renewal is not None:
                for text in self.renewal(renewal, moment(status["time"])):
                    yield f"certificate {found['path']} {text}"
        for disk in status["disks"]:
            where = " and ".join(disk["directories"])
            few = disk["free_percent"] < self.limits["disk_free_percent"]
            if few or disk["free_mb"] < self.limits["disk_free_mb"]:
                yield f"{disk['free_mb']} MB ({disk['free_percent']} %) free for {where}"
            if disk["inodes_percent"] < self.limits["disk_free_percent"]:
                yield f"{disk['inodes_percent']} % of the inodes free for {where}"

    @staticmethod
    def renewal(record: Facts, now: datetime | None) -> Iterator[str]:
        """Yield what is wrong with the renewal of a certificate, by the record of the program that does it."""
        if not record or now is None:
            yield "was never asked for; deploy.yml does"
            return
        starts, ends, checked = moment(record["starts"]), moment(record["ends"]), moment(record["checked"])
        why = f": {cut(record['message'], 300)}" if record["message"] else ""
        last = (
            f"the last that went well was at {record['succeeded']}" if record["succeeded"] else "none has gone well yet"
        )
        if record["temporary"]:
            yield f"is a temporary one that no client trusts{why}"
        elif record["missing"]:
            yield f"does not cover {', '.join(record['missing'])}{why}"
        elif record["failures"] >= RENEWAL_FAILURES:
            yield f"is not renewed: {record['failures']} attempts have failed, {last}{why}"
        elif starts and ends and ends - now < (ends - starts) * RENEWAL_OVERDUE:
            yield f"ends on {record['ends']} and should have been renewed by now{why}"
        if record["reload_due"]:
            yield f"is new, and services do not use it yet{why}"
        if checked is None or now - checked > RENEWAL_UNSEEN:
            since = f" since {record['checked']}" if checked else ""
            yield f"was not looked after{since}; see `systemctl list-timers 'hardstand-*'` there"

    def pools(self) -> Iterator[Problem]:
        """Yield what keeps load balancers from sending requests to a host."""
        found: list[tuple[str, str]] = []
        for host in self.lb_hosts:
            if host not in self.statuses:
                continue
            pool = self.statuses[host]["pool"]
            if pool is None:
                found.append((host, "has no pool yet; deploy.yml makes it"))
                continue
            for name, member in pool.items():
                if member["drained"]:
                    since = f" since {member['since']}" if member.get("since") else ""
                    reason = member.get("reason") or "no reason given"
                    found.append((host, f"sends drained {name} no requests{since}: {reason}"))
            missing = [name for name in self.app_hosts if name not in pool]
            if missing:
                found.append((host, f"does not have {', '.join(missing)} in its pool; deploy.yml adds it"))
        yield from together(found)

    def maintenance(self) -> Iterator[Problem]:
        """Yield a problem when clients are shown the maintenance page."""
        yield from together(
            (
                host,
                f"maintenance is on since {status['maintenance']}; off: playbooks/maintenance.yml -e maintenance=off",
            )
            for host, status in self.statuses.items()
            if status["maintenance"]
        )

    def locks(self, is_dead: t.Callable[[Facts], bool]) -> Iterator[Problem]:
        """Yield who deploys, or would if its run had not died."""
        # A run takes its lock on one server after the other: it is told once, with the first of the moments.
        since: dict[tuple[object, object], str] = {}
        for status in self.statuses.values():
            if held := status["lock"]:
                run = held["owner"], held["pid"]
                since[run] = min(since.get(run, str(held["since"])), str(held["since"]))
        found = []
        for host, status in self.statuses.items():
            if held := status["lock"]:
                who = f"{held['owner']} (pid {held['pid']}) since {since[held['owner'], held['pid']]}"
                if is_dead(held):
                    text = f"lock of a deploy that has died: {who}; the next deploy from here takes it"
                elif held["expired"]:
                    text = f"lock that is too old to count: {who}; the next deploy takes it"
                else:
                    text = f"a deploy is under way: {who}"
                found.append((host, text))
        yield from together(found)

    def last_deploys(self) -> Iterator[Problem]:
        """Yield the deploy that failed last, where none has succeeded since; each deploy once, with its own reason."""
        by_deploy: dict[str, dict[str, Facts]] = {}
        for host, status in self.statuses.items():
            last = status["last_deploy"]
            if last and str(last["outcome"]).startswith("failed"):
                by_deploy.setdefault(str(last.get("id")), {})[host] = last
        for records in by_deploy.values():
            # The host that failed knows why; the others only that they went back.
            culprit = next((host for host, last in records.items() if last["outcome"] != "failed: undone"), None)
            host, last = (culprit, records[culprit]) if culprit else next(iter(records.items()))
            where = f" on {host}" if culprit and len(records) > 1 else ""
            reason = f": {last['reason']}" if last.get("reason") else ""
            text = f"the last deploy, of {last['release']} by {last['who']} at {last['when']}, {last['outcome']}{where}"
            yield Problem(tuple(records), f"{text}{reason}")


class ActionModule(ActionBase):
    """Show the fleet, and fail when something is wrong."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Show what was found; returns the problems."""
        super().run(tmp, task_vars)
        arguments = self._task.args
        fleet = Fleet(arguments)
        now = datetime.now(UTC)
        problems, notes = fleet.problems(runpy.run_path(str(PREFLIGHT))["is_dead"]), fleet.notes()
        if arguments["format"] == "json":
            self._display.display(self.document(fleet, problems, notes, now))
        else:
            rows = [row(host, fleet.statuses.get(host), now) for host in fleet.hosts]
            width = max(WIDTH, getattr(self._display, "columns", 0))
            lines = ["", f"{now:%Y-%m-%d %H:%M} UTC", "", table(rows, width), ""]
            data = [data_line(host, status, now) for host, status in fleet.statuses.items()]
            lines += [*filter(None, data), ""] if any(data) else []
            lines += [*map(str, notes), ""] if notes else []
            lines += [f"! {problem}" for problem in problems] or ["All is well."]
            self._display.display("\n".join(lines))
        if problems and arguments["fail"]:
            count = "One thing is" if len(problems) == 1 else f"{len(problems)} things are"
            return {"failed": True, "changed": False, "msg": f"{count} not as it should be; see above."}
        return {
            "changed": False,
            "problems": [problem._asdict() for problem in problems],
            "notes": [note._asdict() for note in notes],
        }

    @staticmethod
    def document(fleet: Fleet, problems: list[Problem], notes: list[Problem], now: datetime) -> str:
        """Return everything as one line of JSON, which stands out among Ansible's own."""
        hosts = {host: {"problem": fleet.unreachable.get(host), **fleet.statuses.get(host, {})} for host in fleet.hosts}
        for status in hosts.values():
            if status.get("app") or status.get("pool") is not None:
                status["health"] = health(status)
        return json.dumps(
            {
                "time": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                "ok": not problems,
                "problems": [problem._asdict() for problem in problems],
                "notes": [note._asdict() for note in notes],
                "hosts": hosts,
            }
        )
