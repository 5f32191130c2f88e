"""The gate for pending migrations: what would break or block the release that serves."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail

from tests.release_support import ROLE, Repository, load

gate = load("plugin_utils/release_gate.py")
action = load("action_plugins/release_migrate.py")


def sql(*statements: str, revision: str = "r2") -> str:
    """Return SQL as Alembic prints it for one migration."""
    body = ";\n\n".join(statements)
    return f"BEGIN;\n\n-- Running upgrade r1 -> {revision}\n\n{body};\n\nCOMMIT;\n\n"


def rules(*statements: str) -> set[str]:
    found = gate.judge(sql(*statements), (15, 8))
    assert all(finding.revision == "r2" for finding in found)
    return {finding.rule for finding in found}


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("ALTER TABLE posts DROP COLUMN body", "ban-drop-column"),
        ("ALTER TABLE IF EXISTS ONLY public.posts DROP COLUMN IF EXISTS body", "ban-drop-column"),
        ("DROP TABLE posts", "ban-drop-table"),
        ("DROP VIEW v", "ban-drop-view"),
        ("DROP TYPE mood", "ban-drop-type"),
        ("ALTER TABLE posts RENAME title TO heading", "renaming-column"),
        ('ALTER TABLE "posts" RENAME COLUMN "title" TO heading', "renaming-column"),
        ("ALTER TABLE posts RENAME TO articles", "renaming-table"),
        ("ALTER TYPE mood RENAME VALUE 'x' TO 'y'", "renaming-object"),
        ("ALTER TABLE posts SET SCHEMA other", "ban-set-schema"),
        ("ALTER TABLE posts ALTER COLUMN id TYPE TEXT", "changing-column-type"),
        ("ALTER TABLE posts ADD COLUMN lang TEXT NOT NULL", "adding-required-field"),
        ("ALTER TABLE posts ALTER COLUMN lang SET NOT NULL", "adding-not-nullable-field"),
        ("ALTER TABLE posts ALTER COLUMN lang DROP DEFAULT", "ban-drop-default"),
        ("ALTER TABLE posts ADD COLUMN key UUID DEFAULT gen_random_uuid()", "adding-field-with-default"),
        ("CREATE INDEX ix_posts_title ON posts (title)", "require-concurrent-index-creation"),
        ("CREATE UNIQUE INDEX ix_posts_title ON posts (title)", "require-concurrent-index-creation"),
        ("CREATE INDEX CONCURRENTLY i ON posts (title)", "ban-concurrent-index-creation-in-transaction"),
        ("REINDEX TABLE posts", "require-concurrent-reindex"),
        ("ALTER TABLE posts ADD CONSTRAINT c CHECK (title <> '')", "constraint-missing-not-valid"),
        ("ALTER TABLE posts ADD CONSTRAINT u UNIQUE (title)", "disallowed-unique-constraint"),
        ("ALTER TABLE posts ADD CONSTRAINT f FOREIGN KEY(a) REFERENCES b (id)", "adding-foreign-key-constraint"),
        ("TRUNCATE posts", "truncate"),
        ("TRUNCATE TABLE posts CASCADE", "ban-truncate-cascade"),
        ("LOCK TABLE posts", "lock-table"),
        ("VACUUM (ANALYZE, FULL) posts", "table-rewrite"),
        ("CLUSTER posts USING i", "table-rewrite"),
        ("ALTER TABLE posts SET UNLOGGED", "table-rewrite"),
        ("ALTER TABLE posts DISABLE TRIGGER ALL", "ban-disable-trigger"),
        ("REVOKE SELECT ON posts FROM app", "ban-revoke"),
    ],
)
def test_what_breaks_or_blocks_the_release_that_serves_is_found(statement: str, rule: str) -> None:
    assert rule in rules(statement)
    assert rule in gate.RULES


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE posts ADD COLUMN lang VARCHAR(10)",
        "ALTER TABLE posts ADD COLUMN lang TEXT DEFAULT 'en' NOT NULL",
        "ALTER TABLE posts ADD COLUMN seen TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL",
        "ALTER TABLE posts ALTER COLUMN title DROP NOT NULL",
        "ALTER TABLE posts ALTER COLUMN lang SET DEFAULT 'en'",
        "ALTER TABLE posts ADD CONSTRAINT c CHECK (title <> '') NOT VALID",
        "ALTER TABLE posts ADD CONSTRAINT f FOREIGN KEY(a) REFERENCES b (id) NOT VALID",
        "ALTER TABLE posts VALIDATE CONSTRAINT c",
        "ALTER TABLE posts DROP CONSTRAINT c",
        "DROP INDEX ix_posts_title",
        "COMMIT;\n\nCREATE INDEX CONCURRENTLY i ON posts (title);\n\nBEGIN",
        "UPDATE posts SET lang = 'en' WHERE lang IS NULL",
        "INSERT INTO langs VALUES ('en'), ('; DROP TABLE posts')",
        "CREATE TABLE langs (id INTEGER NOT NULL, name VARCHAR(10), PRIMARY KEY (id))",
        "ALTER TYPE mood ADD VALUE 'x' AFTER 'y'",
        "CREATE VIEW v AS SELECT 1 AS one",
    ],
)
def test_what_does_no_harm_passes(statement: str) -> None:
    assert rules(statement) == set()


def test_what_the_same_migrations_have_created_they_may_change() -> None:
    """On a fresh database the whole history runs, renames and all."""
    assert (
        rules(
            "CREATE TABLE t (id BIGINT PRIMARY KEY, a TEXT)",
            "CREATE INDEX i ON t (a)",
            "DROP INDEX i",
            "ALTER TABLE t ADD COLUMN b TEXT NOT NULL",
            "UPDATE t SET b = a",
            "ALTER TABLE public.t RENAME a TO c",
            'ALTER TABLE "t" RENAME TO "New"',
            'ALTER TABLE "New" ALTER COLUMN c SET NOT NULL',
            'DROP TABLE "New"',
            "CREATE TYPE mood AS ENUM ('x')",
            "DROP TYPE mood",
        )
        == set()
    )
    assert rules("CREATE TABLE other.posts (id BIGINT)", "DROP TABLE posts") == {"ban-drop-table"}


def test_rows_are_not_to_be_written_while_a_table_is_locked() -> None:
    """ALTER TABLE's lock is held to the end of the transaction, and keeps out even those who read."""
    expand, fill = "ALTER TABLE posts ADD COLUMN heading TEXT", "UPDATE posts SET heading = title"
    assert rules(expand, fill) == {"rows-written-under-lock"}
    assert rules(expand, "INSERT INTO copies SELECT * FROM posts") == {"rows-written-under-lock"}
    assert rules(fill, expand) == set()
    assert rules(expand, "COMMIT", fill, "BEGIN") == set()
    assert rules(expand, "INSERT INTO langs VALUES (1)") == set()
    assert (
        rules(expand, "UPDATE alembic_version SET version_num='r2' WHERE alembic_version.version_num = 'r1'") == set()
    )


