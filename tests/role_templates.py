"""A role's variables and templates as Ansible evaluates them, without a playbook, an inventory or a server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import ansible.module_utils
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.utils.collection_loader import AnsibleCollectionConfig

ROLES = Path(__file__).resolve().parents[1] / "roles"


def load_file(file: Path) -> ModuleType:
    """Import a file of a role, as Ansible would: by where it is, with what the role has in module_utils."""
    utils = str(file.parents[1] / "module_utils")
    if utils not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(utils)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_yaml(path: Path) -> Any:
    """Return the content of `path` with every text marked as a template, as Ansible does with the files of a role."""
    return _trusted(yaml.safe_load(path.read_text(encoding="utf-8")))


def _trusted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_trusted(key): _trusted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_trusted(item) for item in value]
    return trust_as_template(value) if isinstance(value, str) else value


def evaluate(role: str, expression: str, **variables: Any) -> Any:
    """Return what the Jinja `expression` (without braces) comes to among the role's defaults and vars.

    `variables` come on top, as those of an inventory do. Raises ansible.errors.AnsibleError when a template is wrong.
    """
    if AnsibleCollectionConfig.collection_finder is None:
        init_plugin_loader()
    directory = ROLES / role
    loader = DataLoader()
    loader.set_basedir(str(directory))
    available = {"ansible_search_path": [str(directory)]}
    for name in ("defaults", "vars"):
        available |= read_yaml(directory / name / "main.yml")
    return Templar(loader=loader, variables=available | variables).template(
        trust_as_template("{{ " + expression + " }}")
    )
