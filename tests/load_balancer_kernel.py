"""The module load_balancer_pool and the kernel's own nftables. tests/test_load_balancer.py runs this in a namespace."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_load_balancer import load_module

NFT = "/usr/sbin/nft"


@pytest.fixture(scope="module", autouse=True)
def loopback() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.fixture(params=["127.0.0.2", "::1"])
def member(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Address and port of a server that accepts connections."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as server:
        yield request.param, server.getsockname()[1]


def call(directory: Path, state: str, member: tuple[str, int], **parameters: Any) -> dict[str, Any]:
    module = load_module("load_balancer_pool")
    module.LOCKS = directory  # type: ignore[attr-defined]
    defaults: dict[str, Any] = {
        "pool": "my-blog",
        "state": state,
        "members": [{"name": "app1", "address": member[0], "port": member[1]}],
        "hosts": ["app1"],
        "reason": "",
        "by_operator": False,
        "drain_last": True,
        "timeout": 5,
        "directory": str(directory / "pools"),
    }
    result: dict[str, Any] = module.converge(defaults | parameters, check=False)
    return result


def test_new_connections_are_refused_and_old_ones_live(tmp_path: Path, member: tuple[str, int]) -> None:
    call(tmp_path, "present", member)
    begun = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(member, 5)
    assert time.monotonic() - begun < 0.5, "refused at once, and not after a time"

    call(tmp_path, "serving", member)
    connection = socket.create_connection(member, 5)
    assert call(tmp_path, "drained", member, timeout=0.2)["remaining"] == {"app1": 1}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(member, 5)
    connection.sendall(b"still there")

    threading.Timer(0.3, connection.close).start()
    result = call(tmp_path, "drained", member)
    assert result["remaining"] == {}
    assert 0.2 < result["seconds"] < 2

    call(tmp_path, "serving", member)
    socket.create_connection(member, 5).close()


def test_another_firewall_may_come_and_go(tmp_path: Path, member: tuple[str, int]) -> None:
    subprocess.run([NFT, "add table inet theirs"], check=True)
    call(tmp_path, "present", member)
    assert "theirs" in subprocess.run([NFT, "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert not call(tmp_path, "present", member)["changed"]
    subprocess.run([NFT, "flush ruleset"], check=True)
    assert call(tmp_path, "present", member)["changed"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(member, 5)
