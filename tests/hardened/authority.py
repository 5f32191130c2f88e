"""The ACME authority of an environment: pebble, on a machine of the scenario that nobody deploys to."""

from __future__ import annotations

import ssl
import urllib.request
from pathlib import Path

import yaml

from tests.harness import PROJECT, wait_for
from tests.harness import Server as Machine

SCENARIO = PROJECT / "molecule" / "hardened"
DIRECTORY_CERTIFICATE = SCENARIO / "inventory" / ".acme" / "directory.crt"
DAY = 86_400


class Authority:
    """It forgets everything when it ends, and signs with another root when it starts again."""

    def __init__(self, environment: str, machine: Machine, address: str, directory: Path) -> None:
        """Keep in `directory` what clients trust; `machine` runs it, at `address`."""
        found = yaml.safe_load((SCENARIO / "vars" / "authorities.yml").read_text())["authorities"][environment]
        self.environment, self.machine, self.address = environment, machine, address
        self.port, self.management_port = found["port"], found["management_port"]
        # All the roots that it has had.
        self.roots = directory / f"{environment}-roots.crt"
        self.roots.touch()
        self.trust()

    @property
    def settings(self) -> dict[str, str]:
        """What an environment sets to have its certificates."""
        return {
            "certificate_mode": "acme",
            "certificate_acme_directory": f"https://{self.address}:{self.port}/dir",
        }

    def get(self, rest: str) -> str:
        """Return what it answers at `rest` of its address."""
        context = ssl.create_default_context(cafile=str(DIRECTORY_CERTIFICATE))
        with urllib.request.urlopen(f"https://{self.address}:{rest}", timeout=5, context=context) as answer:
            return str(answer.read().decode())

    def answers(self) -> bool:
        """Return whether it is there."""
        try:
            return bool(self.get(f"{self.port}/dir"))
        except OSError:
            return False

    def trust(self) -> None:
        """Have clients trust what it signs with now, beside what it did before."""
        root = self.get(f"{self.management_port}/roots/0")
        known = self.roots.read_text()
        if root not in known:
            self.roots.write_text(known + root)

    def start(self, validity: int = 90 * DAY) -> None:
        """Start it; its certificates are valid for so many seconds."""
        settings = f"/etc/pebble/{self.environment}.json"
        self.machine.sh(
            f"sed -i -E 's/(certificateValidityPeriod\": )[0-9]+/\\1{validity}/' {settings}"
            f" && systemctl restart pebble@{self.environment}"
        )
        wait_for(self.answers, 60, "the authority answers")
        self.trust()

    def stop(self) -> None:
        """Have nobody answer at its address."""
        self.machine.sh(f"systemctl stop pebble@{self.environment}")
