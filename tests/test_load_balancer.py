"""The role load_balancer: its modules with a stand-in for nft, its rules across variables, and the kernel itself.

The last in a network namespace: tests/load_balancer_kernel.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.role_templates import ROLES, evaluate, load_file

TESTS = Path(__file__).resolve().parent

# As nft does, it keeps what it was told, and lists the comments of the rules.
NFT = """#!/usr/bin/env python3
import json, pathlib, re, sys
kernel = pathlib.Path("{kernel}")
if sys.argv[1] == "-f":
    text = sys.stdin.read()
    kernel.write_text(text)
    with open("{loads}", "a") as loads:
        loads.write("loaded\\n")
elif not kernel.exists():
    sys.exit(1)
else:
    comments = re.findall('comment "(.*)"', kernel.read_text())
    print(json.dumps({{"nftables": [{{"metainfo": {{}}}}] + [{{"rule": {{"comment": c}}}} for c in comments]}}))
"""


def load_module(name: str) -> ModuleType:
    return load_file(ROLES / f"load_balancer/library/{name}.py")


class Balancer:
    """A load balancer's state and kernel, and how the module is called on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = load_module("load_balancer_pool")
        self.directory = root / "pools"
        self.kernel, self.loads = root / "kernel", root / "loads"
        self.connections = root / "tcp"
        self.connections.write_text("header\n")
        nft = root / "nft"
        nft.write_text(NFT.format(kernel=self.kernel, loads=self.loads))
        nft.chmod(0o755)
        monkeypatch.setattr(self.module, "NFT", str(nft))
        monkeypatch.setattr(self.module, "LOCKS", root)
        monkeypatch.setattr(self.module, "CONNECTIONS", (self.connections,))
        monkeypatch.setattr(self.module, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(self.module, "CONNECT_SECONDS", 0.2)
        # The members answer, unless a test says otherwise.
        monkeypatch.setattr(self.module, "answers", lambda member: member["address"] not in self.dead)
        self.dead: set[str] = set()

    def call(self, state: str, *hosts: str, check: bool = False, **parameters: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "pool": "blog",
            "state": state,
            "members": [],
            "hosts": list(hosts),
            "reason": "",
            "by_operator": False,
            "drain_last": False,
            "timeout": 0.05,
            "directory": str(self.directory),
        }
        result: dict[str, Any] = self.module.converge(defaults | parameters, check=check)
        return result

    def have(self, **addresses: str) -> dict[str, Any]:
        members = [{"name": name, "address": address, "port": 8443} for name, address in addresses.items()]
        return self.call("present", members=members)

    def refused(self) -> set[str]:
        """Return what the kernel refuses connections to."""
        return set(re.findall(r'comment "(\S+) ', self.kernel.read_text()))


@pytest.fixture
def balancer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Balancer:
    return Balancer(tmp_path, monkeypatch)


@pytest.fixture
def serving(balancer: Balancer) -> Balancer:
    balancer.have(app1="10.0.0.1", app2="10.0.0.2", app3="fd00::3")
    balancer.call("serving", "app1", "app2", "app3")
    return balancer


def test_a_new_member_gets_no_requests_until_it_is_let(balancer: Balancer) -> None:
    first = balancer.have(app1="10.0.0.1", app2="fd00::2")
    assert first["changed"]
    assert first["servers"] == ["10.0.0.1:8443", "[fd00::2]:8443"]
    assert {member["reason"] for member in first["members"].values()} == {"new"}
    assert balancer.refused() == {"10.0.0.1:8443", "[fd00::2]:8443"}
    assert not balancer.have(app1="10.0.0.1", app2="fd00::2")["changed"]
    assert balancer.call("serving", "app1")["acted"] == ["app1"]
    assert balancer.refused() == {"[fd00::2]:8443"}
    assert not balancer.call("serving", "app1")["changed"]


def test_provisioning_again_keeps_who_serves(serving: Balancer) -> None:
    serving.call("drained", "app2", reason="operator: disk")
    serving.have(app1="10.0.0.1", app2="10.0.0.2", app3="fd00::3", app4="10.0.0.4")
    assert serving.refused() == {"10.0.0.2:8443", "10.0.0.4:8443"}


def test_an_address_that_is_not_known_just_now_stays_what_it_was(serving: Balancer) -> None:
    result = serving.have(app1="", app2="10.0.0.2", app3="fd00::3", app9="")
    assert not result["changed"]
    assert result["servers"][0] == "10.0.0.1:8443"
    assert result["unknown"] == ["app9"]


def test_a_member_that_leaves_stays_refused_until_nginx_has_been_told(serving: Balancer) -> None:
    serving.call("drained", "app2", reason="operator")
    result = serving.have(app1="10.0.0.1", app3="fd00::3")
    assert result["acted"] == ["app2"]
    assert serving.refused() == {"10.0.0.2:8443"}
    assert "10.0.0.2" not in (serving.directory / "blog.nft").read_text()
    # Whoever gets its address serves.
    serving.have(app1="10.0.0.1", app3="fd00::3", app5="10.0.0.2")
    serving.call("serving", "app5")
    assert serving.refused() == set()


def test_an_operator_outlasts_deploys(serving: Balancer) -> None:
    serving.call("drained", "app1", reason="left out")
    serving.call("drained", "app1", reason="operator: disk")
    serving.call("drained", "app1", reason="left out")
    assert serving.call("serving", "app1")["members"]["app1"]["reason"] == "operator: disk"
    assert serving.call("serving", "app1", by_operator=True)["acted"] == ["app1"]


def test_somebody_always_serves(serving: Balancer) -> None:
    serving.call("drained", "app1", "app2")
    with pytest.raises(serving.module.PoolError, match="app3 cannot be drained: nobody else serves"):
        serving.call("drained", "app3", check=True)
    serving.call("drained", "app3", drain_last=True)
    assert len(serving.refused()) == 3


def test_a_member_that_does_not_answer_does_not_count_as_serving(serving: Balancer) -> None:
    serving.call("drained", "app3")
    serving.dead = {"10.0.0.2"}
    with pytest.raises(serving.module.PoolError, match="app2 would have to serve, and does not answer"):
        serving.call("drained", "app1")
    # The dead one itself can be drained, and one that is drained already can be named again.
    serving.call("drained", "app2", "app3")


def test_what_the_kernel_has_lost_is_told_again(serving: Balancer) -> None:
    serving.call("drained", "app1")
    serving.kernel.unlink()
    assert serving.call("drained", "app1")["changed"]
    assert serving.refused() == {"10.0.0.1:8443"}
    assert not serving.call("drained", "app1")["changed"]


def test_rules_that_are_written_another_way_are_told_again(serving: Balancer) -> None:
    """As after an update of Hardstand: the members are the same, and what refuses them is not."""
    serving.call("drained", "app1")
    loads = serving.loads.read_text()
    (serving.directory / "blog.nft").write_text("older\n")
    assert serving.call("drained", "app1")["changed"]
    assert serving.loads.read_text() == loads + "loaded\n"


def test_check_mode_and_a_query_change_nothing(serving: Balancer) -> None:
    before = {path: path.read_text() for path in serving.directory.iterdir()}
    assert serving.call("drained", "app1", check=True)["changed"]
    assert serving.call("present", check=True, members=[{"name": "a", "address": "10.0.0.9", "port": 1}])["changed"]
    assert not serving.call("queried")["changed"]
    assert {path: path.read_text() for path in serving.directory.iterdir()} == before


def test_check_mode_needs_no_nftables(balancer: Balancer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer.module, "NFT", "/nowhere/nft")
    result = balancer.call("present", check=True, members=[{"name": "a", "address": "10.0.0.9", "port": 8443}])
    assert result["changed"]
    assert not balancer.directory.exists()
    with pytest.raises(balancer.module.PoolError, match="nftables"):
        balancer.have(app1="10.0.0.1")


def test_names_that_are_no_members_are_passed_over(serving: Balancer) -> None:
    result = serving.call("drained", "app7")
    assert result["unknown"] == ["app7"]
    assert not result["changed"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("app1", "app1.example.org")], "internal_address"),
        ([('a"b', "10.0.0.1")], "cannot be used"),
        ([("app1", "10.0.0.1"), ("app2", "10.0.0.1")], "app2 and app1 are both at 10.0.0.1:8443"),
    ],
)
def test_members_that_cannot_be_are_refused(balancer: Balancer, members: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(balancer.module.PoolError, match=message):
        balancer.call("present", members=[{"name": n, "address": a, "port": 8443} for n, a in members])


def test_two_pools_do_not_share_a_port_of_a_server(serving: Balancer) -> None:
    member = {"name": "app1", "address": "10.0.0.1", "port": 8443}
    with pytest.raises(serving.module.PoolError, match="nginx_peer_port"):
        serving.call("present", pool="shop", members=[member])
    serving.call("present", pool="shop", members=[member | {"port": 8444}])


def test_a_damaged_state_is_named(serving: Balancer) -> None:
    (serving.directory / "blog.json").write_text("{")
    with pytest.raises(serving.module.PoolError, match=r"blog\.json is damaged"):
        serving.call("queried")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        # As /proc/net/tcp and tcp6 of a little-endian machine have it.
        ("10.0.0.1", "0100000A:20FB"),
        ("fd00::3", "000000FD000000000000000003000000:20FB"),
    ],
)
def test_waiting_counts_open_connections_to_the_drained(serving: Balancer, address: str, shown: str) -> None:
    name = {"10.0.0.1": "app1", "fd00::3": "app3"}[address]
    lines = [f"{n}: 0B0000:C000 {shown} {state} 0 0" for n, state in enumerate(["01", "02", "06", "08", "0A"])]
    serving.connections.write_text("\n".join(["header", *lines, ""]))
    assert serving.call("drained", name)["remaining"] == {name: 3}
    serving.connections.write_text("header\n")
    assert serving.call("drained", name)["remaining"] == {}


