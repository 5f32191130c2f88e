"""Who gets in: the settings, what is written, the way back, and the login that decides between the two."""

from __future__ import annotations

import importlib
import pwd
import shlex
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleConnectionFailure, AnsibleError

from tests.role_templates import ROLES, evaluate, load_file
from tests.test_wiring import wired

PROJECT = ROLES.parent
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJtq0mVQyXbK3l1m8mE0aF1mC2m0tqk0S5V2xkO6l8Qx ada@laptop"
ADA = {"name": "ada", "keys": [KEY]}


def load(path: str) -> ModuleType:
    """Import a file of a role by its path."""
    return load_file(ROLES / path)


# The settings ---------------------------------------------------------------------------------------------------------


def problems(*admins: dict[str, Any], **settings: Any) -> list[str]:
    """Return what is wrong with settings."""
    found: list[str] = evaluate("ssh", "_ssh_problems", ssh_admins=list(admins), **settings)
    return found


class TestSettings:
    def test_good_ones_pass(self, tmp_path: Path) -> None:
        keys = [KEY]
        for kind, *bits in (["rsa", "-b", "3072"], ["ecdsa"], ["ed25519"]):
            command = ["ssh-keygen", "-q", "-t", kind, *bits, "-N", "", "-C", "", "-f", str(tmp_path / kind)]
            subprocess.run(command, check=True)
            keys.append((tmp_path / f"{kind}.pub").read_text())
        assert problems({"name": "ada", "keys": keys, "sudo": "password"}, {"name": "b_2-c", "keys": [KEY]}) == []

    def test_an_rsa_key_that_sshd_would_refuse_is_refused(self, tmp_path: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(tmp_path / "key")]
        subprocess.run(command, check=True)
        (problem,) = problems({"name": "ada", "keys": [(tmp_path / "key.pub").read_text()]})
        assert problem.startswith("ssh_admins: the RSA key of ada is shorter than 3072 bits")

    @pytest.mark.parametrize(
        "key", ["", "AAAAC3Nz", "-----BEGIN OPENSSH PRIVATE KEY-----", f"{KEY}\n{KEY}", "ssh-dss AAAA", "~/.ssh/id.pub"]
    )
    def test_what_is_no_key_is_refused(self, key: str) -> None:
        (problem,) = problems({"name": "ada", "keys": [key]})
        assert "of ada is no public key" in problem

    def test_names_are_names_of_people(self) -> None:
        for name in ("root", "www-data", "Ada", "ada lovelace", "ada ALL=(ALL) ALL", "-ada", ""):
            assert problems({"name": name, "keys": [KEY]}), name
        assert problems(ADA, ADA) == ["ssh_admins names an account twice."]
        assert problems({"name": "ada", "keys": []}) == ["ssh_admins: ada has no keys, and could not log in."]

    def test_whoever_ansible_logs_in_as_is_one_of_them(self) -> None:
        assert problems(ADA, ssh_operator="ada") == []
        (problem,) = problems(ADA, ssh_operator="root")
        assert problem.startswith('Ansible logs in as "root", who is not among ssh_admins (ada)')


def rendered(template: str, **settings: Any) -> str:
    known: dict[str, Any] = {
        "ansible_managed": "managed",
        "ssh_admins": [ADA],
        "ansible_facts": {"distribution": "Debian", "distribution_major_version": "13"},
    }
    lookup = f"lookup('ansible.builtin.template', 'templates/{template}')"
    text: str = evaluate("ssh", lookup, **(known | settings))
    return text


