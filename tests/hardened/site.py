"""The environments of scenario `hardened`, whose servers only their administrators log in to."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.hardened.authority import Authority
from tests.harness import PROJECT, Operator, make_environment, molecule_inventory
from tests.harness import Server as Machine
from tests.ssh_login import ssh_command

SCENARIO = PROJECT / "molecule" / "hardened"
ACCESS = SCENARIO / "inventory" / ".ssh"
ADMIN = "ada"

# Server that is an environment by itself.
SINGLE = "hardstand-hardened-single"
# Machine of somebody else, with the authorities, and a client with Debian 13's OpenSSL and curl.
ELSEWHERE = "hardstand-hardened-acme"


@dataclass
class Server(Machine):
    """A server that is reached at addresses of its own."""

    address: str = ""
    address6: str = ""

    def ssh(
        self, command: str, user: str = ADMIN, key: Path = ACCESS / "key", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Log in on a connection of its own and run a command; exit code 255 is ssh's, for one who is not let in."""
        return subprocess.run(
            ssh_command(f"{user}@{self.address}", command, key, ACCESS / "known_hosts"),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )


@dataclass(kw_only=True)
class Site(Operator):
    """An environment. The server that clients reach is the first one."""

    servers: dict[str, Server]
    authority: Authority
    admin: str = ADMIN
    admins: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admins = [{"name": self.admin, "keys": [(ACCESS / "key.pub").read_text().strip()]}]

    @property
    def names(self) -> list[str]:
        return list(self.servers)

    @property
    def public(self) -> Server:
        """The server that clients reach."""
        return next(iter(self.servers.values()))

    @property
    def app(self) -> Server:
        """The server that the application runs on."""
        return list(self.servers.values())[-1]

    def server(self, name: str) -> Server:
        return self.servers[name]

    def stranger(self, _: Server) -> Server:
        """Return a server of somebody else."""
        return make_server("hardstand-hardened-app1" if SINGLE in self.servers else SINGLE)


def slow_to_prove(directory: Path) -> str:
    """Return what stands in for ssh, and takes its time with connections that prove something."""
    made = directory / "ssh"
    made.write_text('#!/bin/sh\ncase "$*" in *ControlPath=none*) sleep 20;; esac\nexec ssh "$@"\n')
    made.chmod(0o755)
    return str(made)


def platforms() -> dict[str, dict[str, Any]]:
    """Return what the scenario says of its servers."""
    said = yaml.safe_load((SCENARIO / "molecule.yml").read_text())["platforms"]
    return {platform["name"]: platform for platform in said}


def make_server(name: str, ca: Path = Path()) -> Server:
    """Return a server of the scenario."""
    platform = platforms()[name]
    made = Server(name, ca=ca, address=platform["ip"], address6=platform["env"]["IP6"])
    if "published_ports" in platform:
        made.refresh()
    return made


def make_authority(environment: str) -> Authority:
    """Return the authority that an environment may have its certificates from."""
    machine = make_server(ELSEWHERE)
    return Authority(environment, machine, machine.address, molecule_inventory().parents[1])


def make_fleet() -> Site:
    """Return the environment that Molecule has made."""
    inventory = molecule_inventory()
    hosts = yaml.safe_load((SCENARIO / "inventory" / "hosts.yml").read_text())
    names = [name for group in ("lb", "app") for name in hosts[group]["hosts"]]
    return Site(
        inventories=[str(inventory), str(SCENARIO / "inventory")],
        servers={name: make_server(name, inventory.parent / "pki" / "ca.crt") for name in names},
        authority=make_authority("fleet"),
    )


def make_single_server(directory: Path) -> Site:
    """Make the environment of the single server as its operator would; it is still to be deployed to.

    Its certificate is to come from its authority.
    """
    authority = make_authority("single")
    settings = yaml.safe_load((SCENARIO / "environment.yml").read_text())["environment_settings"]
    environment = make_environment(
        directory / "single",
        SCENARIO,
        platforms()[SINGLE]["ip"],
        ACCESS / "key",
        ACCESS / "known_hosts",
        environment_settings=settings | authority.settings,
    )
    return Site(
        inventories=[str(environment)],
        servers={SINGLE: make_server(SINGLE, authority.roots)},
        authority=authority,
    )
