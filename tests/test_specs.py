"""Every role: defaults and specification agree, in names and in values, and the README is generated from them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.parent for path in PROJECT.glob("roles/*/tasks"))
# Settings that belong to no role; preflight declares them.
GLOBAL = {"app_name", "app_domains"}

each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def options_of(role: Path) -> dict[str, dict[str, Any]]:
    """Return a role's options, those of all entry points."""
    file = role / "meta" / "argument_specs.yml"
    assert file.is_file(), f"{file.relative_to(PROJECT)} is missing"
    options: dict[str, dict[str, Any]] = {}
    for entry_point in yaml.safe_load(file.read_text())["argument_specs"].values():
        options |= entry_point.get("options") or {}
    return options


def defaults_of(role: Path) -> str:
    """Return the text of a role's defaults."""
    file = role / "defaults" / "main.yml"
    return file.read_text() if file.is_file() else ""


@each_role
def test_defaults_and_specification_agree(role: Path) -> None:
    wanted = {name: option["default"] for name, option in options_of(role).items() if "default" in option}
    assert (yaml.safe_load(defaults_of(role)) or {}) == wanted


@each_role
def test_options_are_described_typed_and_named_after_the_role(role: Path) -> None:
    for name, option in options_of(role).items():
        assert option.get("description"), f"{name} has no description"
        assert option.get("type"), f"{name} has no type"
        assert name.startswith(f"{role.name}_") or name in GLOBAL, f"{name} does not begin with the role's name"
        assert not (option.get("required") and "default" in option), f"{name} is required and has a default"


@each_role
def test_what_has_no_default_stands_in_the_defaults_commented_out(role: Path) -> None:
    text = defaults_of(role)
    for name, option in options_of(role).items():
        if "default" not in option and name not in GLOBAL:
            assert re.search(rf"^# {name}:", text, re.MULTILINE), f"{name} is not in defaults/main.yml"


@each_role
def test_every_default_has_a_comment(role: Path) -> None:
    """The line above a default, or above the block of defaults it belongs to, is a comment."""
    commented = False
    for line in defaults_of(role).splitlines():
        if line.startswith("#"):
            commented = True
        elif not line.strip() or line == "---":
            commented = False
        elif re.match(r"\w+:", line):
            assert commented, f"{line} has no comment"


@each_role
def test_a_role_has_few_defaults(role: Path) -> None:
    assert len(options_of(role)) <= 50


def test_the_tables_of_variables_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, PROJECT / "bin" / "docs", "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