class TestFiles:
    def option(self, name: str, **settings: Any) -> str:
        (value,) = [
            line.partition(" ")[2]
            for line in rendered("00-hardstand.conf.j2", **settings).splitlines()
            if line.startswith(f"{name} ")
        ]
        return value

    def test_only_those_who_are_named_get_in(self) -> None:
        users = self.option("AllowUsers", ssh_allowed_users=["ci"], ssh_service_users=["deploy", "ada"])
        assert users == "ada ci deploy"
        assert self.option("PermitRootLogin") == "no"
        assert self.option("AuthenticationMethods") == "publickey"

    def test_debian_13_exchanges_keys_as_quantum_computers_do_not_break(self) -> None:
        assert "mlkem768x25519-sha256" in self.option("KexAlgorithms")
        assert "curve25519" not in self.option("KexAlgorithms")
        twelve = {"distribution": "Debian", "distribution_major_version": "12"}
        assert "curve25519-sha256" in self.option("KexAlgorithms", ansible_facts=twelve).split(",")
        assert "mlkem" not in self.option("KexAlgorithms", ansible_facts=twelve)

    def test_addresses_to_trust_are_exempt_where_sshd_knows_penalties(self) -> None:
        trusted = {"ssh_trusted_sources": ["192.0.2.0/24", "fd00::1"]}
        assert self.option("PerSourcePenaltyExemptList", **trusted) == "192.0.2.0/24,fd00::1"
        twelve = {"distribution": "Debian", "distribution_major_version": "12"}
        assert "Penalt" not in rendered("00-hardstand.conf.j2", ansible_facts=twelve, **trusted)

    @pytest.mark.parametrize(
        ("arguments", "forwarding"),
        [
            ("", "no"),
            ("-o ProxyJump=ada@203.0.113.9", "local"),
            ("-J ada@gate:2222", "local"),
            ("-o ProxyCommand='ssh -W %h:%p gate'", "local"),
            ("-o ProxyJump=ada@203.0.113.99", "no"),
            ("-o ProxyJump=gate2", "no"),
            ("-o UserKnownHostsFile=/home/gate/known_hosts", "no"),
        ],
    )
    def test_a_server_that_others_are_reached_through_forwards(self, arguments: str, forwarding: str) -> None:
        own = {"ssh_own_names": ["gate", "203.0.113.9", ""], "ssh_fleet_arguments": ["", arguments]}
        assert self.option("AllowTcpForwarding", **own) == forwarding
        assert self.option("AllowTcpForwarding", ssh_forwarding=True) == "local"

    def test_sudo_asks_whom_it_is_to_ask(self, tmp_path: Path) -> None:
        text = rendered("hardstand.j2", ssh_admins=[ADA, {"name": "eve", "keys": [KEY], "sudo": "password"}])
        assert "ada ALL=(ALL:ALL) NOPASSWD: ALL\neve ALL=(ALL:ALL) ALL\n" in text
        if Path("/usr/sbin/visudo").exists():
            (tmp_path / "sudoers").write_text(text)
            subprocess.run(["/usr/sbin/visudo", "-cqf", tmp_path / "sudoers"], check=True)


class TestWiring:
    GROUPS = {"app": ["app1"], "db": ["db1"], "control": ["c1", "db1"]}  # noqa: RUF012

    def test_the_operator_is_who_the_inventory_says_also_while_root_logs_in(self) -> None:
        assert wired("ssh_operator", self.GROUPS, ansible_user="ada") == "ada"
        login = {"user": "ada", "fallback": True}
        assert wired("ssh_operator", self.GROUPS, ansible_user="root", __preflight_login=login) == "ada"
        assert wired("ssh_operator", self.GROUPS, ansible_user="ada", __preflight_login={"skipped": True}) == "ada"
        assert wired("ssh_operator", self.GROUPS) == ""

    def test_who_pushes_gets_in_where_pushes_are_taken(self) -> None:
        assert wired("ssh_service_users", self.GROUPS, "app1") == []
        assert wired("ssh_service_users", self.GROUPS, "db1") == ["deploy"]

    def test_administrators_are_looked_for_only_where_there_are_to_be_any(self) -> None:
        assert wired("preflight_admins", self.GROUPS, "app1") == []
        assert wired("preflight_admins", self.GROUPS, "app1", ssh_admins=[ADA]) == ["ada"]
        assert wired("preflight_admins", self.GROUPS, "c1", ssh_admins=[ADA]) == ["ada"]
        assert wired("preflight_admins", self.GROUPS, "elsewhere", ssh_admins=[ADA]) == []

    def test_a_jump_host_is_known_from_how_the_others_are_reached(self) -> None:
        own = {"db1": {"ansible_ssh_common_args": "-J ada@app1"}}
        assert wired("ssh_fleet_arguments", self.GROUPS, "app1", own=own) == ["-J ada@app1 "]
        assert wired("ssh_own_names", self.GROUPS, "app1", ansible_host="203.0.113.9") == [
            "app1",
            "203.0.113.9",
            "10.0.0.1",
        ]


# The module ----------------------------------------------------------------------------------------------------------


