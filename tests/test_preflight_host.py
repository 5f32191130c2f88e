"""The server's half of preflight: its judgements, its lock, and what is said when a server cannot be reached."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.role_templates import load_file

PROJECT = Path(__file__).resolve().parents[1]
ROLE = PROJECT / "roles" / "preflight"
PLATFORMS = {"debian-12": "tested", "debian-13": "tested", "ubuntu-24.04": "untested"}


def load(path: str) -> ModuleType:
    """Import a file of the role, as Ansible would, by its path."""
    return load_file(ROLE / path)


host = load("library/preflight_host.py")
action = load("action_plugins/preflight_host.py")
DeployLock: Any = load("module_utils/deploy_lock.py").DeployLock


class TestServer:
    @pytest.mark.parametrize(
        ("release", "problem", "warning"),
        [
            ({"ID": "debian", "VERSION_ID": "13", "PRETTY_NAME": "Debian 13"}, "", ""),
            ({"ID": "ubuntu", "VERSION_ID": "24.04", "PRETTY_NAME": "Ubuntu 24.04"}, "", "untested"),
            ({"ID": "debian", "VERSION_ID": "11", "PRETTY_NAME": "Debian 11"}, "runs Debian 11, which is not", ""),
            ({"ID": "debian", "PRETTY_NAME": "Debian forky/sid"}, "runs Debian forky/sid, which is not", ""),
            (
                {"ID": "rocky", "VERSION_ID": "9.4"},
                "runs rocky-9.4, which is not supported; supported are Debian 12",
                "",
            ),
        ],
    )
    def test_operating_systems(self, release: dict[str, str], problem: str, warning: str) -> None:
        found = host.platform_problem(release, PLATFORMS)
        for wanted, given in zip((problem, warning), found, strict=True):
            assert wanted in given
            assert bool(wanted) == bool(given)

    def test_os_release_is_read_as_a_shell_would(self) -> None:
        text = "# comment\nID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME='Debian GNU/Linux 12'\n\n"
        assert host.parse_os_release(text) == {
            "ID": "debian",
            "VERSION_ID": "12",
            "PRETTY_NAME": "Debian GNU/Linux 12",
        }

    def test_a_full_disk_is_named_once_for_all_directories_on_it(self, tmp_path: Path) -> None:
        free = host.free_megabytes([str(tmp_path), str(tmp_path / "not" / "there" / "yet")])
        assert list(free) == [f"{tmp_path} and {tmp_path}/not/there/yet"]
        (megabytes,) = free.values()
        assert host.disk_problems(free, megabytes) == []
        (problem,) = host.disk_problems(free, megabytes + 1)
        assert f"has {megabytes} MB free for {tmp_path} and" in problem

    def test_the_facts_that_roles_read(self) -> None:
        facts = host.facts({"ID": "ubuntu", "VERSION_ID": "24.04", "VERSION_CODENAME": "noble"})
        assert facts["ansible_distribution"] == "Ubuntu"
        assert facts["ansible_distribution_release"] == "noble"
        assert facts["ansible_distribution_major_version"] == "24"
        assert facts["ansible_processor_vcpus"] == os.cpu_count()
        assert facts["ansible_memtotal_mb"] > 100


class SlowLock(DeployLock):  # type: ignore[misc]
    """A lock whose user thinks between looking and taking, so that any gap between the two is found."""

    @staticmethod
    def _read(descriptor: int) -> dict[str, Any]:
        content: dict[str, Any] = DeployLock._read(descriptor)
        time.sleep(0.05)
        return content


def compete(path: str, number: int) -> bool:
    """Try to take a lock."""
    return SlowLock(path, f"run-{number}").acquire({}, 60) is None


class TestLock:
    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        return str(tmp_path / "demo.lock")

    @pytest.fixture
    def lock(self, path: str) -> Callable[[str], Any]:
        return lambda token: DeployLock(path, token)

    def test_one_run_holds_it_and_the_other_learns_who(self, lock: Callable[[str], Any], path: str) -> None:
        assert lock("a").acquire({"owner": "ann@laptop"}, 60) is None
        assert lock("b").acquire({"owner": "bob@ci"}, 60)["owner"] == "ann@laptop"
        assert json.loads(Path(path).read_text())["token"] == "a"
        assert Path(path).stat().st_mode & 0o777 == 0o600

    def test_taking_it_again_extends_the_lease(self, lock: Callable[[str], Any], path: str) -> None:
        lock("a").acquire({}, 60)
        first = json.loads(Path(path).read_text())
        assert lock("a").acquire({}, 120) is None
        second = json.loads(Path(path).read_text())
        assert second["since"] == first["since"]
        assert second["expires"] > first["expires"] + 59

    def test_only_its_holder_releases_it(self, lock: Callable[[str], Any], path: str) -> None:
        lock("a").acquire({}, 60)
        assert lock("b").release() is False
        assert lock("a").release() is True
        assert not Path(path).exists()
        assert lock("a").release() is False

    def test_it_is_free_when_the_lease_is_over(self, lock: Callable[[str], Any]) -> None:
        lock("a").acquire({}, 0)
        assert lock("b").acquire({}, 60) is None

    def test_it_is_taken_from_the_dead_and_by_force(self, lock: Callable[[str], Any]) -> None:
        lock("a").acquire({}, 60)
        assert lock("b").acquire({}, 60, dead_token="somebody-else") is not None
        assert lock("b").acquire({}, 60, dead_token="a") is None
        assert lock("c").acquire({}, 60, force=True) is None

    @pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
    def test_a_file_that_is_no_lock_does_not_count(self, lock: Callable[[str], Any], path: str, content: str) -> None:
        Path(path).write_text(content)
        assert lock("a").acquire({}, 60) is None

    def test_a_link_is_not_followed(self, lock: Callable[[str], Any], path: str, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("precious")
        Path(path).symlink_to(tmp_path / "precious")
        with pytest.raises(OSError, match="symbolic links"):
            lock("a").acquire({}, 60)
        assert (tmp_path / "precious").read_text() == "precious"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_another_users_file_holds_nobody_up(self, lock: Callable[[str], Any], path: str) -> None:
        Path(path).write_text(json.dumps({"token": "x", "expires": 1e12}))
        os.chown(path, 65534, 65534)
        assert lock("a").acquire({}, 60) is None
        assert Path(path).stat().st_uid == 0

    def test_a_stale_lock_goes_to_one_of_many(self, lock: Callable[[str], Any], path: str) -> None:
        lock("old").acquire({}, 0)
        with multiprocessing.get_context("fork").Pool(8) as pool:
            won = pool.starmap(compete, [(path, number) for number in range(8)], chunksize=1)
        assert won.count(True) == 1

    @pytest.mark.parametrize("holder", ["b", "c"])
    def test_who_waited_while_it_was_released_looks_at_the_file_that_others_see(
        self, lock: Callable[[str], Any], path: str, holder: str
    ) -> None:
        with ThreadPoolExecutor() as pool, lock("a")._open():
            waiting = pool.submit(lock("b").acquire, {}, 60)
            time.sleep(0.2)
            Path(path).unlink()
            if holder == "c":
                assert lock("c").acquire({}, 60) is None
        assert (waiting.result() is None) == (holder == "b")
        assert json.loads(Path(path).read_text())["token"] == holder


class TestHolder:
    def test_a_process_that_is_gone_is_dead(self) -> None:
        with subprocess.Popen(["sleep", "60"]) as process:
            holder = {
                "machine": action.machine_identity(),
                "pid": process.pid,
                "started": action.process_start(process.pid),
            }
            assert not action.is_dead(holder)
            process.kill()
        assert action.is_dead(holder)

    def test_a_pid_that_was_used_again_is_dead(self) -> None:
        assert action.is_dead({**action.this_run(), "started": "1"})

    def test_nothing_is_known_of_another_machine(self) -> None:
        assert not action.is_dead({"machine": "another", "pid": 999999999, "started": "1"})

    def test_this_run_is_alive(self) -> None:
        run = action.this_run()
        assert not action.is_dead(run)
        assert "@" in run["owner"]


def test_a_server_that_cannot_be_reached_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text(
        """\
app:
  vars: {app_name: demo, app_domains: [demo.example], ansible_ssh_common_args: -F none -o BatchMode=yes}
  hosts:
    app1:
      ansible_host: 127.0.0.1
      ansible_port: 1
"""
    )
    (tmp_path / "ansible.cfg").write_text(f"[defaults]\nroles_path = {tmp_path}/roles\ncallback_result_format = yaml\n")
    shutil.copytree(ROLE, tmp_path / "roles" / "preflight")
    (tmp_path / "preflight.yml").write_text(
        """\
- hosts: app
  gather_facts: false
  any_errors_fatal: true
  tasks: [ansible.builtin.import_role: {name: preflight, rolespec_validate: false}]
"""
    )
    result = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "preflight.yml", "-i", "hosts.yml"],
        cwd=tmp_path,
        env={**os.environ, "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 4, result.stdout + result.stderr
    reason = "connect to host 127.0.0.1 port 1: Connection refused.\n"
    assert f"hosts.yml:4: app1 (127.0.0.1, port 1) cannot be reached: {reason}" in result.stdout
    assert result.stdout.count("cannot be reached") == 1
