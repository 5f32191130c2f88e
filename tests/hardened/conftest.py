"""The environments of Molecule's scenario `hardened`. Run by `molecule verify`, which says where their servers are."""

from __future__ import annotations

import pytest

from tests.hardened.site import Server, Site, make_fleet, make_single_server
from tests.harness import molecule_inventory


@pytest.fixture(scope="session", params=["debian13", "debian12"])
def site(request: pytest.FixtureRequest) -> Site:
    """Either environment, deployed to: one by Molecule, the other one here, from where only root logs in."""
    if request.param == "debian13":
        return make_fleet()
    # Its secrets live as long as its server does, which is as long as Molecule's directory.
    directory = molecule_inventory().parents[1] / "environments"
    directory.mkdir(exist_ok=True)
    made = make_single_server(directory)
    made.expect("deploy.yml")
    return made


@pytest.fixture
def server(site: Site) -> Server:
    """The server that a deploy comes to first, unless a test file means another one."""
    return site.app