class Host:
    """The module on a server that is a directory; commands that change a system only remember that they ran."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = load("ssh/library/ssh_access.py")
        undo_timer: Any = importlib.import_module("ansible.module_utils.undo_timer")
        self.ssh, self.sudoers = root / "ssh", root / "sudoers.d/hardstand"
        (self.ssh / "sshd_config.d").mkdir(parents=True)
        self.sudoers.parent.mkdir()
        self.accounts = {"debian"}
        self.commands: list[list[str]] = []
        self.fails = ""
        systemctl = root / "systemctl"
        systemctl.write_text("#!/bin/sh\n")
        systemctl.chmod(0o755)
        self.undo = root / "state/undo"
        for name, value in {
            "SSH": self.ssh,
            "SUDOERS": self.sudoers,
            "UNDO": self.undo,
            "SYSTEMCTL": str(systemctl),
            "run": self.run,
            "TIMER": undo_timer.UndoTimer("hardstand-ssh-undo", self.undo / "undo", "ssh_undo_seconds"),
            "known_algorithms": lambda option: {"new", "old"} | {option},
        }.items():
            monkeypatch.setattr(self.module, name, value)
        monkeypatch.setattr(undo_timer, "run", self.run)
        monkeypatch.setattr(self.module.pwd, "getpwnam", self.account)
        # Not root's, where a developer runs the tests.
        monkeypatch.setattr(self.module.Access, "_is", staticmethod(self.same))
        (self.ssh / "moduli").write_text("# a comment\n1 2 6 100 2047 5 AA\n1 2 6 100 3071 2 BB\n1 2 6 100 4095 2 CC\n")

    @staticmethod
    def same(path: Path, content: str, mode: int) -> bool:
        return path.is_file() and path.read_text() == content and path.stat().st_mode & 0o7777 == mode

    def account(self, name: str) -> pwd.struct_passwd:
        if name not in self.accounts:
            raise KeyError(name)
        shell = "/usr/sbin/nologin" if name == "backup" else "/bin/bash"
        return pwd.struct_passwd((name, "*", 1000, 1000, "", f"/home/{name}", shell))

    def run(self, *command: Any, check: bool = True) -> Any:
        words = [str(word) for word in command]
        self.commands.append(words)
        if self.fails and self.fails in " ".join(words):
            if check:
                raise self.module.ChangeError(f"{words[0]} says no")
            return SimpleNamespace(returncode=1, stdout="", stderr="/etc/sudoers.d/site:1:3: syntax error")
        if words[0] == "/bin/sh":
            subprocess.run(words, check=True)
        elif words[0].endswith("useradd"):
            self.accounts.add(words[-1])
        elif words[0].endswith("ssh-keygen"):
            for name in (words[-1], f"{words[-1]}.pub"):
                Path(name).write_text("key\n")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def files(self) -> dict[str, str]:
        """Return every file by its path below the server's root."""
        root = self.ssh.parent
        found = [*self.ssh.rglob("*"), *self.sudoers.parent.rglob("*")]
        return {str(path.relative_to(root)): path.read_text() for path in found if path.is_file()}

    def apply(self, *admins: dict[str, Any], check: bool = False, config: str = "AllowUsers ada\n") -> dict[str, Any]:
        parameters = {"admins": list(admins), "sshd_config": config, "sudoers": "rules\n", "undo_seconds": 60}
        result: dict[str, Any] = self.module.Access(parameters).apply(check)
        return result

    def armed(self) -> bool:
        return any("systemd-run" in words[0] for words in self.commands)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


