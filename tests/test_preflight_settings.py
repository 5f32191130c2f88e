"""What preflight says about settings, by running it on inventories that are wrong, and on right ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.parsing.vault import VaultLib, VaultSecret

PROJECT = Path(__file__).resolve().parents[1]
VAULT_PASSWORD = "not-for-anything-real"

SPEC = """
argument_specs:
  main:
    options:
      web_module: {type: str, required: true}
      web_port: {type: int, default: 80}
      web_version: {type: str, default: "3.13.5"}
      web_title: {type: str, default: ""}
      web_mode: {type: str, choices: [private_ca, files], default: files}
      web_enabled: {type: bool, default: true}
      web_names: {type: list, elements: str, default: []}
      web_env: {type: dict, default: {}}
      web_secrets: {type: dict, default: {}}
      web_api_key: {type: str, default: "", no_log: true}
      web_socket: {type: path, default: /run/web.sock}
      web_directory: {type: path, default: /srv/web}
      web_limits: {type: list, elements: dict, default: [], options: {rate: {type: int, required: true}}}
"""
APART = "argument_specs: {main: {options: {environment_name: {type: str, required: true}}}}"
PLAYBOOK = """
- hosts: app
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - ansible.builtin.import_role: {name: preflight, tasks_from: settings, rolespec_validate: false}
"""
HOSTS = """\
app:
  hosts:
    app1: {ansible_connection: local}
    app2:
      ansible_connection: local
"""
VARS = """\
app_name: demo
app_domains: [demo.example]
web_module: demo.main:app
web_secrets:
  SECRET_KEY: "{{ vault_secret_key }}"
"""
VAULT = "vault_secret_key: dGhpcyBpcyBub3QgYSByZWFsIHNlY3JldA\n"


class Project:
    """A project with preflight, a role of its own and an inventory named prod."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(PROJECT / "roles/preflight", directory / "roles/preflight")
        self.write("roles/web/meta/argument_specs.yml", SPEC)
        self.write("roles/web/defaults/main.yml", "web_directory: /srv/web\n")
        self.write("roles/environment/meta/argument_specs.yml", APART)
        self.write("group_vars/all.yml", 'web_socket: "/run/{{ app_name }}.sock"\n')
        self.write("check.yml", PLAYBOOK)
        self.write("ansible.cfg", "[defaults]\n")
        self.write("password", VAULT_PASSWORD)
        self.write("inventories/prod/hosts.yml", HOSTS)
        self.vars(VARS)
        self.vault(VAULT)

    def write(self, path: str, text: str) -> None:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def vars(self, text: str) -> None:
        self.write("inventories/prod/group_vars/all/vars.yml", text)

    def vault(self, text: str) -> None:
        encrypted = VaultLib([("default", VaultSecret(VAULT_PASSWORD.encode()))]).encrypt(text)
        self.write("inventories/prod/group_vars/all/vault.yml", encrypted.decode())

    def preflight(self, *arguments: str) -> list[str]:
        """Run preflight and return the problems that it lists, without the title."""
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(self.directory / "ansible.cfg"),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.directory / "password"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_DEPRECATION_WARNINGS": "0",
        }
        result = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "check.yml", "-i", "inventories/prod", *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.output = result.stdout + result.stderr
        if result.returncode == 0:
            return []
        lines = result.stdout.partition("Origin:")[0].splitlines()
        title = next((number for number, line in enumerate(lines) if "Nothing has been changed." in line), None)
        assert title is not None, self.output
        return [line.removeprefix("  ") for line in lines[title + 1 :] if line.startswith("  ")]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


VARS_FILE = "inventories/prod/group_vars/all/vars.yml"
VAULT_FILE = "inventories/prod/group_vars/all/vault.yml"


def test_right_settings_pass(project: Project) -> None:
    project.vars(
        VARS
        + """\
web_title: "{{ web_directory }}/title"  # another role's default
web_env: {WORKERS: "{{ ansible_facts['processor_vcpus'] * 2 }}", PLAN: "{{ __later.plan }}"}
my_own_variable: 1
web: 1
web_port: "{{ my_own_variable + 79 }}"
web_api_key: "{{ vault_secret_key }}"
web_names: []
web_limits: [{rate: 5}]
"""
    )
    assert project.preflight("-e", "web_enabled=false", "-e", "web_port=81") == []
    # Only seen to have run: the play is not empty.
    assert "ok=1" in project.output


