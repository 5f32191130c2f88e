"""The servers of the Molecule scenario that is being verified. Run by `molecule verify`, which says where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.harness import molecule_inventory
from tests.system.servers import SCENARIO, Repository, Server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_name" in metafunc.fixturenames:
        hosts = yaml.safe_load(molecule_inventory().read_text())["all"]["hosts"]
        metafunc.parametrize("server_name", sorted(hosts), scope="session")


@pytest.fixture(scope="session")
def scenario_inventory() -> str:
    """The part of the inventory that a person would write: settings and vault."""
    return str(SCENARIO / "inventory")


@pytest.fixture(scope="session")
def server(server_name: str, scenario_inventory: str) -> Server:
    # In Molecule's order: the first one is inventory_dir, where the private CA is.
    inventories = [str(molecule_inventory()), scenario_inventory]
    made = Server(server_name, 0, 0, molecule_inventory().parent / "pki" / "ca.crt", inventories)
    made.refresh()
    return made


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")