def test_a_comment_stays_within_what_nft_takes(balancer: Balancer) -> None:
    balancer.have(**{"a" * 300: "10.0.0.1"})
    (comment,) = re.findall('comment "(.*)"', balancer.kernel.read_text())
    assert len(comment) <= 127
    assert not balancer.have(**{"a" * 300: "10.0.0.1"})["changed"]


def test_the_kernel_does_what_the_rules_say() -> None:
    """Drained members refuse connections at once, and keep those that they have."""
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--user", "--map-root-user"]
    command = [*namespace, "--", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "load_balancer_kernel.py"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# What an application server says of itself -----------------------------------------------------------------------


@pytest.fixture
def application(tmp_path: Path) -> Iterator[tuple[ModuleType, dict[str, Any]]]:
    """A server that is healthy at /health and not at /sick, over HTTPS."""
    key, certificate = tmp_path / "key", tmp_path / "crt"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=blog.internal", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.path == "/health" and self.headers["Host"] == "blog.example.org"
            self.send_response(200 if good else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    record = {"release": "abc-1", "health_path": "/health", "host_header": "blog.example.org"}
    (tmp_path / "current").mkdir()
    (tmp_path / "current/release.json").write_text(json.dumps(record))
    parameters = {"directory": str(tmp_path), "port": server.server_port, "server_name": "blog.internal", "timeout": 5}
    yield load_module("load_balancer_member"), parameters
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_healthy_server_says_so(application: tuple[ModuleType, dict[str, Any]]) -> None:
    module, parameters = application
    assert module.ask(parameters) == {
        "changed": False,
        "release": "abc-1",
        "healthy": True,
        "detail": "/health answers 200",
    }


def test_a_sick_an_absent_and_an_empty_server_are_not_healthy(
    application: tuple[ModuleType, dict[str, Any]], tmp_path: Path
) -> None:
    module, parameters = application
    record = {"release": "abc-1", "health_path": "/sick", "host_header": "blog.example.org"}
    (tmp_path / "current/release.json").write_text(json.dumps(record))
    assert module.ask(parameters)["detail"] == "/sick answers 503"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    answer = module.ask(parameters | {"port": port})
    assert not answer["healthy"]
    assert "does not answer" in answer["detail"]
    (tmp_path / "current/release.json").unlink()
    assert "no release is live" in module.ask(parameters)["detail"]


# Rules across variables --------------------------------------------------------------------------------------------


def unfit(hosts: list[str], answers: dict[str, dict[str, Any]], drained: list[str]) -> list[str]:
    """Return why `hosts` must not get requests, given what the servers said and which are drained."""
    problems: list[str] = evaluate(
        "load_balancer",
        "_load_balancer_unfit",
        load_balancer_hosts=hosts,
        __load_balancer_pool={"members": {name: {"drained": name in drained} for name in ("app1", "app2", "app3")}},
        hostvars={name: {"__load_balancer_member": answer} for name, answer in answers.items()},
    )
    return problems


HEALTHY = {"healthy": True, "release": "new", "detail": "/health answers 200"}


def test_a_server_resumes_that_is_healthy_and_runs_what_the_others_run() -> None:
    assert unfit(["app1"], {"app1": HEALTHY, "app2": HEALTHY, "app3": HEALTHY}, ["app1"]) == []
    # What a drained one runs does not matter, nor what nobody can be asked for.
    assert unfit(["app1"], {"app1": HEALTHY, "app2": HEALTHY | {"release": "old"}}, ["app1", "app2"]) == []


def test_a_server_does_not_resume_that_is_sick_silent_or_on_another_release() -> None:
    others = {"app2": HEALTHY, "app3": HEALTHY}
    sick = {"healthy": False, "release": "new", "detail": "/health answers 503"}
    (problem,) = unfit(["app1"], others | {"app1": sick}, ["app1"])
    assert problem == "app1 is not healthy: /health answers 503."
    (problem,) = unfit(["app1"], others, ["app1"])
    assert "cannot be reached" in problem
    (problem,) = unfit(["app1"], others | {"app1": HEALTHY | {"release": "old"}}, ["app1"])
    assert "app1 runs release old, and the members that serve run new" in problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_balancer_present": False, "load_balancer_hosts": ["app1"]}, "no server in group lb"),
        ({"load_balancer_hosts": []}, "-e drain_host=NAME, one of app1, app2"),
        ({"load_balancer_hosts": ["app7"]}, "app7 is no application server"),
        ({"load_balancer_hosts": ["app1"]}, ""),
    ],
)
def test_a_request_that_cannot_be_met_is_explained(settings: dict[str, Any], message: str) -> None:
    problem = evaluate(
        "load_balancer",
        "_load_balancer_request_problem",
        load_balancer_members=[{"name": "app1"}, {"name": "app2"}],
        load_balancer_request="drain_host",
        **settings,
    )
    assert message in problem
    assert bool(problem) == bool(message)
