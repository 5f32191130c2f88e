"""The firewall's rules in the kernel. tests/test_firewall.py runs this in a network namespace, which is the server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.test_firewall import rendered

NFT = "/usr/sbin/nft"
SERVER = {4: "10.99.0.1", 6: "fd00:99::1"}
# The client's addresses: one like any other, and one that is a peer.
STRANGER = {4: "10.99.0.2", 6: "fd00:99::2"}
PEER = {4: "10.99.0.3", 6: "fd00:99:0:1::3"}

# Opens connections one after the other, and says how each went.
CLIENT = """
import json, socket, sys
source, server, port, count, wait = json.loads(sys.argv[1])
said = []
for _ in range(count):
    try:
        socket.create_connection((server, port), wait, (source, 0)).close()
        said.append("open")
    except ConnectionRefusedError:
        said.append("refused")
    except OSError:
        said.append("dropped")
print(json.dumps(said))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[str]:
    """Another host on the server's network; its process id."""
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        pid = str(process.pid)
        inside = ["nsenter", "--net", "--target", pid, "ip"]
        ip("link", "set", "lo", "up")
        ip("link", "add", "server", "type", "veth", "peer", "name", "client", "netns", pid)
        for address in (f"{SERVER[4]}/24", f"{SERVER[6]}/48"):
            ip("address", "add", address, "dev", "server", *(["nodad"] if ":" in address else []))
        ip("link", "set", "server", "up")
        for address in (f"{STRANGER[4]}/24", f"{PEER[4]}/24", f"{STRANGER[6]}/48", f"{PEER[6]}/48"):
            nodad = ["nodad"] if ":" in address else []
            subprocess.run([*inside, "address", "add", address, "dev", "client", *nodad], check=True)
        subprocess.run([*inside, "link", "set", "client", "up"], check=True)
        yield pid
        process.kill()


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Whatever is asked for is there."""
    with ExitStack() as stack:
        for port in (22, 80, 5432, 8000):
            server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=200)
            stack.enter_context(server)
        yield


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def load(*services: dict[str, Any], **settings: Any) -> None:
    subprocess.run([NFT, "-f", "-"], input=rendered(*services, **settings), text=True, check=True)


def connect(client: str, source: str, server: str, port: int, count: int = 1, wait: float = 0.3) -> list[str]:
    wanted = json.dumps([source, server, port, count, wait])
    command = ["nsenter", "--net", "--target", client, sys.executable, "-c", CLIENT, wanted]
    said: list[str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return said


SSH = {"name": "ssh", "ports": [22]}


def test_what_is_offered_is_open_and_nothing_else(client: str, family: int) -> None:
    load(
        SSH,
        {"name": "db", "ports": [5432], "sources": [PEER[4], PEER[6]]},
        {"name": "nobody", "ports": [80], "sources": [""]},
    )

    def ask(source: dict[int, str], port: int) -> str:
        return connect(client, source[family], SERVER[family], port)[0]

    assert ask(STRANGER, 22) == "open"
    assert ask(STRANGER, 8000) == "dropped"
    assert (ask(STRANGER, 5432), ask(PEER, 5432)) == ("dropped", "open")
    assert (ask(STRANGER, 80), ask(PEER, 80)) == ("dropped", "dropped")
    # What the server itself asks for, of itself and of others.
    socket.create_connection((SERVER[family], 8000), 1).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((STRANGER[family], 9), 1)
    command = ["nsenter", "--net", "--target", client, "ping", "-c", "1", "-W", "1", SERVER[family]]
    if subprocess.run(["sh", "-c", "command -v ping"], capture_output=True, check=False).returncode == 0:
        subprocess.run(command, check=True, capture_output=True)


def test_connections_that_are_there_live_on(client: str, family: int) -> None:
    subprocess.run([NFT, "delete", "table", "inet", "hardstand_firewall"], check=False, capture_output=True)
    script = (
        "import socket, sys\n"
        f"connection = socket.create_connection(({SERVER[family]!r}, 8001), 5)\n"
        "sys.stdout.write('there'); sys.stdout.flush(); sys.stdin.readline()\n"
        "connection.sendall(b'still there'); connection.close()\n"
    )
    with socket.create_server(("::", 8001), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        command = ["nsenter", "--net", "--target", client, sys.executable, "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            assert process.stdout
            assert process.stdin
            assert process.stdout.read(5) == "there"
            load(SSH)
            # The rules' own reload, with connection tracking under way: a new rule set, the same connection.
            load(SSH, {"name": "x", "ports": [8001]})
            process.stdin.write("\n")
            process.stdin.close()
            connection.settimeout(3)
            assert connection.recv(20) == b"still there"
            connection.close()


def test_one_address_gets_so_many_connections_a_minute_and_a_trusted_one_any(client: str, family: int) -> None:
    limit = 10
    load({**SSH, "connections_per_minute": limit, "trusted": [PEER[4], PEER[6]]}, {"name": "http", "ports": [80]})
    said = connect(client, STRANGER[family], SERVER[family], 22, count=limit + 3, wait=0.1)
    assert said[:limit] == ["open"] * limit
    assert said[limit + 2] == "dropped"
    assert connect(client, STRANGER[family], SERVER[family], 80, count=2) == ["open", "open"]
    assert connect(client, PEER[family], SERVER[family], 22, count=3 * limit) == ["open"] * (3 * limit)


def test_other_tables_stay(client: str) -> None:  # noqa: ARG001
    subprocess.run([NFT, "add table inet theirs"], check=True)
    load(SSH)
    load(SSH, firewall_forward_interfaces=["docker0", "br-*"], firewall_log=True)
    tables = subprocess.run([NFT, "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert tables.split("\n")[:-1] == ["table inet theirs", "table inet hardstand_firewall"]


def test_what_the_kernel_lists_is_always_the_same(client: str) -> None:
    """A run knows by that whether anything is different; what was counted since must not count."""

    def listed() -> str:
        command = [NFT, "-s", "-t", "list", "table", "inet", "hardstand_firewall"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    services = {**SSH, "connections_per_minute": 5}
    load(services)
    before = listed()
    connect(client, STRANGER[4], SERVER[4], 22, count=7, wait=0.1)
    assert listed() == before
    load(services)
    assert listed() == before
