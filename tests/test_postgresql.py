"""The role postgresql without a server: password verifiers, what is to be done to a database, settings from the host.

What PostgreSQL makes of it is for the scenario "data".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.role_templates import ROLES, evaluate, load_file, read_yaml

ROLE = ROLES / "postgresql"


def load(path: str) -> ModuleType:
    """Import a file of the role by its path."""
    return load_file(ROLE / path)


host = load("module_utils/postgresql_host.py")
database = load("library/postgresql_database.py")
logins = load("library/postgresql_logins.py")
survey = load("library/postgresql_survey.py")


class TestVerifier:
    """Against the exchange in section 3 of RFC 7677: user `user`, password `pencil`."""

    SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    MESSAGE = (
        b"n=user,r=rOprNGfwEbeRWgbNEkqO,"
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    PROOF = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    SERVER_SIGNATURE = base64.b64decode("6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")

    def test_accepts_the_proof_and_makes_the_servers_signature(self) -> None:
        verifier = host.scram_verifier("pencil", self.SALT, 4096)
        kind, parameters, keys = verifier.split("$")
        assert (kind, parameters) == ("SCRAM-SHA-256", "4096:W22ZaJ0SNY7soEsUEjb6gQ==")
        stored, server = map(base64.b64decode, keys.split(":"))
        # The client proves that it has ClientKey, of which StoredKey is the hash.
        signature = hmac.digest(stored, self.MESSAGE, "sha256")
        client_key = bytes(a ^ b for a, b in zip(self.PROOF, signature, strict=True))
        assert hashlib.sha256(client_key).digest() == stored
        assert hmac.digest(server, self.MESSAGE, "sha256") == self.SERVER_SIGNATURE

    def test_is_of_one_password_and_another_one_each_time(self) -> None:
        first, second = (host.scram_verifier("it's 100 % \\secret") for _ in range(2))
        assert first != second
        assert host.verifies("it's 100 % \\secret", first)
        assert host.verifies("it's 100 % \\secret", second)
        assert not host.verifies("it's 100 % secret", first)

    @pytest.mark.parametrize(
        "stored", ["", "md5d41d8cd98f00b204e9800998ecf8427e", "SCRAM-SHA-256$x:y$z", "$$", "a$b:c$d"]
    )
    def test_of_another_kind_is_no_ones(self, stored: str) -> None:
        assert not host.verifies("pencil", stored)

    @pytest.mark.parametrize("password", ["pässword", "new\nline", "null\0"])
    def test_takes_no_password_that_saslprep_would_change(self, password: str) -> None:
        with pytest.raises(ValueError, match="printable ASCII"):
            host.scram_verifier(password)


class TestCluster:
    def test_is_read_from_debians_list(self) -> None:
        (old, new) = host.parse_clusters(
            "15 main 5432 online        postgres /var/lib/postgresql/15/main /var/log/postgresql/15.log\n"
            "17 main 5433 down,recovery postgres /var/lib/postgresql/17/main /var/log/postgresql/17.log\n"
        )
        assert (old.version, old.port, old.running) == ("15", 5432, True)
        assert (new.version, new.port, new.running) == ("17", 5433, False)
        assert str(old.configuration) == "/etc/postgresql/15/main"
        assert old.unit == "postgresql@15-main.service"

    def test_none_is_found_without_a_line(self) -> None:
        assert host.parse_clusters("") == []

    def test_listens_at_the_hosts_own_addresses_only(self) -> None:
        assert survey.is_own_address("127.0.0.1")
        assert not survey.is_own_address("203.0.113.7")

    def test_names_the_application_that_it_belongs_to(self, tmp_path: Path) -> None:
        marker = tmp_path / "postgresql.json"
        assert survey.owner_of(marker) == ""
        marker.write_text('{"app": "blog"}\n')
        assert survey.owner_of(marker) == "blog"


class TestQuoting:
    def test_of_names_and_texts(self) -> None:
        assert host.identifier('a"b') == '"a""b"'
        assert host.literal("it's \\ this") == "E'it''s \\\\ this'"


WANTED = {
    "database": "blog",
    "locale": "C.UTF-8",
    "owner": "blog_owner",
    "owner_password": "the-owners-password",
    "owner_settings": {"lock_timeout": "5s"},
    "owner_groups": ["pg_read_all_stats"],
    "group": "blog",
    "login": "blog_1a2b3c",
    "login_password": "the-apps-password-1",
    "login_settings": {"statement_timeout": "60s"},
}
BARE: dict[str, Any] = {"roles": {}, "databases": {}, "content": database.NOTHING}


def role(password: str = "", **changes: Any) -> dict[str, Any]:
    verifier = host.scram_verifier(password) if password else ""
    return {
        "login": bool(password), "inherit": True, "excess": False, "password": verifier, "valid_until": None,
        "settings": [], "member_of": [],
    } | changes  # fmt: skip


def relation(kind: str = "r", **changes: Any) -> dict[str, Any]:
    rights = ["USAGE", "SELECT"] if kind == "S" else ["SELECT", "INSERT", "UPDATE", "DELETE"]
    return {"name": "public.posts", "kind": kind, "owner": "blog_owner", "of_column": False, "rights": rights} | changes


def done(**content: Any) -> dict[str, Any]:
    """Return a state in which nothing is left to do, but for the changes to the database's content."""
    closed = {"public_connect": False, "public_temporary": False, "group_connect": False}
    schema = {
        "name": "public", "owner": "blog_owner", "public_create": False, "public_usage": False,
        "group_usage": True, "group_create": False,
    }  # fmt: skip
    rights = {"r": ["DELETE", "INSERT", "SELECT", "UPDATE"], "S": ["SELECT", "USAGE"], "n": ["USAGE"]}
    return {
        "roles": {
            "blog_owner": role("the-owners-password", settings=["lock_timeout=5s"], member_of=["pg_read_all_stats"]),
            "blog": role(),
            "blog_1a2b3c": role("the-apps-password-1", settings=["statement_timeout=60s"], member_of=["blog"]),
        },
        "databases": {
            "postgres": {"owner": "postgres", **closed},
            "template1": {"owner": "postgres", **closed},
            "blog": {"owner": "blog_owner", **closed, "group_connect": True},
        },
        "content": {"schemas": [schema], "relations": [], "others": [], "defaults": rights} | content,
    }