def test_every_problem_is_listed_once_with_file_and_line(project: Project) -> None:
    project.vars(
        """\
app_name: Demo_App
app_domains: [https://demo.example, demo.example]
web_modul: demo.main:app
web_port: "80"
web_version: 3.13
web_title: true
web_mode: ftp
web_enabled: "yes"
web_names: demo
web_env: [a, b]
web_nothing_like_it: 1
webb_title: hello
web_socket: /tmp/mine.sock
web_limits: [{rat: 5}]
web_api_key: 12.5
web_secrets:
  SECRET_KEY: "{{ vault_secret_key }}"
  OTHER: change-me
  PASSWORD: "{{ undefined_thing }}"
  MAIL: ""
"""
    )
    project.write("inventories/prod/host_vars/app2.yml", "web_por: 1\nweb_names: [a, {b: c}]\n")
    problems = project.preflight()
    name = "app_name 'Demo_App' must start with a lower-case letter, and have at most 23 lower-case letters"
    domain = "app_domains: 'https://demo.example' is not a DNS name (lower case; no scheme, port or wildcard)"
    limits = problems.pop(13)
    assert problems == [
        f"{VARS_FILE}:1: {name}, digits and '-'",
        f"{VARS_FILE}:2: {domain}",
        f"{VARS_FILE}:3: there is no setting web_modul. Did you mean web_module?",
        f"{VARS_FILE}:4: web_port must be a whole number, not text: '80'; drop the quotes",
        f"{VARS_FILE}:5: web_version must be text, not a number: 3.13; put it in quotes",
        f"{VARS_FILE}:6: web_title must be text, not true or false: true; put it in quotes",
        f"{VARS_FILE}:7: web_mode must be one of private_ca, files, not text: 'ftp'",
        f"{VARS_FILE}:8: web_enabled must be true or false, not text: 'yes'",
        f"{VARS_FILE}:9: web_names must be a list, not text: 'demo'",
        f"{VARS_FILE}:10: web_env must be a mapping of names to values, not a list",
        f"{VARS_FILE}:11: there is no setting web_nothing_like_it. See roles/web/README.md",
        f"{VARS_FILE}:12: there is no setting webb_title. Did you mean web_title?",
        f"{VARS_FILE}:13: web_socket is derived in group_vars/all.yml:1 and cannot be set here; remove it",
        f"{VARS_FILE}:15: web_api_key must be text, not a number; put it in quotes",
        f"{VARS_FILE}:18: web_secrets.OTHER is a placeholder; put the real secret there",
        f"{VARS_FILE}:19: web_secrets.PASSWORD refers to undefined_thing, which is not set",
        f"{VARS_FILE}:20: web_secrets.MAIL is empty; put the real secret there",
        "inventories/prod/host_vars/app2.yml:1: there is no setting web_por. Did you mean web_port?",
        "inventories/prod/host_vars/app2.yml:2: web_names[1] must be text, not a mapping",
    ]
    assert limits.startswith(f"{VARS_FILE}:14: web_limits is not as it should be: ")
    assert "12.5" not in project.output


def test_placeholders_are_refused_by_name(project: Project) -> None:
    project.vars(
        VARS
        + """\
  OTHER: change-me-soon
  MAIL: ""
  URL: postgresql://demo:<password>@db/demo
  FINE: a-password-that-somebody-thought-of
web_api_key: XXXX
"""
    )
    project.vault(
        """\
vault_secret_key: CHANGE_ME
vault_url: "sqlite:////srv/{{ app_name }}/demo.db"
vault_empty:
vault_nested: {key: [todo]}
"""
    )
    edit = f": ansible-vault edit {VAULT_FILE}"
    assert project.preflight() == [
        f"{VARS_FILE}:6: web_secrets.OTHER is a placeholder; put the real secret there",
        f"{VARS_FILE}:7: web_secrets.MAIL is empty; put the real secret there",
        f"{VARS_FILE}:8: web_secrets.URL is a placeholder; put the real secret there",
        f"{VARS_FILE}:10: web_api_key is a placeholder; put the real secret there",
        f"{VAULT_FILE}: vault_empty is empty; put the real secret there{edit}",
        f"{VAULT_FILE}: vault_nested.key[0] is a placeholder; put the real secret there{edit}",
        f"{VAULT_FILE}: vault_secret_key is a placeholder; put the real secret there{edit}",
    ]
    assert "soon" not in project.output


