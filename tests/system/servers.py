"""What the tests of this directory share: servers that know nothing of each other, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests import harness
from tests.harness import APP, DOMAIN, PROJECT, ROOT, Client, Deploy, Reply, Repository, Run, curl, wait_for
from tests.load import Load, Target

__all__ = [
    "APP",
    "DOMAIN",
    "ROOT",
    "SCENARIO",
    "Client",
    "Deploy",
    "Reply",
    "Repository",
    "Server",
    "curl",
    "load",
    "wait_for",
]

SCENARIO = PROJECT / "molecule" / "default"


@dataclass
class Server(harness.Server):
    """One of the servers, and the inventories that it is deployed to with."""

    inventories: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def ansible(self, playbook: str, *arguments: str, **settings: Any) -> Deploy:
        """Run a playbook against this server alone, with settings on top of the inventory's."""
        merged = {**self.settings, **settings}
        return Run(self.inventories, playbook, "--limit", self.name, *arguments, **merged).wait()

    def deploy(self, *arguments: str, **settings: Any) -> Deploy:
        """Run deploy.yml and expect it to succeed."""
        run = self.ansible("deploy.yml", *arguments, **settings)
        assert run.code == 0, run.output
        return run

    def refuse(self, *arguments: str, **settings: Any) -> Deploy:
        """Run deploy.yml and expect it to fail."""
        run = self.ansible("deploy.yml", *arguments, **settings)
        assert run.code != 0, run.output
        return run


class Seen:
    """What clients see while something happens to the server, and have seen when it is over."""

    def __init__(self, running: Load) -> None:
        self._running = running

    @property
    def requests(self) -> int:
        return self._running.report().requests

    @property
    def releases(self) -> set[str]:
        return self._running.report().releases()

    @property
    def failures(self) -> list[str]:
        return self._running.report().kinds()


@contextmanager
def load(server: Server, clients: int = 8) -> Iterator[Seen]:
    """Keep clients busy, reading and writing on keep-alive connections, and check every answer's content."""
    with Load(Target("127.0.0.1", server.https_port, DOMAIN, str(server.ca), clients=clients, pause=0.01)) as running:
        yield Seen(running)
