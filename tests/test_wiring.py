"""How the roles are wired to each other: every name is a role's, and every default that is repeated is still right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import jinja2
import pytest
import yaml
from jinja2 import nodes

from tests.role_templates import ROLES, evaluate, read_yaml

PROJECT = ROLES.parent
WIRING = [PROJECT / "group_vars" / "all.yml", *sorted((PROJECT / "playbooks" / "vars").glob("*.yml"))]
FILES = [*WIRING, PROJECT / "deploy.yml", *sorted((PROJECT / "playbooks").glob("*.yml"))]
# What an inventory's settings refer to.
FOR_SETTINGS = {"database_url", "database_migration_url"}
# What Ansible evaluates without braces.
EXPRESSIONS = ("when", "that", "until", "changed_when", "failed_when")


def role_options() -> dict[str, str]:
    """Return the role that each setting belongs to."""
    found: dict[str, str] = {}
    for file in ROLES.glob("*/meta/argument_specs.yml"):
        for entry_point in yaml.safe_load(file.read_text())["argument_specs"].values():
            found |= dict.fromkeys(entry_point.get("options") or {}, file.parts[-3])
    return found


OPTIONS = role_options()


def templates(value: Any, key: str = "") -> Iterator[str]:
    """Yield the Jinja templates of a document; conditions, which are written without braces, with them."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from templates(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from templates(item, key)
    elif isinstance(value, str):
        yield "{{ " + value + " }}" if key in EXPRESSIONS and "{{" not in value else value