def test_a_secret_that_is_missing_names_the_vault(project: Project) -> None:
    project.vault("vault_other: bm90IGEgc2VjcmV0\n")
    (problem,) = project.preflight()
    assert problem == (
        f"{VAULT_FILE}: vault_secret_key is not set; web_secrets.SECRET_KEY needs it ({VARS_FILE}:5)."
        f" Add it: ansible-vault edit {VAULT_FILE}"
    )


def test_without_a_vault_the_playbook_that_makes_one_is_named(project: Project) -> None:
    (project.directory / VAULT_FILE).unlink()
    project.vars(VARS + '  OTHER: "{{ vault_other }}"\n')
    (problem,) = project.preflight()
    assert problem == (
        f"{VAULT_FILE}: does not exist, and vault_other, vault_secret_key should be in it."
        " Make it: ansible-playbook playbooks/environment.yml -e env=prod"
    )


def test_a_vault_that_is_not_encrypted_is_refused(project: Project) -> None:
    project.write(VAULT_FILE, VAULT)
    assert project.preflight() == [f"{VAULT_FILE}: is not encrypted. Encrypt it: ansible-vault encrypt {VAULT_FILE}"]
    assert "dGhpcyBpcy" not in project.output


def test_values_that_are_encrypted_one_by_one_are_a_vault(project: Project) -> None:
    encrypted = VaultLib([("default", VaultSecret(VAULT_PASSWORD.encode()))]).encrypt("dGhpcyBpcyBub3Qg").decode()
    body = "".join(f"  {line}\n" for line in encrypted.splitlines())
    project.write(VAULT_FILE, f"vault_secret_key: !vault |\n{body}")
    assert project.preflight() == []


def test_what_is_missing_names_the_settings_file(project: Project) -> None:
    project.vars("app_name: demo\n")
    assert project.preflight() == [
        f"{VARS_FILE}: app_domains is not set, and has no default",
        f"{VARS_FILE}: web_module is not set, and has no default",
    ]


def test_the_command_line_is_named_as_such(project: Project) -> None:
    problems = project.preflight("-e", "web_prt=1", "-e", "web_port=http", "-e", "app_name=postgres")
    assert problems == [
        "command line (-e): app_name 'postgres' is the name of another account on the server; choose another",
        "command line (-e): there is no setting web_prt. Did you mean web_port?",
        "command line (-e): web_port must be a whole number, not text: 'http'",
    ]


def test_renamed_settings_say_their_new_name(project: Project) -> None:
    project.write(
        "roles/preflight/vars/main.yml",
        "_preflight_roles_apart: [environment]\n_preflight_renamed: {web_entry: web_module}\n",
    )
    project.vars(VARS.replace("web_module", "web_entry"))
    assert project.preflight() == [f"{VARS_FILE}:3: web_entry was renamed: call it web_module"]


def test_an_ini_inventory_is_understood(project: Project) -> None:
    (project.directory / "inventories/prod/hosts.yml").unlink()
    project.write(
        "inventories/prod/hosts", "[app]\napp1 ansible_connection=local web_por=1\n\n[app:vars]\nweb_modul = x\n"
    )
    assert project.preflight() == [
        "inventories/prod/hosts:2: there is no setting web_por. Did you mean web_port?",
        "inventories/prod/hosts:5: there is no setting web_modul. Did you mean web_module?",
    ]


