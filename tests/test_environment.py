"""`playbooks/environment.yml`, run for real into a temporary directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret

PROJECT = Path(__file__).resolve().parents[1]
ANSIBLE_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
EXAMPLE: dict[str, Any] = {"environment_host": "203.0.113.10", "environment_domain": "api.example.com"}


class Project:
    """A copy of what the playbook needs, with an `inventories` of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(PROJECT / "roles/environment", directory / "roles/environment")
        for file in ("playbooks/environment.yml", "bin/vault-password", "ansible.cfg"):
            (directory / file).parent.mkdir(exist_ok=True)
            shutil.copy2(PROJECT / file, directory / file)
        self.inventories = directory / "inventories"

    def run(self, *options: str, code: int = 0, _environ: dict[str, str] | None = None, **variables: Any) -> str:
        """Run the playbook and return all that it says."""
        file = self.directory / "extra.yml"
        file.write_text(yaml.safe_dump(variables))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HARDSTAND_")}
        result = subprocess.run(
            [
                ANSIBLE_PLAYBOOK,
                "playbooks/environment.yml",
                "-e",
                f"@{file}",
                *options,
            ],
            cwd=self.directory,
            env={**environment, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CONFIG": str(self.directory / "ansible.cfg")}
            | (_environ or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        output = result.stdout + result.stderr
        assert result.returncode == code, output
        return output

    def read(self, path: str) -> str:
        return (self.inventories / path).read_text()

    def vault(self, env: str) -> dict[str, str]:
        """Decrypt an environment's vault."""
        password = (self.directory / ".vault-password").read_text().strip()
        vault = VaultLib([("default", VaultSecret(password.encode()))])
        content: dict[str, str] = yaml.safe_load(vault.decrypt(self.read(f"{env}/group_vars/all/vault.yml")))
        return content


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_committed_example_is_what_the_playbook_makes(project: Project) -> None:
    project.run(env="prod", **EXAMPLE)
    for file in ("hosts.yml", "group_vars/all/vars.yml"):
        assert project.read(f"prod/{file}") == (PROJECT / "inventories/prod" / file).read_text(), file


def test_the_example_lacks_nothing_but_its_vault(project: Project) -> None:
    shutil.copytree(
        PROJECT / "inventories/prod", project.inventories / "prod", ignore=shutil.ignore_patterns("vault.yml")
    )
    before = {path: path.read_bytes() for path in project.inventories.rglob("*") if path.is_file()}
    project.run(env="prod")
    after = {path: path.read_bytes() for path in project.inventories.rglob("*") if path.is_file()}
    new = after.keys() - before.keys()
    assert new == {project.inventories / "prod/group_vars/all/vault.yml"}
    assert all(after[path] == content for path, content in before.items())


def test_secrets_are_fresh_encrypted_and_never_shown(project: Project) -> None:
    output = project.run("-vvv", "--diff", env="prod", **EXAMPLE) + project.run(env="stage", **EXAMPLE)
    prod, stage = project.vault("prod"), project.vault("stage")
    assert prod["vault_secret_key"] != stage["vault_secret_key"]
    assert len(prod["vault_secret_key"]) >= 43
    assert prod["vault_database_url"] == "sqlite:////srv/{{ app_name }}/shared/{{ app_name }}.db"
    password = (project.directory / ".vault-password").read_text().strip()
    for secret in (password, prod["vault_secret_key"], stage["vault_secret_key"]):
        assert secret not in output
    assert (project.directory / ".vault-password").stat().st_mode & 0o777 == 0o600


def test_a_second_run_changes_nothing(project: Project) -> None:
    project.run(env="prod", **EXAMPLE)
    before = {path: path.read_bytes() for path in project.inventories.rglob("*") if path.is_file()}
    output = project.run(env="prod", **EXAMPLE)
    assert "changed=0" in output
    assert "Kept as it was" not in output
    assert before == {path: path.read_bytes() for path in project.inventories.rglob("*") if path.is_file()}


def test_the_example_is_filled_in_but_an_edited_file_is_kept(project: Project) -> None:
    project.run(env="prod", **EXAMPLE)
    project.run(env="prod", environment_host="198.51.100.7", environment_domain="api.mine.example")
    assert "ansible_host: 198.51.100.7" in project.read("prod/hosts.yml")
    assert "- api.mine.example" in project.read("prod/group_vars/all/vars.yml")

    output = project.run(env="prod", environment_host="198.51.100.8")
    assert "ansible_host: 198.51.100.7" in project.read("prod/hosts.yml")
    kept = "Kept as it was, although it says something else than this command:"
    assert f"{kept} {project.inventories}/prod/hosts.yml" in " ".join(output.split())


def test_everything_that_can_be_asked_for(project: Project) -> None:
    project.run(
        env="local",
        environment_host="127.0.0.1, 127.0.0.2",
        environment_port=2222,
        environment_user="admin",
        environment_private_key_file="/keys/id",
        environment_known_hosts=["[127.0.0.1]:2222 ssh-ed25519 AAAA"],
        environment_domain="a.test,b.test",
        environment_app_name="demo",
        environment_settings={
            "release_version": "main",
            "release_env": {"DEBUG": True},
            "nginx_https_port": 8443,
        },
    )
    hosts = yaml.safe_load(project.read("local/hosts.yml"))["app"]
    assert hosts["hosts"] == {"app1": {"ansible_host": "127.0.0.1"}, "app2": {"ansible_host": "127.0.0.2"}}
    assert hosts["vars"] == {
        "ansible_user": "admin",
        "ansible_port": 2222,
        "ansible_ssh_private_key_file": "/keys/id",
        "ansible_ssh_common_args": (
            "-o 'UserKnownHostsFile=\"{{ inventory_dir }}/known_hosts\"' -o StrictHostKeyChecking=yes"
        ),
    }
    assert project.read("local/known_hosts") == "[127.0.0.1]:2222 ssh-ed25519 AAAA\n"
    text = project.read("local/group_vars/all/vars.yml")
    settings = yaml.safe_load(text)
    assert settings["app_name"] == "demo"
    assert settings["app_domains"] == ["a.test", "b.test"]
    assert settings["release_version"] == "main"
    assert settings["release_env"] == {"DEBUG": True}
    assert settings["nginx_https_port"] == 8443
    assert text.count("release_version") == 1


def test_an_administrator_comes_with_a_hardened_server(project: Project) -> None:
    wanted: dict[str, Any] = {"env": "local", "environment_host": "127.0.0.1", "environment_domain": "a.test"}
    key = "ssh-ed25519 AAAA ada@laptop"
    project.run(**wanted, environment_admin="ada", environment_admin_key=f"{key}\n")
    assert yaml.safe_load(project.read("local/hosts.yml"))["app"]["vars"]["ansible_user"] == "ada"
    text = project.read("local/group_vars/all/vars.yml")
    settings = yaml.safe_load(text)
    assert settings["ssh_admins"] == [{"name": "ada", "keys": [key]}]
    assert settings["firewall_enabled"] is settings["hardening_enabled"] is True
    assert text.count("ssh_admins") == 1


@pytest.mark.parametrize(
    ("name", "key"), [("ada", ""), ("", "ssh-ed25519 AAAA"), ("root", "ssh-ed25519 AAAA"), ("ada", "~/.ssh/id.pub")]
)
def test_an_administrator_has_a_name_and_a_key(project: Project, name: str, key: str) -> None:
    wanted: dict[str, Any] = {"env": "local", "environment_host": "127.0.0.1", "environment_domain": "a.test"}
    output = project.run(code=2, **wanted, environment_admin=name, environment_admin_key=key)
    assert "public ssh key" in output
    assert not (project.inventories / "local").exists()


def test_a_fleet_has_its_groups_and_ports(project: Project) -> None:
    project.run(
        env="fleet",
        environment_host="127.0.0.1:2201, app.example.com:2202,[2001:db8::3]:2203,2001:db8::4,203.0.113.5",
        environment_lb="203.0.113.5, 127.0.0.1:2299, [::1]",
        environment_control="127.0.0.1:2299",
        environment_domain="a.test",
    )
    inventory = yaml.safe_load(project.read("fleet/hosts.yml"))
    assert inventory["app"] == {
        "hosts": {
            "app1": {"ansible_host": "127.0.0.1", "ansible_port": 2201},
            "app2": {"ansible_host": "app.example.com", "ansible_port": 2202},
            "app3": {"ansible_host": "2001:db8::3", "ansible_port": 2203},
            "app4": {"ansible_host": "2001:db8::4"},
            "app5": {"ansible_host": "203.0.113.5"},
        }
    }
    # A server in two groups goes by one name: it has one lock, and one set of host variables.
    assert inventory["lb"]["hosts"] == {
        "app5": None,
        "lb2": {"ansible_host": "127.0.0.1", "ansible_port": 2299},
        "lb3": {"ansible_host": "::1"},
    }
    assert inventory["control"]["hosts"] == {"lb2": None}
    assert inventory["all"]["vars"] == {"ansible_user": "root"}


def test_a_database_server_has_its_groups_secrets_and_settings(project: Project) -> None:
    output = project.run(
        "-vvv",
        "--diff",
        env="data",
        environment_db="203.0.113.10",
        environment_backup="203.0.113.20:2222",
        environment_control="203.0.113.20:2222",
        **EXAMPLE,
    )
    inventory = yaml.safe_load(project.read("data/hosts.yml"))
    assert inventory["app"]["hosts"] == {"app1": {"ansible_host": "203.0.113.10"}}
    # One server with one name, whatever it is for.
    assert inventory["db"]["hosts"] == {"app1": None}
    assert inventory["backup"]["hosts"] == {"backup1": {"ansible_host": "203.0.113.20", "ansible_port": 2222}}
    assert inventory["control"]["hosts"] == {"backup1": None}
    assert inventory["all"]["vars"] == {"ansible_user": "root"}
    settings = yaml.safe_load(project.read("data/group_vars/all/vars.yml"))
    assert settings["release_secrets"]["DATABASE_URL"] == "{{ database_url }}"
    assert settings["release_migration_secrets"] == {"DATABASE_URL": "{{ database_migration_url }}"}
    vault = project.vault("data")
    database = {"vault_postgresql_password", "vault_postgresql_owner_password", "vault_backup_passphrase"}
    assert vault.keys() == {"vault_secret_key", *database}
    assert len(set(vault.values())) == 4
    for secret in vault.values():
        assert len(secret) >= 16
        assert secret not in output
    assert "changed=0" in project.run(env="data", environment_db="203.0.113.10", **EXAMPLE)


def test_a_database_server_may_come_to_an_inventory_that_is_there(project: Project) -> None:
    """As in a scenario: hosts.yml is somebody else's, settings and secrets are still to be made."""
    (project.inventories / "data").mkdir(parents=True)
    (project.inventories / "data/hosts.yml").write_text("app:\n  hosts:\n    one:\n")
    project.run(env="data", environment_db="203.0.113.7", environment_domain="a.test")
    assert project.read("data/hosts.yml") == "app:\n  hosts:\n    one:\n"
    assert "release_migration_secrets:" in project.read("data/group_vars/all/vars.yml")
    assert "vault_postgresql_password" in project.vault("data")


def test_load_balancers_come_beside_what_is_there_without_them(project: Project) -> None:
    project.run(env="one", **EXAMPLE)
    project.run(env="two", environment_lb="203.0.113.5", **EXAMPLE)
    one, two = (project.read(f"{env}/hosts.yml").replace(env, "prod") for env in ("one", "two"))
    missing = [line for line in one.splitlines() if line not in two.splitlines()]
    assert missing == []
    assert not [line for line in two.splitlines() if not line.strip()]


def test_the_database_can_be_named_and_its_password_drawn(project: Project) -> None:
    url = "postgresql://hardstand:{random}@10.0.0.5/hardstand"
    first = project.run("-vvv", "--diff", env="one", environment_database_url=url, **EXAMPLE)
    second = project.run(env="two", environment_database_url=url, **EXAMPLE)
    urls = [project.vault(env)["vault_database_url"] for env in ("one", "two")]
    assert urls[0] != urls[1]
    for found in urls:
        match = re.fullmatch(r"postgresql://hardstand:([0-9a-f]{48})@10\.0\.0\.5/hardstand", found)
        assert match, found
        assert match[1] not in first + second

    given = "postgres://u:it%27s%20mine@db.example.com/app?sslmode=require"
    output = project.run(
        "-vvv",
        "--diff",
        env="three",
        environment_database_url=given,
        _environ={"ANSIBLE_DISPLAY_ARGS_TO_STDOUT": "1"},
        **EXAMPLE,
    )
    assert project.vault("three")["vault_database_url"] == given
    assert "it%27s" not in output
    # A vault that is there is not touched, and the run says so.
    output = project.run(env="three", environment_database_url=url, **EXAMPLE)
    assert project.vault("three")["vault_database_url"] == given
    assert "environment_database_url not looked at" in " ".join(output.split())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "Name the environment"),
        ({"env": "../etc"}, "Name the environment"),
        ({"env": "Prod"}, "Name the environment"),
        ({"env": "prod"}, "Give the address of each server"),
        ({"env": "prod", "environment_host": "1.2.3.4; rm"}, "Give the address of each server"),
        ({"env": "prod", "environment_host": "1.2.3.4:ssh"}, "Give the address of each server"),
        ({"env": "prod", "environment_host": "[::1]22"}, "Give the address of each server"),
        ({"env": "prod", "environment_lb": "1.2.3.4"}, "Give the address of each server"),
        ({"env": "prod", "environment_host": "1.2.3.4", "environment_lb": "5,"}, "Give the address of each server"),
        (
            {"env": "prod", "environment_database_url": "mysql://u:pass@h/d", **EXAMPLE},
            "is no URL that the application",
        ),
        ({"env": "prod", "environment_db": "1.2.3.4,1.2.3.5", **EXAMPLE}, "For PostgreSQL there is one server"),
        (
            {"env": "prod", "environment_db": "1.2.3.4", "environment_backup": "x y", **EXAMPLE},
            "for its backups one server",
        ),
        ({"env": "prod", "environment_backup": "1.2.3.4", **EXAMPLE}, "names another server, for the backups"),
        (
            {"env": "prod", "environment_db": "1.2.3.4", "environment_database_url": "postgresql://u:p@h/d", **EXAMPLE},
            "one of them",
        ),
        ({"env": "prod", "environment_host": "1.2.3.4"}, "Give the DNS names"),
        ({"env": "prod", "environment_host": "1.2.3.4", "environment_domain": "https://x"}, "Give the DNS names"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(
    project: Project, variables: dict[str, Any], message: str
) -> None:
    assert message in project.run(code=2, **variables)
    assert not project.inventories.exists()
    assert not (project.directory / ".vault-password").exists()


def test_a_dry_run_makes_nothing(project: Project) -> None:
    output = project.run("--check", "--diff", env="prod", **EXAMPLE)
    assert "+      ansible_host: 203.0.113.10" in output
    assert not project.inventories.exists()
    assert not (project.directory / ".vault-password").exists()


class TestVaultPassword:
    """bin/vault-password, as Ansible calls it."""

    @staticmethod
    def run(project: Project, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HARDSTAND_")}
        return subprocess.run(
            [project.directory / "bin/vault-password"],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_a_fresh_clone_needs_none(self, project: Project) -> None:
        result = self.run(project)
        assert (result.returncode, result.stdout) == (0, "nothing-is-encrypted\n")

    def test_an_encrypted_vault_needs_one(self, project: Project) -> None:
        project.run(env="prod", **EXAMPLE)
        password = project.directory / ".vault-password"
        assert self.run(project).stdout == password.read_text()

        password.chmod(0o640)
        result = self.run(project)
        assert result.returncode == 1
        assert f"Run: chmod 600 {password}" in result.stderr

        password.unlink()
        result = self.run(project)
        assert result.returncode == 1
        assert result.stdout == ""
        error, hint = result.stderr.strip().splitlines()
        assert error == (
            "error: There is no vault password, and inventories/prod/group_vars/all/vault.yml is encrypted."
        )
        assert f"{password} (mode 600)" in hint
        assert "HARDSTAND_VAULT_PASSWORD_FILE" in hint

    def test_a_file_elsewhere_can_be_named(self, project: Project, tmp_path: Path) -> None:
        file = tmp_path / "elsewhere"
        file.write_text("open sesame\n")
        file.chmod(0o600)
        assert self.run(project, HARDSTAND_VAULT_PASSWORD_FILE=str(file)).stdout == "open sesame\n"
        result = self.run(project, HARDSTAND_VAULT_PASSWORD_FILE="/nowhere")
        assert result.returncode == 1
        assert "The vault password file /nowhere does not exist." in result.stderr