class TestModule:
    def test_all_is_there_and_stays_as_it_is(self, host: Host) -> None:
        result = host.apply(ADA)
        assert result["armed"]
        assert result["created"] == ["ada"]
        assert host.files()["ssh/hardstand/keys/ada"].splitlines()[1:] == [KEY]
        assert host.files()["ssh/hardstand/moduli"].split()[4::7] == ["3071", "4095"]
        host.module.keep()
        assert not host.undo.exists()
        again = host.apply(ADA)
        assert (again["changed"], again["armed"]) == (False, False)

    def test_the_timer_is_armed_before_anything_changes_and_sshd_reloads_last(self, host: Host) -> None:
        host.apply(ADA)
        names = [Path(words[0]).name for words in host.commands if words[-1] != "hardstand-ssh-undo.service"]
        assert names.index("systemd-run") < names.index("useradd") < names.index("ssh-keygen")
        assert names[-3:] == ["visudo", "sshd", "systemctl"]
        assert host.commands[-1][1:] == ["try-reload-or-restart", "ssh.service"]

    def test_undoing_brings_back_every_file_and_takes_away_every_new_one(self, host: Host) -> None:
        host.apply(ADA)
        host.module.keep()
        before = host.files()
        # Somebody leaves, somebody comes, settings change.
        host.apply({"name": "eve", "keys": [KEY]}, config="AllowUsers eve\n")
        assert "ssh/hardstand/keys/ada" not in host.files()
        assert host.files() != before
        host.module.TIMER.undo()
        assert host.files() == before
        assert not host.undo.exists()
        host.module.TIMER.undo()

    def test_undoing_the_first_time_leaves_what_debian_had(self, host: Host) -> None:
        before = host.files()
        host.apply(ADA)
        assert "userdel -r ada" in (host.undo / "undo").read_text()
        host.module.TIMER.undo()
        assert host.files() == before

    def test_what_a_run_left_that_was_cut_off_is_proven_by_the_next_and_undone_as_a_whole(self, host: Host) -> None:
        before = host.files()
        host.apply(ADA)
        assert host.apply(ADA)["armed"]
        host.apply(ADA, {"name": "eve", "keys": [KEY]}, config="AllowUsers ada eve\n")
        host.module.TIMER.undo()
        assert host.files() == before

    @pytest.mark.parametrize("command", ["sshd -t", "useradd", "ssh-keygen"])
    def test_a_change_that_fails_is_undone(self, host: Host, command: str) -> None:
        before = host.files()
        if command == "sshd -t":
            host.apply(ADA)
            host.module.keep()
            before = host.files()
            seen = []
            run = host.module.run

            def fails_the_second_time(*words: Any, check: bool = True) -> Any:
                if str(words[0]).endswith("sshd"):
                    seen.append(words)
                    if len(seen) == 2:
                        raise host.module.ChangeError("sshd says no")
                return run(*words, check=check)

            host.module.run = fails_the_second_time
        else:
            host.fails = command
        with pytest.raises(host.module.ChangeError, match="says no"):
            host.apply(ADA, config="AllowUsers nobody\n")
        assert host.files() == before

    def test_an_error_that_is_there_already_ends_it_before_anything_changes(self, host: Host) -> None:
        host.fails = "visudo -c"
        with pytest.raises(host.module.ChangeError, match=r"/etc/sudoers.d/site:1:3: syntax error"):
            host.apply(ADA)
        assert not host.armed()

    def test_an_account_that_is_nobodys_to_log_in_to_is_refused(self, host: Host) -> None:
        host.accounts.add("backup")
        with pytest.raises(host.module.ChangeError, match="nobody's to log in to"):
            host.apply({"name": "backup", "keys": [KEY]})
        assert not host.armed()

    def test_a_proof_that_took_too_long_is_said(self, host: Host) -> None:
        host.apply(ADA)
        subprocess.run(["/bin/sh", host.undo / "undo"], check=True)
        with pytest.raises(host.module.ChangeError, match="Raise ssh_undo_seconds"):
            host.module.keep()

    def test_a_dry_run_tells_and_does_nothing(self, host: Host) -> None:
        before = host.files()
        result = host.apply(ADA, check=True)
        assert result["changed"]
        assert [diff["after_header"].rpartition("/")[2] for diff in result["diff"]][-1] == "00-hardstand.conf"
        assert host.files() == before
        assert not host.armed()

    def test_algorithms_that_sshd_does_not_know_are_left_out(self, host: Host) -> None:
        text = host.module.supported("# KexAlgorithms are these\nKexAlgorithms new,newer,old\nPort 22\n")
        assert text == "# KexAlgorithms are these\nKexAlgorithms new,old\nPort 22\n"

    def test_the_size_of_an_rsa_key(self, host: Host, tmp_path: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-N", "", "-f", str(tmp_path / "key")]
        subprocess.run(command, check=True)
        assert host.module.rsa_bits((tmp_path / "key.pub").read_text()) == 3072


# The second connection -----------------------------------------------------------------------------------------------


class Connection:
    """Ansible's connection to a server that answers as it is told."""

    transport = "ssh"

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.options: dict[str, Any] = {"remote_user": "ada", "ssh_args": "-C -o ControlMaster=auto", "port": 2222}
        self.tried: list[dict[str, Any]] = []

    def get_options(self) -> dict[str, Any]:
        return self.options

    def get_option(self, name: str) -> Any:
        return self.options[name]

    def get(self, name: str, *_: Any) -> Connection:
        assert name == "ansible.builtin.ssh"
        return self

    def set_options(self, direct: dict[str, Any]) -> None:
        self.tried.append(direct)

    def exec_command(self, command: str, in_data: bytes | None, sudoable: bool) -> tuple[int, bytes, bytes]:
        assert not sudoable
        answer = self.answers[self.tried[-1]["remote_user"]]
        answer = answer.pop(0) if isinstance(answer, list) else answer
        self.tried[-1] |= {"command": command, "stdin": in_data}
        if isinstance(answer, str):
            raise AnsibleConnectionFailure(f"Failed to connect to the host via ssh: {answer}")
        return answer, b"", b"sudo: a password is required\n" if answer else b""


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = load("preflight/plugin_utils/second_connection.py")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    return module


DENIED = "Warning: this is a server\nada@10.0.0.1: Permission denied (publickey)."


class TestSecondConnection:
    def log_in(self, second: Any, connection: Connection, *arguments: Any, **options: Any) -> Any:
        second.connection_loader = connection
        return second.log_in(connection, None, *arguments, **options)

    def test_it_shares_nothing_and_is_otherwise_ansibles_own(self, second: Any) -> None:
        connection = Connection(eve=0)
        assert self.log_in(second, connection, "eve", "sudo -n true") == (True, True, "")
        (tried,) = connection.tried
        assert shlex.split(tried["ssh_args"])[:4] == ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
        assert tried["ssh_args"].endswith("-C -o ControlMaster=auto")
        assert (tried["remote_user"], tried["port"], tried["command"]) == ("eve", 2222, "sudo -n true")
        assert connection.options["remote_user"] == "ada"

    def test_who_is_refused_is_not_asked_again(self, second: Any) -> None:
        connection = Connection(ada=DENIED)
        attempt = self.log_in(second, connection, None)
        assert attempt.refused
        assert attempt.reason == "ada@10.0.0.1: Permission denied (publickey)"
        assert len(connection.tried) == 1

    def test_a_server_that_is_just_reloading_is_asked_again(self, second: Any) -> None:
        connection = Connection(ada=["ssh: connect to host x port 22: Connection refused", 0])
        assert self.log_in(second, connection, None).ok
        always = Connection(ada="ssh: connect to host x port 22: Connection refused")
        attempt = self.log_in(second, always, None)
        assert (attempt.ok, attempt.refused, len(always.tried)) == (False, False, 3)

    def test_a_login_that_cannot_become_root_is_none(self, second: Any) -> None:
        attempt = self.log_in(second, Connection(ada=1), None, "sudo -n true")
        assert attempt == (False, True, "sudo: a password is required")


class TestLogin:
    """Role preflight's first contact."""

    def run(self, monkeypatch: pytest.MonkeyPatch, connection: Connection, *admins: str) -> dict[str, Any]:
        module: Any = load("preflight/action_plugins/preflight_login.py")
        second: Any = load("preflight/plugin_utils/second_connection.py")
        second.connection_loader = connection
        monkeypatch.setattr(module, "SECOND", second)
        action = object.__new__(module.ActionModule)
        action._connection, action._play_context = connection, None
        action._task = SimpleNamespace(args={"admins": list(admins), "source": "hosts.yml:3"})
        monkeypatch.setattr(module.ActionBase, "run", lambda *_: {})

        def first(*_: Any, **__: Any) -> None:
            if isinstance(answer := connection.answers[connection.options["remote_user"]], str):
                raise AnsibleConnectionFailure(answer)

        monkeypatch.setattr(module.ActionModule, "_low_level_execute_command", first, raising=False)
        result: dict[str, Any] = action.run(None, {})
        return result

    def test_the_administrator_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connection = Connection(ada=0)
        assert self.run(monkeypatch, connection, "ada") == {"changed": False, "user": "ada", "fallback": False}
        assert connection.tried == []

    def test_root_where_only_root_gets_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, Connection(ada=DENIED, root=0), "ada")["fallback"]
        assert not self.run(monkeypatch, Connection(ada=DENIED, root=DENIED), "ada")["fallback"]

    def test_a_server_that_does_not_answer_is_not_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connection = Connection(ada="ssh: connect to host x port 22: Connection timed out", root=0)
        assert not self.run(monkeypatch, connection, "ada")["fallback"]
        assert connection.tried == []

    def test_a_user_who_could_log_in_no_longer_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connection = Connection(root=0, ada=0)
        connection.options["remote_user"] = "root"
        result = self.run(monkeypatch, connection, "ada", "eve")
        assert result["failed"]
        assert result["msg"].startswith('hosts.yml:3: Ansible logs in as "root", and with ssh_admins root can')
        assert "Set ansible_user to ada or eve" in result["msg"]

    def test_where_ansible_does_not_use_ssh_there_is_nothing_to_find_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connection = Connection()
        connection.transport = "containers.podman.podman"
        assert self.run(monkeypatch, connection, "ada") == {"changed": False, "user": "", "fallback": False}


