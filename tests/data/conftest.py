"""The environments of Molecule's scenario `data`. Run by `molecule verify`, which says where their servers are."""

from __future__ import annotations

import pytest

from tests.data.site import Site, make_sites
from tests.harness import molecule_inventory


@pytest.fixture(scope="session")
def sites() -> dict[str, Site]:
    """Both environments, deployed to: one by Molecule, the other one here."""
    # Its secrets live as long as its server does, which is as long as Molecule's directory.
    directory = molecule_inventory().parents[1] / "environments"
    directory.mkdir(exist_ok=True)
    made = make_sites(directory)
    made["debian12"].expect("deploy.yml")
    return made


@pytest.fixture(scope="session", params=["debian13", "debian12"])
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]
