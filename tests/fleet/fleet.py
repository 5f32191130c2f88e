"""The fleet of scenario `rolling`: a load balancer, three application servers, a control host, a database."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.mark import ParameterSet

from tests.harness import APP, DOMAIN, PROJECT, ROOT, Operator, Server, molecule_inventory, wait_for
from tests.load import Load, Report, Target

SCENARIO = PROJECT / "molecule" / "rolling"
LOCK = f"/run/lock/hardstand-{APP}.lock"
POOL = f"/etc/hardstand/pools/{APP}.json"
LB_LOG = f"/var/log/nginx/{APP}-lb.access.log"

# How a phase of a deploy begins, in Ansible's output.
PHASES = {
    "preflight": r"^TASK \[preflight : Hosts \|",
    "build": r"^TASK \[release : Build_here \|",
    # What is pending is looked at first, and goes on to a migration only when something is.
    "migrate": r"^TASK \[release : (Pending|Migrate) \|",
    "start": r"^TASK \[release : Start \|",
    "switch": r"^TASK \[release : Switch \|",
    "drain": r"^TASK \[release : Drain \|",
    "finish": r"^TASK \[release : Finish \|",
}

# Asks the live slot of a server who it is, without nginx and without anything that a bare server lacks.
_ASK = f"""
import http.client, json, socket
connection = http.client.HTTPConnection("{DOMAIN}", timeout=10)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("{ROOT}/run/live.sock")
connection.request("GET", "/api/info")
print(json.load(connection.getresponse())["release"])
"""


def rarely(value: object) -> ParameterSet:
    """Return a parameter that is left to an exhaustive run."""
    return pytest.param(value, marks=pytest.mark.exhaustive)


@dataclass(kw_only=True)
class Fleet(Operator):
    """All servers, and the operator of them."""

    lb: Server
    apps: dict[str, Server]
    control: Server
    database: Server
    addresses: dict[str, str]

    @property
    def servers(self) -> list[Server]:
        """The servers that a deploy is about."""
        return [self.lb, *self.apps.values()]

    # As root on the servers

    def serving(self) -> dict[str, str]:
        """Return what the live slot of each server that is on says it is; "nothing" where none answers."""

        def ask(server: Server) -> str:
            return server.sh(f"python3 -c '{_ASK}' 2>/dev/null || echo nothing")

        on = [server for server in self.apps.values() if server.running()]
        with ThreadPoolExecutor(len(self.apps)) as pool:
            return dict(zip((server.name for server in on), pool.map(ask, on), strict=True))

    def release(self) -> str:
        """Return the release that all servers serve that are on."""
        serving = self.serving()
        assert len(set(serving.values())) == 1, f"not one release: {serving}"
        return next(iter(serving.values()))

    def locked(self) -> list[str]:
        """Return the servers that have a deploy lock."""
        return [
            server.name for server in self.servers if server.running() and server.sh(f"ls {LOCK}", check=False) == LOCK
        ]

    def members(self) -> dict[str, dict[str, Any]]:
        """Return what the load balancer knows of the application servers, by name."""
        members: dict[str, dict[str, Any]] = json.loads(self.lb.sh(f"cat {POOL}"))["members"]
        return members

    def drained(self) -> set[str]:
        """Return the servers that the load balancer sends no requests to."""
        return {name for name, member in self.members().items() if member["drained"]}

    def state(self) -> dict[str, str]:
        """Return a listing of all that a deploy could change, of every server."""
        command = (
            "find /etc /srv /opt -xdev -not -path '*/__pycache__*' -printf '%p %y %m %u %s %T@\\n' 2>/dev/null | sort"
        )
        return {server.name: server.sh(command) for server in self.servers}

    def migration_head(self) -> str:
        """Return the newest migration of the release that serves."""
        first = next(iter(self.apps.values()))
        return first.sh(f"cd {ROOT}/current && .venv/bin/alembic -c app/alembic.ini heads 2>/dev/null").split()[0]

    def check_whole(self, *releases: str) -> str:
        """Check that the fleet is on one release, one of these where any are given, and unlocked; return it."""
        release = self.release()
        assert not releases or release in releases
        assert self.locked() == []
        for server in self.apps.values():
            if server.running():
                assert len(server.programs()) == 1, f"{server.name} runs {server.programs()}"
        return release

    # As a client

    def target(self, **options: Any) -> Target:
        """Return the load balancer as what a load generator asks."""
        return Target("127.0.0.1", self.lb.https_port, DOMAIN, str(self.lb.ca), **options)

    def who_answers(self, seconds: float = 2) -> Report:
        """Return what some clients see for a moment."""
        with Load(self.target(clients=6)) as running:
            time.sleep(seconds)
            return running.stop()

    def blame(self, report: Report, server: Server) -> list[dict[str, Any]]:
        """Return those failures of a report that happened on one server, going by the load balancer's access log.

        A request is on the last server that the load balancer sent it to.
        """
        failed = {failure["request_id"]: failure for failure in report.failures if failure["request_id"]}
        if not failed:
            return []
        # nginx writes its log once a second.
        pattern = "|".join(failed)
        assert re.fullmatch(r"[0-9a-f|]+", pattern)

        def look() -> dict[str, str]:
            text = self.lb.sh(f"grep -hE '{pattern}' {LB_LOG}", check=False)
            logged = [json.loads(line) for line in text.splitlines()]
            found = {str(line["request_id"]): str(line["upstream"]) for line in logged}
            return found if len(found) == len(failed) else {}

        upstreams: dict[str, str] = wait_for(look, 10, "all failed requests in the load balancer's log")
        address = self.addresses[server.name]
        return [
            failed[key] for key, upstream in upstreams.items() if upstream.split(", ")[-1].startswith(f"{address}:")
        ]


def make_fleet() -> Fleet:
    """Return the fleet that Molecule made."""
    inventory = molecule_inventory()
    hosts = yaml.safe_load((SCENARIO / "inventory" / "hosts.yml").read_text())
    addresses = {
        name: str(variables["internal_address"])
        for group in hosts.values()
        for name, variables in group["hosts"].items()
    }
    # In Molecule's order: the first inventory is inventory_dir, where the private CA is.
    lb = Server(next(iter(hosts["lb"]["hosts"])), ca=inventory.parent / "pki" / "ca.crt")
    lb.refresh()
    return Fleet(
        lb=lb,
        apps={name: Server(name) for name in hosts["app"]["hosts"]},
        control=Server(next(iter(hosts["control"]["hosts"]))),
        database=Server(next(iter(hosts["database"]["hosts"]))),
        addresses=addresses,
        inventories=[str(inventory), str(Path(SCENARIO) / "inventory")],
    )