RELEASE_SPEC = """
argument_specs:
  main:
    options:
      release_env: {type: dict, default: {}}
      release_secrets: {type: dict, default: {}}
      release_migration_secrets: {type: dict, default: {}}
      release_migrate_each_host: {type: bool, default: false}
"""
# What the project's own wiring makes of the vault, in short.
WIRING = """
_fleet_db: "{{ (groups['db'] | default([]) + ['']) | first }}"
database_url: >-
  {{ 'postgresql://x:' ~ vault_postgresql_password ~ '@' if _fleet_db else vault_database_url | default('') }}
database_migration_url: >-
  {{ 'postgresql://o:' ~ vault_postgresql_owner_password ~ '@' if _fleet_db else database_url }}
"""
DATABASE_VARS = """\
app_name: demo
app_domains: [demo.example]
web_module: demo.main:app
release_secrets:
  DATABASE_URL: "{{ database_url }}"
"""
MIGRATIONS = """\
release_migration_secrets:
  DATABASE_URL: "{{ database_migration_url }}"
"""
PASSWORDS = """\
vault_postgresql_password: YSBwYXNzd29yZA-1
vault_postgresql_owner_password: YSBwYXNzd29yZA-2
"""
HOSTS_FILE = "inventories/prod/hosts.yml"
VAULT_EDIT = f": ansible-vault edit {VAULT_FILE}"


