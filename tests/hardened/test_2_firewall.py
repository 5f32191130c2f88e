"""What a server does not offer is closed, on IPv4 and IPv6, and rules that would cut the operator off do not stay."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hardened.site import slow_to_prove
from tests.harness import wait_for

# Without what they have counted.
RULES = "nft -s -t list table inet hardstand_firewall && cat /etc/hardstand/firewall.nft"
ROLE = ("deploy.yml", "--tags", "firewall")
# The address of nobody (RFC 5737).
ELSEWHERE = ["192.0.2.0/24"]


@pytest.fixture
def unchanged(server: Any) -> Iterator[None]:
    """Whatever the test does, the rules are those from before, and the administrator gets in."""
    before = server.sh(RULES)
    yield
    assert server.sh(RULES) == before
    assert server.ssh("true").returncode == 0


@pytest.fixture
def listening(server: Any) -> Iterator[None]:
    """Programs that somebody has started and nobody has declared."""
    unit = "hardstand-test-listens"
    server.sh(f"systemd-run --quiet --unit {unit} python3 -m http.server --bind :: 9999")
    wait_for(lambda: ":9999" in server.sh("ss -Hltn"), 20, "it listens")
    yield
    server.sh(f"systemctl stop {unit}")


def answering(address: str, ports: Sequence[int], seconds: float) -> set[int]:
    """Return which TCP ports of a server accept connections, asked all at once. What is dropped is never answered."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    waiting: dict[int, tuple[socket.socket, int]] = {}
    poll, found = select.poll(), set()
    for port in ports:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.connect_ex((address, port))
        waiting[connection.fileno()] = (connection, port)
        poll.register(connection, select.POLLOUT)
    end = time.monotonic() + seconds
    while waiting and (left := end - time.monotonic()) > 0:
        for number, _ in poll.poll(left * 1000):
            connection, port = waiting.pop(number)
            poll.unregister(number)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.add(port)
            connection.close()
    for connection, _ in waiting.values():
        connection.close()
    return found


def open_ports(address: str) -> set[int]:
    """Return the TCP ports of a server that answer, of all that there are."""
    ports, found = range(1, 65536), set()
    for start in range(0, len(ports), 2000):
        found |= answering(address, ports[start : start + 2000], 0.5)
    return found


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param("address", marks=pytest.mark.once),
        pytest.param("address6", marks=pytest.mark.once(on="debian12")),
    ],
)
def test_exactly_what_is_declared_is_open_from_outside(site: Any, family: str) -> None:
    public, *others = [open_ports(getattr(site.server(name), family)) for name in site.names]
    assert public == {22, 80, 443}
    # Application servers answer their load balancers alone.
    assert all(ports == {22} for ports in others)


def test_a_second_run_changes_nothing(site: Any) -> None:
    assert site.expect(*ROLE).changed == 0
    assert site.expect(*ROLE, "--check", "--diff").changed == 0


@pytest.mark.usefixtures("unchanged")
def test_rules_that_would_cut_the_connection(site: Any) -> None:
    done = site.play(*ROLE, ssh_sources=ELSEWHERE)
    assert done.code != 0
    assert "with the new rules nobody logs in from here" in done.output
    assert "ssh_sources" in done.output
    assert "The rules are those from before." in done.output


@pytest.mark.once(on="debian12")
@pytest.mark.usefixtures("unchanged")
def test_rules_that_nobody_comes_back_to_prove(site: Any, server: Any, tmp_path: Path) -> None:
    # The undo: longer than one attempt to log in takes, shorter than the proof.
    settings = {"ssh_sources": ELSEWHERE, "firewall_undo_seconds": 12}
    run = site.run(*ROLE, **settings, ansible_ssh_executable=slow_to_prove(tmp_path))
    rules = "nft list table inet hardstand_firewall"
    wait_for(lambda: ELSEWHERE[0] in server.sh(rules), 120, "the rules are there")
    assert server.ssh("true").returncode == 255
    wait_for(lambda: ELSEWHERE[0] not in server.sh(rules), 25, "they are gone by themselves")
    assert run.wait().code != 0


@pytest.mark.once(on="debian12")
@pytest.mark.usefixtures("unchanged")
def test_rules_that_somebody_has_flushed_come_back(site: Any, server: Any) -> None:
    server.sh("nft flush ruleset")
    site.expect(*ROLE)


@pytest.mark.usefixtures("unchanged")
def test_debians_own_firewall_service_does_not_open_it(server: Any) -> None:
    for verb in ("start", "reload", "restart", "stop"):
        server.sh(f"systemctl {verb} nftables")
        assert "hardstand_firewall" in server.sh("nft list tables"), verb


@pytest.mark.once(on="debian12")
@pytest.mark.usefixtures("listening")
def test_a_service_of_ones_own(site: Any, server: Any) -> None:
    service = {"name": "mine", "ports": [9999]}
    site.expect(*ROLE, firewall_extra_services=[service])
    assert answering(server.address, [9999], 1) == {9999}
    site.expect(*ROLE, firewall_extra_services=[{**service, "sources": ELSEWHERE}])
    assert answering(server.address, [9999], 1) == set()
    site.expect(*ROLE)


def test_ssh_answers_one_address_so_often_and_ansible_not_less(site: Any, server: Any) -> None:
    stranger = site.stranger(server)
    knock = f"exec 3<>/dev/tcp/{server.address}/22"
    said = stranger.sh(
        f"bash -c 'for i in $(seq 40); do timeout 0.3 bash -c \"{knock}\" 2>/dev/null && echo in || echo out; done'"
    ).split()
    # One every two seconds comes on top of the first thirty.
    assert said[:30] == ["in"] * 30
    assert said.count("out") >= 3
    assert server.ssh("true").returncode == 0


@pytest.mark.usefixtures("unchanged")
def test_a_restart_of_the_server(server: Any) -> None:
    server.kill()
    server.boot()
    wait_for(lambda: server.ssh("true").returncode == 0, 60, "the administrator logs in again")