class TestProof:
    """What becomes of a change, by how the login went that was to prove it."""

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        answer: Any,
        *,
        lost: bool = False,
        armed: bool = True,
        sudo: str = "nopasswd",
    ) -> tuple[dict[str, Any], list[str]]:
        module: Any = load("ssh/action_plugins/ssh_access.py")
        second: Any = load("preflight/plugin_utils/second_connection.py")
        connection: Any = Connection(ada=answer)
        connection.become = None
        connection.set_option = connection.options.__setitem__
        second.connection_loader = connection
        monkeypatch.setattr(module, "SECOND", second)
        monkeypatch.setattr(module.ActionBase, "run", lambda *_: {})
        states: list[str] = []

        def step(arguments: dict[str, Any]) -> dict[str, Any]:
            states.append(arguments.get("state", "applied"))
            if lost and states[-1] == "undone":
                raise AnsibleError("Missing sudo password")
            return {"changed": True, "armed": armed and states[-1] == "applied"}

        action = object.__new__(module.ActionModule)
        action._connection, action._play_context, action._module = connection, None, step
        action._task = SimpleNamespace(
            args={"operator": "ada", "settings_file": "vars.yml", "admins": [{**ADA, "sudo": sudo}], "undo_seconds": 90}
        )
        connection.options["remote_user"] = "root"
        return action.run(None, {"inventory_hostname": "app1"}), states

    def test_it_stands_when_one_gets_in_and_becomes_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result, states = self.run(monkeypatch, 0)
        assert (result["changed"], states) == (True, ["applied", "kept"])

    def test_nothing_is_proven_where_nothing_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, states = self.run(monkeypatch, DENIED, armed=False)
        assert states == ["applied"]

    @pytest.mark.parametrize(
        ("answer", "said"),
        [(DENIED, "could not log in: ada@10.0.0.1: Permission denied"), (1, "cannot become root: sudo: a password is")],
    )
    def test_it_is_undone_when_one_does_not(self, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str) -> None:
        result, states = self.run(monkeypatch, answer)
        assert states == ["applied", "undone"]
        assert result["failed"]
        assert said in result["msg"]
        assert "ssh_admins (vars.yml)" in result["msg"]
        assert result["msg"].endswith("Nothing has been changed: one logs in as before.")

    def test_a_server_that_is_lost_too_undoes_it_by_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result, _ = self.run(monkeypatch, DENIED, lost=True)
        assert result["msg"].endswith("The server takes everything back by itself, within 90 seconds.")

    def test_a_password_that_ansible_does_not_have_is_asked_for_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result, states = self.run(monkeypatch, 0, sudo="password")
        assert states == []
        assert "--ask-become-pass" in result["msg"]


