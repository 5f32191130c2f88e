"""The gate that pending migrations pass before they run: what would break or block the release that still serves.

squawk (https://squawkhq.com) judges the SQL that Alembic makes of them. Its rules also cover style and taste; those
that count here are listed below, each with what to do instead. A few are added that squawk does not have.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

_LATER = "drop it in a later deploy, when no release that you would go back to uses it"
_RENAME = (
    "add the new one beside it, let the code write both, fill it, let the code read the new one, and drop the old one "
    "in a later deploy"
)
_TWO_STEPS = "add it NOT VALID in this migration, and VALIDATE it in one of a later deploy, which blocks nobody"
_USED = "the release that serves may still use it"
_READS_BLOCKED = "nobody can read or write the table while all its rows are looked at or written anew"
_COMMITTED = "`with op.get_context().autocommit_block():`"
_WRITES_BLOCKED = "nobody can write to the table while all its rows are looked at"
_UNDER_LOCK = "rows-written-under-lock"

# Rule: what is wrong, and what to do instead.
RULES = {
    "ban-drop-column": (_USED, _LATER),
    "ban-drop-table": (_USED, _LATER),
    "ban-drop-view": (_USED, _LATER),
    "ban-drop-function": (_USED, _LATER),
    "ban-drop-type": (_USED, _LATER),
    "ban-drop-domain": (_USED, _LATER),
    "ban-drop-schema": (_USED, _LATER),
    "ban-drop-sequence": (_USED, _LATER),
    "ban-drop-extension": (_USED, _LATER),
    "ban-drop-database": (_USED, _LATER),
    "ban-drop-default": ("the release that serves may leave the column out when it writes a row", _LATER),
    "ban-truncate-cascade": ("it deletes what the release that serves shows", "delete rows in small batches"),
    "ban-revoke": ("the release that serves may need the right", "revoke it in a later deploy"),
    "ban-disable-trigger": (
        "the release that serves may rely on it",
        "change what the trigger does, and drop it in a later deploy",
    ),
    "renaming-column": ("the release that serves uses the old name", _RENAME),
    "renaming-table": (
        "the release that serves uses the old name",
        "add the new table or a view, and drop the old one in a later deploy",
    ),
    "renaming-object": ("the release that serves may use the old name", _RENAME),
    "ban-set-schema": ("the release that serves looks for it where it was", _RENAME),
    "changing-column-type": (
        f"{_READS_BLOCKED}, and the release that serves may write what no longer fits",
        f"{_RENAME}. A VARCHAR that only gets longer, or TEXT, does no harm: accept that",
    ),
    "adding-required-field": (
        "the release that serves does not write the column, so it could add no row any more",
        "let it be NULL, or give it a server default",
    ),
    "adding-not-nullable-field": (
        f"{_READS_BLOCKED}, and the release that serves may still write NULL",
        "in a later deploy, add a CHECK (… IS NOT NULL) NOT VALID, VALIDATE it in another migration, then SET NOT NULL",
    ),
    "adding-field-with-default": (
        _READS_BLOCKED,
        "give it a constant default or none, and fill it in batches in a migration of a later deploy",
    ),
    "adding-serial-primary-key-field": (
        _READS_BLOCKED,
        "make a unique index CONCURRENTLY, and ADD PRIMARY KEY USING INDEX in a later deploy",
    ),
    "adding-foreign-key-constraint": (_WRITES_BLOCKED, _TWO_STEPS),
    "constraint-missing-not-valid": (_WRITES_BLOCKED, _TWO_STEPS),
    "disallowed-unique-constraint": (
        _READS_BLOCKED,
        "make a unique index CONCURRENTLY, and ADD CONSTRAINT … UNIQUE USING INDEX",
    ),
    "require-concurrent-index-creation": (
        _WRITES_BLOCKED,
        f"op.create_index(…, postgresql_concurrently=True), in {_COMMITTED}",
    ),
    "require-concurrent-reindex": (_WRITES_BLOCKED, "REINDEX … CONCURRENTLY"),
    "require-concurrent-partition-detach": (_READS_BLOCKED, "DETACH PARTITION … CONCURRENTLY"),
    "ban-alter-domain-with-add-constraint": (_WRITES_BLOCKED, "use CHECK constraints of tables, NOT VALID at first"),
    "ban-concurrent-index-creation-in-transaction": (
        "PostgreSQL refuses it inside a transaction",
        f"put it into {_COMMITTED}",
    ),
    # Our own.
    "unread": ("squawk cannot read it, so nobody has judged what it does", "read it yourself, and accept it"),
    "truncate": ("it deletes what the release that serves shows, and blocks it", "delete rows in small batches"),
    "lock-table": ("it blocks the release that serves", "leave the lock out"),
    "table-rewrite": (_READS_BLOCKED, "do this in a maintenance window, or with a tool such as pg_repack"),
    _UNDER_LOCK: (
        "an ALTER TABLE before it, in the same transaction, keeps everybody away from its table until this is done",
        f"move it to a migration of a later deploy, or put it into {_COMMITTED}, which commits first",
    ),
}

_NAME = r'(?:"(?:[^"]|"")+"|\w+)(?:\s*\.\s*(?:"(?:[^"]|"")+"|\w+))?'
_KINDS = r"(?:MATERIALIZED\s+VIEW|TABLE|INDEX|TYPE|DOMAIN|VIEW|SEQUENCE|SCHEMA|FUNCTION|EXTENSION)"
_FLAGS = re.IGNORECASE | re.VERBOSE
_CREATED = re.compile(
    rf"CREATE\s+(?:OR\s+REPLACE\s+)?(?:UNLOGGED\s+|TEMP(?:ORARY)?\s+|UNIQUE\s+)*{_KINDS}\s+(?:CONCURRENTLY\s+)?"
    rf"(?:IF\s+NOT\s+EXISTS\s+)?(?P<name>{_NAME})",
    _FLAGS,
)
_TARGET = re.compile(
    rf"(?:ALTER|DROP)\s+{_KINDS}\s+(?:CONCURRENTLY\s+)?(?:IF\s+EXISTS\s+)?(?:ONLY\s+)?(?P<name>{_NAME})"
    rf"|CREATE\s+(?:UNIQUE\s+)?INDEX\b.*?\sON\s+(?:ONLY\s+)?(?P<table>{_NAME})"
    rf"|TRUNCATE\s+(?:TABLE\s+)?(?:ONLY\s+)?(?P<emptied>{_NAME})"
    rf"|UPDATE\s+(?:ONLY\s+)?(?P<updated>{_NAME})|DELETE\s+FROM\s+(?:ONLY\s+)?(?P<deleted>{_NAME})",
    _FLAGS | re.DOTALL,
)
_RENAMED = re.compile(rf"ALTER\s+{_KINDS}\s+(?:IF\s+EXISTS\s+)?{_NAME}\s+RENAME\s+TO\s+(?P<name>{_NAME})", _FLAGS)
_OWN = {
    "truncate": re.compile(r"TRUNCATE\b", re.IGNORECASE),
    "lock-table": re.compile(r"LOCK\s+(?:TABLE\s+)?\w", re.IGNORECASE),
    "table-rewrite": re.compile(
        r"VACUUM\s*(?:\([^)]*\bFULL\b|FULL\b)|CLUSTER\b|ALTER\s+TABLE\b.*\bSET\s+(?:UN)?LOGGED\b",
        re.IGNORECASE | re.DOTALL,
    ),
}
_ROWS = re.compile(r"UPDATE\b|DELETE\s+FROM\b|INSERT\s+INTO\b.*\bSELECT\b", re.IGNORECASE | re.DOTALL)
_TRANSACTION = re.compile(r"(?:BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK)\b", re.IGNORECASE)
_ALTER_TABLE = re.compile(r"ALTER\s+TABLE\b", re.IGNORECASE)
# Alembic's own table.
_BOOKKEEPING = re.compile(r"(?:UPDATE|DELETE\s+FROM|INSERT\s+INTO)\s+\"?alembic_", re.IGNORECASE)

# What may hold a semicolon that ends no statement; and comments, of which one kind names the revision. Alembic puts its
# semicolon and an empty line behind whatever a statement ends with, be it a comment.
_TOKEN = re.compile(
    r"(?P<comment>--[^\n]*?(?P<last>;(?=\n\n))?(?=\n|$)|/\*.*?\*/)"
    r"|[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|(?P<end>;)",
    re.DOTALL,
)
_RUNNING = re.compile(r"-- Running upgrade .*-> (\S+)")


class Statement(t.NamedTuple):
    """One statement of the pending SQL, without comments."""

    revision: str
    text: str


class Finding(t.NamedTuple):
    """What is wrong with a statement."""

    revision: str
    statement: str
    rule: str


class GateError(Exception):
    """The SQL could not be judged; the text says why, and what to do."""


def statements(sql: str) -> list[Statement]:
    """Split SQL into its statements, each with the revision that Alembic announces in a comment before it."""
    found: list[Statement] = []
    revision, text, begin = "", "", 0
    for match in _TOKEN.finditer(sql):
        text += sql[begin : match.start()]
        begin = match.end()
        if match["comment"] and (announced := _RUNNING.match(match["comment"])):
            revision = announced[1]
        if match["end"] or match["last"]:
            found.append(Statement(revision, text.strip()))
            text = ""
        elif not match["comment"]:
            text += match[0]
    found.append(Statement(revision, (text + sql[begin:]).strip()))
    return [each for each in found if each.text]


def judge(sql: str, server: t.Sequence[int] = ()) -> list[Finding]:
    """Return what in the SQL would break or block the release that serves, or may do so for all that is known.

    Statements about what the same SQL has created are fine, whatever they do: no release knows it.

    Args:
        sql: what Alembic prints for `upgrade … --sql`.
        server: PostgreSQL's version.

    Raises:
        GateError: squawk is missing or broken.
    """
    parts = statements(sql)
    fresh: set[str] = set()
    locked = False
    found = []
    for part, theirs in zip(parts, _squawk(parts, server), strict=True):
        text = part.text
        target = _TARGET.match(text)
        name = _plain(next(filter(None, target.groupdict().values()))) if target else ""
        if created := _CREATED.match(text):
            fresh.add(_plain(created["name"]))
        if (renamed := _RENAMED.match(text)) and name in fresh:
            fresh.add(_plain(renamed["name"]))
        rules = [rule for rule in theirs if rule in RULES] + [rule for rule, own in _OWN.items() if own.match(text)]
        if _TRANSACTION.match(text):
            locked = False
        elif locked and _ROWS.match(text) and not _BOOKKEEPING.match(text):
            rules.append(_UNDER_LOCK)
        if name not in fresh:
            locked = locked or bool(_ALTER_TABLE.match(text))
            found += [Finding(part.revision, text, rule) for rule in dict.fromkeys(rules)]
    return found


def _plain(name: str) -> str:
    """Return a name as PostgreSQL compares it; the schema that is the default one anyway is left out."""
    parts = re.findall(r'"(?:[^"]|"")+"|\w+', name)
    parts = [part[1:-1].replace('""', '"') if part.startswith('"') else part.lower() for part in parts]
    return ".".join(parts[1:] if parts[:1] == ["public"] else parts)


def _squawk(parts: t.Sequence[Statement], server: t.Sequence[int]) -> list[list[str]]:
    """Return the rules that squawk finds broken, for each statement.

    It judges nothing as long as there is one statement that it cannot read, so that one is taken out: `unread`.
    """
    texts = [part.text for part in parts]
    unread: set[int] = set()
    while True:
        # Each begins on a line of its own, so the line says which one a report is about.
        of_line = [number for number, text in enumerate(texts) for _ in range(text.count("\n") + 1)]
        reports = _run_squawk("".join(f"{text};\n" for text in texts), server)
        broken = {of_line[report["line"]] for report in reports if report["rule_name"] == "syntax-error"} - unread
        if not broken:
            break
        unread |= broken
        for number in broken:
            texts[number] = ""
    rules = [["unread"] if number in unread else [] for number in range(len(parts))]
    for report in reports:
        rules[of_line[report["line"]]].append(report["rule_name"])
    return rules


def _run_squawk(sql: str, server: t.Sequence[int]) -> list[dict[str, t.Any]]:
    """Run squawk; returns its reports."""
    program = find_squawk()
    version = f"{server[0]}.0" if server else "13.0"
    command = [program, "--reporter", "json", "--config", "/dev/null", "--pg-version", version]
    # Some of the rules have to be asked for.
    command += [f"--include={rule}" for rule in RULES if "-" in rule and rule not in _OWN and rule != _UNDER_LOCK]
    result = subprocess.run(  # noqa: S603
        [*command, "--stdin-filepath", "pending.sql"], input=sql, capture_output=True, text=True, check=False
    )
    try:
        return t.cast("list[dict[str, t.Any]]", json.loads(result.stdout or "[]"))
    except ValueError:
        raise GateError(f"squawk failed: {(result.stderr or result.stdout).strip()[:500]}") from None


def find_squawk() -> str:
    """Return squawk's path on the control node.

    Raises:
        GateError: it is not installed.
    """
    # Beside the Python that runs Ansible, whether or not its virtualenv is activated.
    beside = Path(sys.executable).with_name("squawk")
    found = str(beside) if beside.exists() else shutil.which("squawk")
    if not found:
        raise GateError(
            "squawk, which judges pending migrations, is not installed on the control node. Run bin/setup there "
            "(on a host that deploys what is pushed: playbooks/git_push.yml), or set release_migration_lint: off."
        )
    return found
