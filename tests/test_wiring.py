"""How the roles are wired to each other: every name is a role's, and every default that is repeated is still right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from jinja2 import nodes

from tests.role_templates import ROLES, evaluate

PROJECT = ROLES.parent
WIRING = [PROJECT / "group_vars" / "all.yml", *sorted((PROJECT / "playbooks" / "vars").glob("*.yml"))]
FILES = [*WIRING, PROJECT / "deploy.yml", *sorted((PROJECT / "playbooks").glob("*.yml"))]
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
    assert names - OPTIONS.keys() == set()


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