def test_each_finding_names_its_revision_and_the_whole_statement() -> None:
    text = "BEGIN;\n\n" + "".join(
        f"-- Running upgrade r{number - 1} -> r{number}\n\n{statement};\n\n"
        for number, statement in enumerate(
            [
                "ALTER TABLE posts ADD COLUMN a TEXT -- with a comment; and a semicolon",
                "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $body$ SELECT 1; SELECT 2; $body$",
                "ALTER TABLE posts\n    DROP COLUMN b",
                "INSERT INTO posts VALUES ('it''s; -- no comment', E'\\';', \"a;b\")",
                "/* a; b */ DROP TABLE posts",
            ],
            start=1,
        )
    )
    assert gate.judge(text, (15, 0)) == [
        ("r3", "ALTER TABLE posts\n    DROP COLUMN b", "ban-drop-column"),
        ("r5", "DROP TABLE posts", "ban-drop-table"),
    ]
    assert [statement.revision for statement in gate.statements(text)] == ["", "r1", "r2", "r3", "r4", "r5"]


def test_a_statement_that_squawk_cannot_read_is_found_and_does_not_hide_the_others() -> None:
    found = gate.judge(sql("ALTER TABLE a b c d", "DROP TABLE posts", "ALTER TABLE posts\n FROB"), ())
    assert [(finding.statement, finding.rule) for finding in found] == [
        ("ALTER TABLE a b c d", "unread"),
        ("DROP TABLE posts", "ban-drop-table"),
        ("ALTER TABLE posts\n FROB", "unread"),
    ]


def test_every_rule_of_squawk_that_counts_is_one_that_it_has() -> None:
    text = Path(gate.find_squawk()).read_bytes()
    own = {"unread", "rows-written-under-lock", *gate._OWN}
    assert [rule for rule in gate.RULES if rule not in own and rule.encode() not in text] == []


