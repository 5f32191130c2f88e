"""The fleet of Molecule's scenario `rolling`. Run by `molecule verify`, which says where its servers are."""

from __future__ import annotations

import pytest

from tests.fleet.fleet import Fleet, make_fleet
from tests.harness import Repository, add_routes


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return make_fleet()


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """What is deployed in these tests, with two routes more than the project's own application has."""
    made = Repository(tmp_path_factory.mktemp("developer") / "repository")
    add_routes(made)
    return made


@pytest.fixture
def release(fleet: Fleet, repository: Repository) -> str:
    """Start a test from the repository's HEAD, served by the whole fleet."""
    head = repository.git("rev-parse", "HEAD")[:8]
    if fleet.drained() or any(not release.startswith(head) for release in fleet.serving().values()):
        fleet.deploy(repository)
    return fleet.check_whole()
