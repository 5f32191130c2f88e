"""The firewall: its rules as they are rendered, in a kernel, and the way back from them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.role_templates import ROLES, evaluate, load_file
from tests.test_wiring import wired

TESTS = Path(__file__).resolve().parent


def rendered(*services: dict[str, Any], **settings: Any) -> str:
    """Return the input for nft for these services."""
    text: str = evaluate(
        "firewall",
        "lookup('ansible.builtin.template', 'templates/firewall.nft.j2')",
        ansible_managed="managed",
        firewall_services=list(services),
        **settings,
    )
    return text


def problems(*services: dict[str, Any], **settings: Any) -> list[str]:
    """Return what is wrong with settings."""
    found: list[str] = evaluate("firewall", "_firewall_problems", firewall_services=list(services), **settings)
    return found


SSH = {"name": "ssh", "ports": [22]}


class TestRules:
    def test_a_service_without_sources_is_for_everybody(self) -> None:
        assert 'tcp dport { 22 } accept comment "ssh"' in rendered(SSH)

    def test_sources_are_told_apart_by_family(self) -> None:
        rules = rendered({**SSH, "sources": ["10.0.0.0/8", "fd00::/8", "10.1.1.1", "10.1.1.1"]})
        assert "\n        ip saddr 10.0.0.0/8 tcp dport { 22 } accept" in rules
        assert "\n        ip6 saddr fd00::/8 tcp dport { 22 } accept" in rules
        assert rules.count("10.1.1.1") == 1
        assert "\n        tcp dport { 22 } accept" not in rules

    def test_an_address_that_is_not_known_lets_nobody_in(self) -> None:
        rules = rendered(SSH, {"name": "db", "ports": [5432], "sources": [""]})
        assert "5432" not in rules

    def test_nothing_is_forwarded_unless_interfaces_are_named(self) -> None:
        assert "iifname" not in rendered(SSH)
        rules = rendered(SSH, firewall_forward_interfaces=["docker0", "br-*"])
        assert 'iifname "br-*" accept' in rules
        assert 'oifname "docker0" ct status dnat accept' in rules

    def test_only_its_own_table_is_replaced(self) -> None:
        rules = rendered(SSH)
        assert "flush" not in rules
        assert rules.count("delete table") == 1


class TestSettings:
    def test_good_ones_pass(self) -> None:
        sources = ["10.0.0.1", "10.0.0.0/8", "fd00::1", "2001:db8::/32", "::1", "fe80::1:2/64", "::ffff:10.0.0.1"]
        assert problems({**SSH, "sources": sources, "trusted": sources}, firewall_forward_interfaces=["br-*"]) == []

    @pytest.mark.parametrize(
        "address", ["office.example.org", "10.0.0", "10.0.0.0/33", "0.0.0.0/", "db1", "10.0.0.1 }"]
    )
    def test_a_source_that_is_no_address_is_refused(self, address: str) -> None:
        """nft would ask the DNS for it, at boot before there is a network."""
        (problem,) = problems({**SSH, "sources": [address]})
        assert problem == f'ssh: "{address}" is no address and no network.'

    def test_services_have_names_and_ports_of_their_own(self) -> None:
        assert problems({"name": "My Service", "ports": [80]})
        assert problems({"name": "x", "ports": [0, 65536, 80]}) == ["x: 0 is no port.", "x: 65536 is no port."]
        twice = problems(SSH, firewall_extra_services=[SSH])
        assert twice == ["ssh: there are two services of this name."]
        assert problems(firewall_forward_interfaces=['eth0" accept'])


class TestWiring:
    """Which server offers what to whom; addresses are 10.0.0.<n>, in the order in which servers are first named."""

    FLEET = {"app": ["app1", "app2"], "lb": ["lb1"], "db": ["db1"], "backup": ["b1"], "control": ["c1"]}  # noqa: RUF012

    def services(self, here: str, groups: dict[str, list[str]] = FLEET, **variables: Any) -> dict[str, Any]:
        found: list[dict[str, Any]] = wired("firewall_services", groups, here, **variables)
        return {service.pop("name"): service for service in found}

    def test_a_single_server_offers_ssh_and_http(self) -> None:
        services = self.services("app1", {"app": ["app1"]})
        assert services.keys() == {"ssh", "http"}
        assert services["http"] == {"ports": [80, 443]}
        assert services["ssh"] == {"ports": [22], "sources": [], "connections_per_minute": 30, "trusted": []}

    @pytest.mark.parametrize(
        ("distribution", "release", "offered"),
        [("Debian", "12", False), ("Debian", "13", True), ("Ubuntu", "24", False)],
    )
    def test_http3_where_nginx_has_it(self, distribution: str, release: str, offered: bool) -> None:
        facts = {"distribution": distribution, "distribution_major_version": release}
        services = self.services("app1", {"app": ["app1"]}, nginx_http3=True, ansible_facts=facts)
        assert services.get("http3") == ({"ports": [443], "protocol": "udp"} if offered else None)
        # The same decision as role nginx's, which says it again.
        assert evaluate("nginx", "_nginx_is_modern", ansible_facts=facts) is offered

    def test_servers_of_a_fleet_offer_only_what_their_peers_need(self) -> None:
        assert self.services("lb1").keys() == {"ssh", "http"}
        app = self.services("app1")
        assert app.keys() == {"ssh", "http-peer"}
        assert app["http-peer"] == {"ports": [8443], "sources": ["10.0.0.3"]}
        db = self.services("db1")
        assert db.keys() == {"ssh", "postgresql", "pgbackrest"}
        assert db["postgresql"] == {"ports": [5432], "sources": ["10.0.0.1", "10.0.0.2"]}
        assert db["pgbackrest"] == {"ports": [8432], "sources": ["10.0.0.5"]}
        backup = self.services("b1")
        assert backup.keys() == {"ssh", "pgbackrest"}
        assert backup["pgbackrest"]["sources"] == ["10.0.0.4"]

    def test_a_server_that_is_several_offers_all_of_it(self) -> None:
        groups = {"app": ["one"], "db": ["one"], "backup": ["one"]}
        assert self.services("one", groups).keys() == {"ssh", "http", "postgresql"}

    def test_a_server_nobody_could_ask_for_its_address_is_let_in_nowhere(self) -> None:
        services = self.services("db1", own={"app2": {"ansible_facts": {}}})
        assert services["postgresql"]["sources"] == ["10.0.0.1", ""]

    def test_whoever_deploys_reaches_ssh(self) -> None:
        ssh = self.services("app1", ssh_sources=["192.0.2.0/24"], ssh_trusted_sources=["192.0.2.7"])["ssh"]
        assert ssh["sources"] == ["192.0.2.0/24", "10.0.0.6"]
        assert ssh["trusted"] == ["192.0.2.7", "10.0.0.6"]

    def test_ssh_is_where_ansible_finds_it_unless_told_otherwise(self) -> None:
        assert self.services("app1", ansible_port=2222)["ssh"]["ports"] == [2222]
        assert self.services("app1", ansible_port=2222, ssh_port=22)["ssh"]["ports"] == [22]


def test_the_kernel_does_what_the_rules_say() -> None:
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--user", "--map-root-user"]
    command = [*namespace, "--", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "firewall_kernel.py"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The module ----------------------------------------------------------------------------------------------------------


def load(path: str) -> ModuleType:
    """Import a file of a role by its path."""
    return load_file(ROLES / path)


class Kernel:
    """The module with a kernel and a systemd that only remember."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = load("firewall/library/firewall_rules.py")
        self.undo_timer: Any = importlib.import_module("ansible.module_utils.undo_timer")
        self.rules, self.state = root / "etc/firewall.nft", root / "state"
        self.rules.parent.mkdir()
        self.table, self.timer, self.refuses = "", "", ""
        self.seen: list[str] = []
        nft = root / "nft"
        nft.touch()
        for name, value in {
            "RULES": self.rules,
            "STATE": self.state,
            "UNIT_FILE": root / "unit",
            "DROP_IN": root / "drop-in",
            "NFT": str(nft),
            "LEARN_SECONDS": 0,
            "run": self.run,
            "TIMER": self.undo_timer.UndoTimer("undo", self.state / "undo", "firewall_undo_seconds"),
        }.items():
            monkeypatch.setattr(self.module, name, value)
        monkeypatch.setattr(self.undo_timer, "run", self.run)

    def run(self, *command: Any, stdin: str = "", check: bool = True) -> Any:
        words = [str(word) for word in command]
        code, out = 0, ""
        if words[0] == self.module.NFT:
            if words[1] == "list":
                code, out = 0, "tables"
            elif words[1:3] == ["-s", "-t"]:
                code, out = (0, self.table) if self.table else (1, "")
            elif words[1] == "-c":
                code = 1 if "syntax" in stdin else 0
            elif words[1] == "-f":
                text = stdin if words[2] == "-" else Path(words[2]).read_text()
                code = 1 if self.refuses and self.refuses in text else 0
                if code == 0:
                    self.table = text
                    self.seen.append(text)
            elif words[1] == "delete":
                self.table = ""
        elif words[0] == self.undo_timer.SYSTEMD_RUN:
            self.timer = words[-1]
        elif words[0] == self.module.SYSTEMCTL and words[1] == "stop":
            self.timer = ""
        elif words[0] == "/bin/sh":
            self.goes_off(words[1])
        if check and code:
            raise self.module.ChangeError("nft: refused")
        return SimpleNamespace(returncode=code, stdout=out, stderr="")

    def goes_off(self, script: str | Path = "") -> None:
        """Run the way back, as the timer does."""
        lines = Path(script or self.timer).read_text().splitlines()
        back = lines[2].split()
        self.run(*back)
        for name in lines[3].split()[2:]:
            Path(name).unlink(missing_ok=True)

    def apply(self, rules: str, check: bool = False) -> dict[str, Any]:
        result: dict[str, Any] = self.module.apply(rules, 60, check)
        return result


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