def planned(state: dict[str, Any], **changes: Any) -> list[tuple[str, str]]:
    """Return the steps, in words and as SQL."""
    return [(step.words, step.sql) for step in database.plan(WANTED | changes, state)]


class TestPlan:
    def test_nothing_is_left_to_do(self) -> None:
        assert planned(done(relations=[relation(), relation("S"), relation("v")])) == []

    def test_a_bare_server_gets_everything_and_no_password_in_clear(self) -> None:
        steps = planned(BARE)
        words = [words for words, _ in steps]
        for step in ("make role blog_owner", "make role blog", "make role blog_1a2b3c", "make database blog"):
            assert step in words
        assert {f"close database {name} to others" for name in ("blog", "postgres", "template1")} <= set(words)
        # A role before what it owns, a group before its members.
        assert words.index("make role blog_owner") < words.index("make database blog")
        assert words.index("make role blog") < words.index("make role blog_1a2b3c a member of blog")
        everything = "\n".join(f"{words} {sql}" for words, sql in steps)
        assert "password-1" not in everything
        assert "owners-password" not in everything
        assert 'CREATE ROLE "blog" NOLOGIN;' in everything

    def test_a_changed_password_is_set_and_the_same_one_is_not(self) -> None:
        ((words, sql),) = planned(done(), owner_password="another-password-of-it")
        assert words == "set the password of role blog_owner"
        verifier = sql.removeprefix('ALTER ROLE "blog_owner" PASSWORD E\'').removesuffix("';")
        assert host.verifies("another-password-of-it", verifier)

    def test_another_password_of_the_application_is_another_login_beside_the_old_one(self) -> None:
        steps = planned(done(), login="blog_ffffff", login_password="the-apps-password-2")
        assert [words for words, _ in steps] == [
            "make role blog_ffffff",
            "set the password of role blog_ffffff",
            "set statement_timeout = 60s for role blog_ffffff",
            "make role blog_ffffff a member of blog",
        ]

    def test_a_login_that_was_ended_logs_in_again(self) -> None:
        state = done()
        state["roles"]["blog_1a2b3c"] |= {"login": False, "password": ""}
        assert [words for words, _ in planned(state)] == [
            "let role blog_1a2b3c log in",
            "set the password of role blog_1a2b3c",
        ]

    def test_more_than_ordinary_rights_are_taken(self) -> None:
        state = done()
        state["roles"]["blog"]["excess"] = True
        ((_, sql),) = planned(state)
        assert sql == 'ALTER ROLE "blog" NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;'

    def test_what_others_own_becomes_the_owners_and_the_application_may_use_it(self) -> None:
        assert planned(done(relations=[relation(owner="postgres", rights=[])])) == [
            ("give table public.posts to blog_owner", 'ALTER TABLE public.posts OWNER TO "blog_owner";'),
            (
                "let blog work with table public.posts",
                'GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE public.posts TO "blog";',
            ),
        ]

    def test_a_columns_sequence_follows_its_table(self) -> None:
        assert planned(done(relations=[relation("S", owner="postgres", of_column=True)])) == []
        ((words, _),) = planned(done(relations=[relation("S", owner="postgres")]))
        assert words == "give sequence public.posts to blog_owner"

    def test_the_applications_role_has_no_more_than_rows(self) -> None:
        rights = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "TRIGGER"]
        ((_, sql),) = planned(done(relations=[relation(rights=rights)]))
        assert sql == 'REVOKE TRIGGER, TRUNCATE ON TABLE public.posts FROM "blog";'

    def test_what_was_the_applications_own_goes_to_the_owner_first(self) -> None:
        """The rights of an owner go to the next one: those that the group had by owning it are not its any more."""
        every = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]
        steps = planned(done(relations=[relation(owner="blog", rights=every)]))
        assert [words for words, _ in steps] == [
            "give table public.posts to blog_owner",
            "let blog work with table public.posts",
        ]