def defaults(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each `name | default(value)`, also of `hostvars[…].name`."""
    for found in _parser().parse(text).find_all(nodes.Filter):
        if found.name not in ("default", "d") or found.node is None:
            continue
        name = getattr(found.node, "attr" if isinstance(found.node, nodes.Getattr) else "name", None)
        if name and found.args:
            try:
                yield name, found.args[0].as_const()
            except nodes.Impossible:
                yield name, NotImplemented


def _parser() -> jinja2.Environment:
    return jinja2.Environment()  # noqa: S701 - it renders nothing


REPEATED = [
    pytest.param(name, value, id=f"{file.relative_to(PROJECT)}:{name}")
    for file in FILES
    for text in templates(yaml.safe_load(file.read_text()))
    for name, value in defaults(text)
    if name in OPTIONS
]


@pytest.mark.parametrize(("name", "value"), REPEATED)
def test_a_default_that_is_repeated_is_the_roles(name: str, value: Any) -> None:
    """Where a role is not part of the play, its defaults are not known there."""
    assert value is not NotImplemented, f"the default of {name} is no plain value, so nothing can compare it"
    assert value == evaluate(OPTIONS[name], name)


def test_the_repeated_defaults_are_found() -> None:
    found = {param.values[0]: param.values[1] for param in REPEATED}
    assert found["release_batch"] == [1, "25%"]
    assert {"release_request_timeout", "nginx_peer_port", "python_version", "release_migrate_each_host"} <= found.keys()


@pytest.mark.parametrize("file", WIRING, ids=lambda file: str(file.relative_to(PROJECT)))
def test_what_is_wired_is_a_setting_of_a_role(file: Path) -> None:
    names = {name for name in yaml.safe_load(file.read_text()) if not name.startswith("_")}
    assert names - OPTIONS.keys() - FOR_SETTINGS == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PROJECT)))
def test_what_is_read_of_a_role_is_a_setting_of_it(file: Path) -> None:
    """A name that begins like a role's and is not one of its settings is a mistake that only a run would show."""
    roles = tuple(f"{role.name}_" for role in ROLES.iterdir())
    read: set[str] = set()
    for text in templates(yaml.safe_load(file.read_text())):
        tree = _parser().parse(text)
        read |= {name.name for name in tree.find_all(nodes.Name)}
        read |= {
            attribute.attr for attribute in tree.find_all(nodes.Getattr) if isinstance(attribute.node, nodes.Getitem)
        }
    unknown = {name for name in read if name.startswith(roles)} - OPTIONS.keys()
    assert unknown == set()


SECRETS = {"vault_postgresql_password": "it's/100 % @ safe", "vault_postgresql_owner_password": "the-owner's-own"}


def wired(name: str, groups: dict[str, list[str]], here: str = "", **variables: Any) -> Any:
    """Return what a name of group_vars/all.yml comes to, on a fleet whose servers have been asked for their facts."""
    hosts = list(dict.fromkeys(host for members in groups.values() for host in members))
    of_host = {host: {"ansible_facts": {"processor_vcpus": 4, "default_ipv4": {"address": f"10.0.0.{number}"}}}
               for number, host in enumerate(hosts, start=1)}  # fmt: skip
    for host, own in variables.pop("own", {}).items():
        of_host[host] |= own
    known = {
        "app_name": "my-blog",
        "app_domains": ["blog.example"],
        "groups": {"all": hosts, **groups},
        "hostvars": of_host,
        "inventory_hostname": here or hosts[0],
    }
    available = read_yaml(PROJECT / "group_vars" / "all.yml") | known | variables
    return evaluate("preflight", name, **available)


class TestDatabase:
    GROUPS: ClassVar[dict[str, list[str]]] = {"app": ["app1", "app2"], "db": ["db1"], "backup": ["b1"]}

    def test_url_logs_in_with_the_password_that_names_the_login(self) -> None:
        url = urlsplit(wired("database_url", self.GROUPS, **SECRETS))
        digest = hashlib.sha256(b"my-blog:it's/100 % @ safe").hexdigest()[:6]
        assert url.username == f"my_blog_{digest}"
        assert unquote(url.password or "") == "it's/100 % @ safe"
        assert (url.hostname, url.port, url.path) == ("10.0.0.3", 5432, "/my_blog")
        assert url.query == "sslmode=verify-full&sslrootcert=/etc/ssl/hardstand/my-blog-ca.crt"
        assert wired("postgresql_login", self.GROUPS, **SECRETS) == url.username

    def test_url_of_migrations_logs_in_as_the_owner(self) -> None:
        url = urlsplit(wired("database_migration_url", self.GROUPS, **SECRETS))
        assert (url.username, unquote(url.password or "")) == ("my_blog_owner", "the-owner's-own")
        assert wired("postgresql_owner", self.GROUPS, **SECRETS) == "my_blog_owner"

    def test_url_has_brackets_around_an_ipv6_address(self) -> None:
        url = wired("database_url", self.GROUPS, own={"db1": {"internal_address": "fd00::5"}}, **SECRETS)
        assert "@[fd00::5]:5432/my_blog?" in url

    def test_url_is_the_vaults_where_there_is_no_server_of_ours(self) -> None:
        groups = {"app": ["app1"]}
        assert wired("database_url", groups, vault_database_url="sqlite:////x") == "sqlite:////x"
        assert wired("database_migration_url", groups, vault_database_url="sqlite:////x") == "sqlite:////x"
        assert wired("database_migration_url", groups, vault_database_migration_url="m", vault_database_url="u") == "m"
        assert wired("database_url", groups) == ""
        # Nothing asks for the secrets of a server that is not there.
        for name in ("postgresql_login", "postgresql_login_password", "postgresql_owner_password"):
            assert wired(name, groups) == ""

    def test_migrations_have_an_account_where_they_have_secrets(self) -> None:
        assert wired("base_accounts", {"app": ["app1"]}) == ["my-blog", "my-blog-build"]
        migrates = ["my-blog", "my-blog-build", "my-blog-migrate"]
        assert wired("base_accounts", self.GROUPS) == migrates
        assert wired("base_accounts", {"app": ["app1"]}, release_migration_secrets={"A": "b"}) == migrates

    def test_connections_are_of_all_workers_of_two_releases(self) -> None:
        assert wired("postgresql_connections", self.GROUPS) == 2 * (4 * 5 * 2)
        settings = {"release_workers": 3, "release_env": {"DATABASE_POOL_SIZE": 10}}
        assert wired("postgresql_connections", self.GROUPS, own=dict.fromkeys(["app1", "app2"], settings)) == 120
        (first, second) = wired("preflight_database_needs", self.GROUPS, own={"app2": settings | {"ansible_facts": {}}})
        assert first == {"host": "app1", "workers": 4, "each": 5, "connections": 40}
        assert second == {"host": "app2", "workers": 3, "each": 10, "connections": 60}
        of_another_name = {"preflight_database_connections_per_worker": 7}
        needs = wired("preflight_database_needs", {"app": ["app1"]}, own={"app1": of_another_name})
        assert needs[0]["connections"] == 4 * 7 * 2

    def test_connections_of_a_server_that_was_not_asked_are_those_of_the_largest(self) -> None:
        needs = wired("preflight_database_needs", self.GROUPS, own={"app2": {"ansible_facts": {}}})
        assert [need["workers"] for need in needs] == [4, 4]

    def test_authority_goes_to_application_servers_and_only_where_it_is_needed(self) -> None:
        assert wired("certificate_authority_file", self.GROUPS, "app1") == "/etc/ssl/hardstand/my-blog-ca.crt"
        assert wired("certificate_authority_file", self.GROUPS, "db1") == ""
        assert wired("certificate_authority_file", {"app": ["app1"]}, "app1") == ""
