"""Servers that are machines of their own, one of each release of Debian, deployed to as an operator would.

Run by `bin/test machine`: `molecule` cannot make them, and containers cannot do what is tested on them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import DOMAIN, PROJECT, Operator, make_environment
from tests.virtual_machine import VirtualMachine

ADMIN = "ada"
SETTINGS = {
    # This machine, as QEMU shows it to a virtual one: tests log in more often than people do.
    "ssh_trusted_sources": ["10.0.2.2"],
    # Emulation is slow.
    "release_health_timeout": 600,
    # What this machine trusts; the scenario whose settings these are has an ACME authority besides.
    "base_extra_ca_files": sorted(map(str, Path("/usr/local/share/ca-certificates").glob("*.crt"))),
}
# Of emulation, where there is no KVM and others want the processors as well.
DEPLOY_SECONDS = 3600


@dataclass(kw_only=True)
class Site(Operator):
    """An environment of one virtual machine."""

    machine: VirtualMachine
    ca: Path

    def get(self, path: str) -> str:
        """Return what the service answers, its certificate verified; empty when it does not."""
        to = ["--resolve", f"{DOMAIN}:443:{self.machine.address}", f"https://{DOMAIN}{path}"]
        command = ["curl", "--silent", "--fail", "--max-time", "20", "--cacert", str(self.ca), *to]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="session", params=["debian13", "debian12"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A machine where only root logged in, after one deploy."""
    release = request.param.removeprefix("debian")
    with tempfile.TemporaryDirectory(prefix="hardstand-machine-") as name:
        directory = Path(name)
        key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        machine = VirtualMachine(release, f"127.0.84.{release}", key, directory)
        try:
            machine.start()
            yield _deployed(machine, directory)
        finally:
            machine.stop()


def _deployed(machine: VirtualMachine, directory: Path) -> Site:
    password = directory / "vault-password"
    password.touch(0o600)
    password.write_text(os.urandom(32).hex())
    os.environ["HARDSTAND_VAULT_PASSWORD_FILE"] = str(password)
    scenario = PROJECT / "molecule" / "hardened"
    inventory = make_environment(directory / "machine", scenario, machine.address, machine.key, machine.known_hosts)
    site = Site(inventories=[str(inventory)], settings=dict(SETTINGS), machine=machine, ca=inventory / "pki" / "ca.crt")
    done = site.run("deploy.yml").wait(DEPLOY_SECONDS)
    assert done.code == 0, done.output
    machine.user = ADMIN
    return site