class TestRevoke:
    def test_ends_the_logins_of_former_passwords_and_nobody_elses(self) -> None:
        members = ["blog_1a2b3c", "blog_ffffff", "blog_owner", "blog_reports", "blog_1a2b3c4", "alice", "log_1a2b3c"]
        assert logins.to_end("blog", "blog_1a2b3c", members) == ["blog_ffffff"]


SETTINGS: dict[str, Any] = {
    "postgresql_app": "blog",
    "postgresql_database": "blog",
    "postgresql_owner": "blog_owner",
    "postgresql_owner_password": "o" * 16,
    "postgresql_group": "blog",
    "postgresql_login": "blog_1a2b3c",
    "postgresql_login_password": "a" * 16,
    "postgresql_address": "10.0.0.5",
    "postgresql_app_addresses": ["10.0.0.11", "fd00::12", ""],
    "postgresql_connections": 60,
    "ansible_facts": {"memtotal_mb": 3915},
    "__postgresql_survey": {"configuration": "/etc/postgresql/17/main", "unit": "postgresql@17-main.service"},
    "__postgresql_installed": {"skipped": True},
}


def derived(expression: str, **changes: Any) -> Any:
    return evaluate("postgresql", expression, **(SETTINGS | changes))


def rendered(template: str, **changes: Any) -> str:
    text = derived(f"lookup('ansible.builtin.template', '{template}')", ansible_managed="Ansible managed", **changes)
    return str(text)


class TestConnections:
    @pytest.mark.parametrize(
        ("needed", "allowed"), [(20, 100), (60, 100), (80, 100), (81, 200), (180, 200), (181, 300)]
    )
    def test_go_up_in_steps_so_that_a_worker_more_needs_no_restart(self, needed: int, allowed: int) -> None:
        assert int(derived("_postgresql_max_connections", postgresql_connections=needed)) == allowed

    def test_are_what_the_operator_says(self) -> None:
        assert int(derived("_postgresql_max_connections", postgresql_max_connections=85)) == 85


class TestMemory:
    @pytest.mark.parametrize(
        ("memory", "percent", "megabytes"),
        [(3915, 100, 3840), (3915, 50, 2048), (470, 100, 512), (200, 50, 256), (64000, 100, 64000), (7950, 50, 4096)],
    )
    def test_is_taken_in_steps(self, memory: int, percent: int, megabytes: int) -> None:
        facts = {"memtotal_mb": memory}
        assert (
            int(derived("_postgresql_memory_mb", ansible_facts=facts, postgresql_memory_percent=percent)) == megabytes
        )

    def test_that_a_new_kernel_keeps_to_itself_changes_nothing(self) -> None:
        found = {
            derived("_postgresql_shared_buffers_mb", ansible_facts={"memtotal_mb": mb}) for mb in (3905, 3915, 3930)
        }
        assert len(found) == 1

    def test_is_shared_with_an_application_on_the_same_server(self) -> None:
        assert int(derived("postgresql_memory_percent", postgresql_shared_host=True)) == 50
        assert int(derived("postgresql_memory_percent")) == 100

    @pytest.mark.parametrize("memory", [512, 1024, 4096, 16384, 131072])
    @pytest.mark.parametrize("connections", [20, 500])
    def test_is_enough_for_what_the_settings_allow(self, memory: int, connections: int) -> None:
        """What is always taken and one sort of each connection fit; a small server gets the least."""
        changes = {"ansible_facts": {"memtotal_mb": memory}, "postgresql_connections": connections}
        buffers = int(derived("_postgresql_shared_buffers_mb", **changes))
        work = int(derived("_postgresql_work_mem_kb", **changes))
        allowed = int(derived("_postgresql_max_connections", **changes))
        assert buffers * 4 == memory
        assert 4096 <= work <= 65536
        assert work == 4096 or buffers + work * allowed // 1024 <= memory
        assert 64 <= int(derived("_postgresql_maintenance_work_mem_mb", **changes)) <= 2048
        assert 1024 <= int(derived("_postgresql_max_wal_mb", **changes)) <= 4096