# Which of a playbook's plays are on servers.
SERVERS = ("app", "lb", "db", "backup")
# Plays after others that have found out, and cannot run alone.
PARTS = {"provision.yml", "release.yml", "cutover.yml"}


def first_contact(playbook: Path) -> tuple[str, str]:
    """Return role and entry point of the first thing that a playbook does on servers; empty when there is none."""
    for play in yaml.safe_load(playbook.read_text()):
        hosts = str(play.get("hosts", ""))
        if not any(group in hosts for group in SERVERS):
            continue
        for task in play.get("tasks") or []:
            role = task.get("ansible.builtin.import_role") or task.get("ansible.builtin.include_role") or {}
            return role.get("name", ""), role.get("tasks_from", "main")
    return "", ""


@pytest.mark.parametrize(
    "playbook", sorted(set((PROJECT / "playbooks").glob("*.yml"))), ids=lambda playbook: playbook.name
)
def test_every_playbook_finds_out_who_can_log_in_before_it_does_anything_else(playbook: Path) -> None:
    found = first_contact(playbook)
    assert playbook.name in PARTS or found in [("", ""), ("preflight", "settings"), ("preflight", "login")]


def test_checking_the_settings_includes_finding_out_who_can_log_in() -> None:
    tasks = yaml.safe_load((ROLES / "preflight/tasks/settings.yml").read_text())
    assert {"ansible.builtin.import_tasks": "login.yml"}.items() <= tasks[-1].items()