class TestModule:
    def test_rules_are_for_the_next_boot_only_when_they_are_kept(self, kernel: Kernel) -> None:
        assert kernel.apply("rules 1")["armed"]
        assert kernel.table == "rules 1"
        assert kernel.timer
        assert not kernel.rules.exists()
        kernel.module.keep()
        assert not kernel.timer
        assert kernel.rules.read_text() == "rules 1"
        assert kernel.apply("rules 1")["changed"] is False

    def test_the_timer_goes_back_to_none_and_then_to_what_was_proven(self, kernel: Kernel) -> None:
        kernel.apply("rules 1")
        kernel.goes_off()
        assert kernel.table == ""
        with pytest.raises(kernel.module.ChangeError, match="took too long"):
            kernel.module.keep()
        kernel.apply("rules 1")
        kernel.module.keep()
        kernel.apply("rules 2")
        assert kernel.table == "rules 2"
        kernel.goes_off()
        assert kernel.table == "rules 1"
        assert kernel.apply("rules 1")["changed"] is False

    def test_undoing_is_the_same_at_once(self, kernel: Kernel) -> None:
        kernel.apply("rules 1")
        kernel.module.keep()
        kernel.apply("rules 2")
        kernel.module.TIMER.undo()
        assert (kernel.table, kernel.timer) == ("rules 1", "")
        kernel.module.TIMER.undo()

    def test_rules_that_nft_refuses_change_nothing(self, kernel: Kernel) -> None:
        with pytest.raises(kernel.module.ChangeError):
            kernel.apply("syntax error")
        kernel.refuses = "not here"
        with pytest.raises(kernel.module.ChangeError):
            kernel.apply("not here")
        assert (kernel.table, kernel.timer) == ("", "")

    def test_what_a_run_left_that_was_cut_off_is_proven_by_the_next(self, kernel: Kernel) -> None:
        kernel.apply("rules 1")
        assert kernel.apply("rules 1")["armed"]
        kernel.module.keep()
        kernel.apply("rules 2")
        assert kernel.apply("rules 1")["armed"]

    def test_the_kernel_learns_of_connections_before_it_drops(self, kernel: Kernel) -> None:
        kernel.apply("rules 1")
        assert kernel.seen == [kernel.module.LEARN, "rules 1"]
        kernel.module.keep()
        kernel.seen.clear()
        kernel.apply("rules 2")
        assert kernel.seen == ["rules 2"]

    def test_what_the_kernel_has_lost_is_told_again(self, kernel: Kernel) -> None:
        kernel.apply("rules 1")
        kernel.module.keep()
        kernel.table = ""
        assert kernel.apply("rules 1")["armed"]

    def test_a_dry_run_tells_and_does_nothing(self, kernel: Kernel) -> None:
        result = kernel.apply("rules 1", check=True)
        assert result["changed"]
        assert result["diff"]["after"] == "rules 1"
        assert (kernel.table, kernel.timer) == ("", "")

    def test_it_can_be_taken_away(self, kernel: Kernel) -> None:
        assert not kernel.module.remove(False)
        kernel.apply("rules 1")
        kernel.module.keep()
        assert kernel.module.remove(True)
        assert kernel.table
        assert kernel.module.remove(False)
        assert (kernel.table, kernel.rules.exists()) == ("", False)
        assert not kernel.module.remove(False)