class TestTemplates:
    def test_the_rules_let_the_application_in_over_tls_and_nobody_else(self) -> None:
        text = rendered("pg_hba.conf.j2", postgresql_clients=["192.0.2.0/24", "fd00:1::/64"])
        lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
        assert lines[0] == ["local", "all", "postgres", "peer"]
        assert [line[3] for line in lines[1:]] == ["10.0.0.11/32", "fd00::12/128", "192.0.2.0/24", "fd00:1::/64"]
        for line in lines[1:]:
            assert [*line[:3], line[4]] == ["hostssl", '"blog"', '"blog_owner",+"blog"', "scram-sha-256"]

    def test_the_settings_of_the_operator_come_last_and_quoted(self) -> None:
        text = rendered(
            "hardstand.conf.j2", postgresql_settings={"work_mem": "8MB", "log_connections": True, "search_path": "it's"}
        )
        lines = text.splitlines()
        assert lines[-3:] == ["work_mem = '8MB'", "log_connections = 'true'", "search_path = 'it''s'"]
        assert "listen_addresses = 'localhost,10.0.0.5'" in lines
        assert "archive_mode = off" in lines

    def test_an_archive_is_on_with_its_command_and_interval(self) -> None:
        text = rendered("hardstand.conf.j2", postgresql_archive_command="cp '%p' /a", postgresql_archive_timeout=10)
        assert "archive_mode = on\narchive_command = 'cp ''%p'' /a'\narchive_timeout = 10\n" in text


class TestProblems:
    def problems(self, **changes: Any) -> list[str]:
        found: list[str] = derived("_postgresql_problems", **changes)
        return found

    def test_none(self) -> None:
        assert (
            self.problems(postgresql_clients=["10.0.0.0/8", "fd00::/8"], postgresql_settings={"auto_explain.x": 1})
            == []
        )

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"postgresql_database": "pg_blog"}, "pg_blog is a name that PostgreSQL keeps for itself"),
            ({"postgresql_address": "db1.example.org"}, "db1.example.org is no IP address"),
            ({"postgresql_address": ""}, "The address of this server is not known; set internal_address"),
            ({"postgresql_app_addresses": ["app1"]}, "app1 is no IP address"),
            ({"postgresql_clients": ["10.0.0.7"]}, 'postgresql_clients: "10.0.0.7" is no network'),
            ({"postgresql_clients": ["all"]}, 'postgresql_clients: "all" is no network'),
            ({"postgresql_memory_percent": 500}, "postgresql_memory_percent is 500"),
            (
                {"postgresql_settings": {"max_connections": 5}},
                "postgresql_settings: max_connections is set by the role",
            ),
            ({"postgresql_settings": {"a = b\nc": 5}}, "is no name of a setting"),
            ({"postgresql_login_password": "short"}, "must have 16 characters or more"),
        ],
    )
    def test_of_one_sentence(self, changes: dict[str, Any], text: str) -> None:
        (problem,) = self.problems(**changes)
        assert text in problem


def test_the_survey_is_the_last_one_that_was_made() -> None:
    """A second run does not install, and so skips the second look."""
    variables = read_yaml(ROLE / "vars/main.yml")
    assert "__postgresql_installed" in variables["_postgresql_survey"]
    assert derived("_postgresql_directory") == "/etc/postgresql/17/main"
    installed = {"version": "15", "configuration": "/etc/postgresql/15/main"}
    assert derived("_postgresql_directory", __postgresql_installed=installed) == "/etc/postgresql/15/main"