class TestDatabase:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Project:
        made = Project(tmp_path)
        made.write("roles/release/meta/argument_specs.yml", RELEASE_SPEC)
        made.write("group_vars/all.yml", WIRING)
        made.vars(DATABASE_VARS)
        made.vault("vault_database_url: postgresql://demo:dGhpcyBpcyBub3Q@db.example/demo\n")
        return made

    @pytest.fixture
    def with_server(self, project: Project) -> Project:
        project.write(HOSTS_FILE, HOSTS + "db:\n  hosts:\n    db1: {ansible_connection: local}\n")
        project.vars(DATABASE_VARS + MIGRATIONS)
        project.vault(PASSWORDS)
        return project

    def test_elsewhere_is_nobodys_business(self, project: Project) -> None:
        assert project.preflight() == []

    def test_of_one_server_that_has_none_to_share_may_be_sqlite(self, project: Project) -> None:
        project.vault("vault_database_url: sqlite:////srv/demo/shared/demo.db\n")
        project.write(HOSTS_FILE, "app: {hosts: {app1: {ansible_connection: local}}}\n")
        assert project.preflight() == []

    def test_that_is_sqlite_cannot_be_shared(self, project: Project) -> None:
        project.vault("vault_database_url: sqlite:////srv/demo/shared/demo.db\n")
        (problem,) = project.preflight()
        assert problem == (
            f"{VARS_FILE}:5: release_secrets.DATABASE_URL is SQLite, a file on one server, and each of 2 application"
            " servers would have data of its own. Use PostgreSQL: a server in group db, or a managed one"
            " (vault_database_url). Servers that are to know nothing of each other say release_migrate_each_host: true"
        )
        project.vars(DATABASE_VARS + "release_migrate_each_host: true\n")
        assert project.preflight() == []

    def test_that_the_vault_lacks_is_asked_for_by_name(self, project: Project) -> None:
        project.vault("vault_other: dGhpcyBpcyBub3Q\n")
        assert project.preflight() == [
            (
                f"{VAULT_FILE}: vault_database_url is not set; release_secrets.DATABASE_URL needs it ({VARS_FILE}:5)."
                f" Add it{VAULT_EDIT}"
            )
        ]

    def test_on_a_server_of_ours_passes(self, with_server: Project) -> None:
        assert with_server.preflight() == []

    def test_on_a_server_of_ours_may_go_by_another_name(self, with_server: Project) -> None:
        other = DATABASE_VARS.replace("DATABASE_URL:", "DSN:").replace("_url", "_url | replace('sql:', 'x:')")
        with_server.vars(other + MIGRATIONS)
        assert with_server.preflight() == []

    def test_on_a_server_of_ours_has_to_be_named(self, with_server: Project) -> None:
        with_server.vars(DATABASE_VARS.replace("{{ database_url }}", "{{ vault_database_url }}"))
        with_server.vault(PASSWORDS + "vault_database_url: postgresql://demo:dGhpcyBpcyBub3Q@db.example/demo\n")
        problems = with_server.preflight()
        assert problems[-1] == (
            f"{VARS_FILE}:5: release_secrets.DATABASE_URL must be the database of db1, which is in group db:"
            ' put DATABASE_URL: "{{ database_url }}" below release_secrets'
        )
        assert problems[0] == (
            f"{VARS_FILE}: release_migration_secrets is not set, and db1 is in group db. Add these two lines:"
        )
        assert (
            '\n    release_migration_secrets:\n      DATABASE_URL: "{{ database_migration_url }}"\n'
            in with_server.output
        )

    def test_without_its_passwords_names_the_vault_once_for_each(self, with_server: Project) -> None:
        with_server.vault("vault_other: dGhpcyBpcyBub3Q\n")
        random = "Add it (a random value: openssl rand -hex 24)"
        assert with_server.preflight() == [
            (
                f"{VAULT_FILE}: vault_postgresql_owner_password is not set;"
                f" release_migration_secrets.DATABASE_URL needs it ({VARS_FILE}:7). {random}{VAULT_EDIT}"
            ),
            (
                f"{VAULT_FILE}: vault_postgresql_password is not set; release_secrets.DATABASE_URL needs it"
                f" ({VARS_FILE}:5). {random}{VAULT_EDIT}"
            ),
        ]

    def test_passwords_are_long_of_ascii_and_not_the_same(self, with_server: Project) -> None:
        with_server.vault(
            "vault_postgresql_password: too-short\nvault_postgresql_owner_password: 'pässwörd-pässwörd'\n"
            "vault_backup_passphrase: short-too\n"
        )
        rule = f"must have 16 characters or more, all of them printable ASCII{VAULT_EDIT}"
        assert with_server.preflight() == [
            f"{VAULT_FILE}: vault_backup_passphrase {rule}",
            f"{VAULT_FILE}: vault_postgresql_owner_password {rule}",
            f"{VAULT_FILE}: vault_postgresql_password {rule}",
        ]
        assert "too-short" not in with_server.output
        same = "YSBwYXNzd29yZA-1"
        with_server.vault(f"vault_postgresql_password: {same}\nvault_postgresql_owner_password: {same}\n")
        assert with_server.preflight() == [
            (
                f"{VAULT_FILE}: vault_postgresql_owner_password is the application's too, which then could log in"
                f" as the owner; choose another{VAULT_EDIT}"
            )
        ]

    def test_on_a_server_of_ours_is_shared(self, with_server: Project) -> None:
        with_server.vars(DATABASE_VARS + MIGRATIONS + "release_migrate_each_host: true\n")
        assert with_server.preflight() == [
            f"{VARS_FILE}:8: release_migrate_each_host must be false: all servers share the database of db1"
        ]

    def test_has_no_name_that_postgresql_keeps(self, with_server: Project) -> None:
        with_server.vars((DATABASE_VARS + MIGRATIONS).replace("app_name: demo", "app_name: pg-demo"))
        assert with_server.preflight() == [
            f"{VARS_FILE}:1: app_name 'pg-demo' makes a name that PostgreSQL keeps for itself; choose another"
        ]

    @pytest.mark.parametrize(
        ("groups", "problem"),
        [
            (
                "db:\n  hosts: {db1: {}, db2: {}}\n",
                (
                    "group db has 2 servers (db1, db2), and can have one: it makes no replicas. Leave one, or use"
                    " a managed database and none"
                ),
            ),
            (
                "db:\n  hosts: {db1: {}}\nbackup:\n  hosts: {b1: {}, b2: {}}\n",
                "group backup has 2 servers (b1, b2), and can have one. Leave one",
            ),
            (
                "backup:\n  hosts: {b1: {}}\n",
                "b1 is in group backup, and there is no server in group db whose backups it would keep",
            ),
            (
                "db:\n  hosts: {db1: {}}\nbackup:\n  hosts: {db1: {}}\n",
                "db1 is in groups db and backup. Leave group backup empty, and it keeps its own backups",
            ),
        ],
    )
    def test_has_one_server_and_one_for_backups(self, with_server: Project, groups: str, problem: str) -> None:
        with_server.write(HOSTS_FILE, HOSTS + groups)
        if "db:" not in groups:
            with_server.vars(DATABASE_VARS)
            with_server.vault("vault_database_url: postgresql://demo:dGhpcyBpcyBub3Q@db.example/demo\n")
        (found,) = with_server.preflight()
        place, _, text = found.partition(": ")
        assert place.startswith(f"{HOSTS_FILE}:")
        assert text == problem