def test_the_projects_own_settings_of_squawk_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".squawk.toml").write_text('excluded_rules = ["ban-drop-table"]\n')
    monkeypatch.chdir(tmp_path)
    assert rules("-- squawk-ignore ban-drop-table\nDROP TABLE posts") == {"ban-drop-table"}


def test_without_squawk_the_message_names_bin_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gate.GateError, match=r"not installed on the control node\. Run bin/setup"):
        gate.judge(sql("DROP TABLE posts"))


def test_squawk_is_what_the_control_node_installs() -> None:
    wanted = re.search(r"(?m)^squawk-cli==(.+)$", (ROLE.parents[1] / "requirements-control.txt").read_text())
    assert wanted
    said = subprocess.run([gate.find_squawk(), "--version"], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["squawk", wanted[1]]


# What the action plugin makes of it -----------------------------------------------------------------------------------


class Task:
    """The action plugin on the control node, with what the module says on the server."""

    def __init__(self, said: dict[str, Any], *, check: bool = False, **args: Any) -> None:
        self.plugin = action.ActionModule.__new__(action.ActionModule)
        self.plugin._task = type("Task", (), {"args": {"step": "look", **args}, "check_mode": check, "async_val": 0})()
        self.calls: list[dict[str, Any]] = []
        self.said = said

        def execute(module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
            assert task_vars == {}
            self.calls.append(module_args)
            return dict(self.said)

        self.plugin._execute_module = execute

    def run(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})
        result: dict[str, Any] = self.plugin.run(None, {})
        return result


def pending(*statements: str, **changes: Any) -> dict[str, Any]:
    """Return what the module says when migration r2 is pending."""
    return {
        "built": True,
        "live_commit": "abc",
        "current": ["r1"],
        "pending": [{"revision": "r2", "message": "Drop posts"}],
        "changes": True,
        "ran": False,
        "dialect": "postgresql",
        "server": [15, 8],
        "scripts": [{"text": sql(*statements)}],
        **changes,
    }


SETTINGS: dict[str, Any] = {"lint": "refuse", "accept": [], "settings_file": "inventories/prod/group_vars/all/vars.yml"}


def test_a_dangerous_migration_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(pending("DROP TABLE posts"), **SETTINGS)
    result = task.run(monkeypatch)
    assert result["failed"]
    assert result["msg"] == (
        "Pending migrations, in this order:\n"
        "r2  Drop posts\n"
        "\n"
        "They would break or block the release that serves (r2):\n"
        "\n"
        "r2 Drop posts\n"
        "  DROP TABLE posts\n"
        "    ban-drop-table: the release that serves may still use it.\n"
        "    Instead: drop it in a later deploy, when no release that you would go back to uses it.\n"
        "\n"
        "README.md, section Migrations, shows how to expand now and contract later. Where the release that serves\n"
        "no longer uses what this changes, and the table is small or quiet enough, accept it in\n"
        'inventories/prod/group_vars/all/vars.yml:  release_migration_accept: ["r2"]\n'
        "The database is as it was, and the release that was live still serves."
    )
    assert "scripts" not in result
    assert [call["step"] for call in task.calls] == ["look", "refuse"]
    assert task.calls[1]["reason"] == "migrations: They would break or block the release that serves (r2)"


def test_what_is_harmless_is_only_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    result = Task(pending("ALTER TABLE posts ADD COLUMN a TEXT"), **SETTINGS).run(monkeypatch)
    assert "failed" not in result
    assert "warnings" not in result
    assert result["lines"] == ["Pending migrations, in this order:", "r2  Drop posts"]


def test_an_accepted_revision_passes_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    said = pending("DROP TABLE posts")
    assert "failed" not in Task(said, **{**SETTINGS, "accept": ["r2"]}).run(monkeypatch)
    assert Task(said, **{**SETTINGS, "accept": ["r3"]}).run(monkeypatch)["failed"]
    said["pending"].append({"revision": "r3", "message": "Another"})
    said["scripts"].append({"text": sql("DROP TABLE more", revision="r3")})
    message = Task(said, **{**SETTINGS, "accept": ["r2"]}).run(monkeypatch)["msg"]
    assert "serves (r3):" in message
    assert "DROP TABLE posts" not in message


def test_warn_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    said = pending("DROP TABLE posts")
    warned = Task(said, **{**SETTINGS, "lint": "warn"}).run(monkeypatch)
    assert "failed" not in warned
    assert "ban-drop-table" in warned["warnings"][0]
    # YAML takes an unquoted off for false.
    for off in ("off", False):
        task = Task({**said, "scripts": []}, **{**SETTINGS, "lint": off})
        assert "warnings" not in task.run(monkeypatch)
        assert task.calls[0]["sql"] is False


def test_where_nothing_serves_there_is_nothing_to_break(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "failed" not in Task(pending("DROP TABLE x", live_commit="", current=[]), **SETTINGS).run(monkeypatch)
    # A database that has been migrated belongs to somebody: servers are moved to it, for example.
    assert Task(pending("DROP TABLE x", live_commit=""), **SETTINGS).run(monkeypatch)["failed"]


def test_what_cannot_be_judged_is_refused_and_can_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = {"text": sql("SELECT 1"), "revision": "r2", "error": "AttributeError: no bind"}
    said = pending(scripts=[piece])
    result = Task(said, **SETTINGS).run(monkeypatch)
    assert (
        "Alembic cannot make SQL of it (AttributeError: no bind), so nobody has judged what it does." in result["msg"]
    )
    assert "failed" not in Task(said, **{**SETTINGS, "accept": ["r2"]}).run(monkeypatch)


def test_secrets_go_in_one_string_that_no_output_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(pending(), **SETTINGS, secrets={"DATABASE_URL": 'a"b', "N": 1})
    task.run(monkeypatch)
    assert task.calls[0]["secrets"] == 'DATABASE_URL="a\\"b"\nN="1"\n'


# What a release that is not built brings ------------------------------------------------------------------------------


def migration(revision: str, follows: str | None, message: str = "") -> str:
    return f'"""{message}\n\nMore.\n"""\nrevision: str = "{revision}"\ndown_revision = {follows!r}\n'


def test_check_mode_names_the_migrations_that_a_commit_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(tmp_path)
    versions = "app/migrations/versions"
    live = repository.commit({f"{versions}/1.py": migration("r1", None, "One"), "app/other.py": "x = 1\n"})
    files: dict[str, str | bytes | None] = {
        f"{versions}/a.py": migration("r3", "r2", "Three"),
        f"{versions}/b.py": migration("r2", "r1", "Two"),
        f"{versions}/helper.py": "revision = 4\n",
        f"{versions}/broken.py": "revision = \n",
        "app/more.py": migration("r9", "r3"),
    }
    commit = repository.commit(files)
    plan = {"commit": commit, "path": str(tmp_path)}
    said = {"built": False, "live_commit": live, "changes": True, "ran": False, "pending": None}
    result = Task(said, check=True, plan=plan, **SETTINGS).run(monkeypatch)
    assert result["lines"] == [
        f"Commit {commit[:12]} brings migrations that the live one, {live[:12]}, has not:",
        f"r2  Two ({versions}/b.py)",
        f"r3  Three ({versions}/a.py)",
    ]
    assert result["changes"]
    # Of an application in a subdirectory; and on a server on which nothing serves.
    found = action.new_migrations(str(tmp_path), commit, "", "app")
    assert [each["revision"] for each in found] == ["r1", "r2", "r3"]
    assert action.new_migrations(str(tmp_path), commit, "", "lib") == []


def test_check_mode_says_what_it_cannot_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Repository(tmp_path).commit({"a": "b"})
    said = {"built": False, "live_commit": "0" * 40, "changes": True, "ran": False, "pending": None}
    plan = {"commit": commit, "path": str(tmp_path)}
    (line,) = Task(said, check=True, plan=plan, **SETTINGS).run(monkeypatch)["lines"]
    assert line.startswith(f"Which migrations commit {commit[:12]} brings cannot be seen: ")
    (line,) = Task(said, check=True, plan={"commit": commit, "path": ""}, **SETTINGS).run(monkeypatch)["lines"]
    assert line == f"Which migrations commit {commit[:12]} brings is seen when a server has fetched it."
    same = Task({**said, "live_commit": commit}, check=True, plan=plan, **SETTINGS).run(monkeypatch)
    assert (same["lines"], same["changes"]) == ([], False)
    same = Task({**said, "live_commit": commit}, check=True, plan={**plan, "path": ""}, **SETTINGS).run(monkeypatch)
    assert (same["lines"], same["changes"]) == ([], False)
    said = pending(unseen="It failed\nbecause.", pending=None, scripts=[])
    assert Task(said, check=True, **SETTINGS).run(monkeypatch)["lines"] == [
        "The pending migrations cannot be seen yet.", "It failed", "because.",
    ]  # fmt: skip
    with pytest.raises(AnsibleActionFail):
        action.new_migrations(str(tmp_path), "0" * 40, "", "")
