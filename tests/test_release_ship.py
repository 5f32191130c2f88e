"""The role's plan and build as Ansible runs them: what travels to the server, and what is shown of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import APP, BUILDER, PROXY_GROUP, PYTHON, SERVICE, Server

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: release, tasks_from: plan}
    - ansible.builtin.import_role: {name: release, tasks_from: build}
    - ansible.builtin.copy:
        content: "{{ __release_build | to_json }}"
        dest: "{{ result_file }}.{{ inventory_hostname }}"
        mode: "0600"
      check_mode: false
"""
PROJECT = Path(__file__).resolve().parents[1]
SECRET = "s3cr3t-\"${x}'-w0rd"


class Control:
    """A control node that deploys to the server it is itself."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.playbook = server.directory / "play.yml"
        self.playbook.write_text(PLAYBOOK)
        self.said = ""

    def run(self, *options: str, fails: bool = False) -> dict[str, Any]:
        """Run the playbook; returns the result of its build."""
        return self.run_on({"server": {}}, *options, fails=fails)["server"]

    def run_on(self, hosts: dict[str, dict[str, Any]], *options: str, fails: bool = False) -> dict[str, dict[str, Any]]:
        """Run the playbook on hosts with variables of their own; returns the results of their builds."""
        variables = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "result_file": f"{self.server.directory}/result",
            "release_app": APP,
            "release_root": f"{self.server.root}/",
            "release_repository": str(self.server.repository.path),
            "release_module": "service:app",
            "release_env": {"PLAIN": "value"},
            "release_secrets": {"SECRET": SECRET},
            "release_python": PYTHON,
            "release_uv": str(self.server.uv),
            "release_wheel_directory": str(self.server.wheels),
        }
        constants = {
            "_release_build_user": BUILDER,
            "_release_user": SERVICE,
            "_release_proxy_group": PROXY_GROUP,
        }
        inventory = self.server.directory / "hosts.json"
        inventory.write_text(json.dumps({"all": {"vars": variables, "hosts": hosts}}))
        ansible_playbook = Path(sys.executable).with_name("ansible-playbook")
        command: list[str | Path] = [
            ansible_playbook,
            "-i",
            inventory,
            self.playbook,
            *options,
            "-e",
            json.dumps(constants),
        ]
        cache = str(self.server.directory / "cache")
        # Any vault password will do: nothing here is encrypted.
        env = {**os.environ, "XDG_CACHE_HOME": cache, "ANSIBLE_VAULT_PASSWORD_FILE": str(self.playbook)}
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
        self.said = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, self.said
        results = {host: self.server.directory / f"result.{host}" for host in hosts}
        return {host: {} if fails else json.loads(file.read_text()) for host, file in results.items()}

    def shipped(self) -> int:
        """Return the size of the newest pack in the server's mirror, in bytes."""
        packs = (self.server.root / "repo.git" / "objects" / "pack").glob("*.pack")
        return max(packs, key=lambda path: path.stat().st_mtime_ns).stat().st_size


@pytest.fixture
def control(server: Server) -> Control:
    return Control(server)


def test_what_is_new_is_shipped_and_no_secret_is_shown(control: Control) -> None:
    server = control.server
    code = {"service.py": "app = 1\n", "requirements.txt": "gunicorn==27.0.1\nuvicorn-worker==0.4.0\n"}
    server.repository.commit({**code, "random": os.urandom(100_000)})

    # A server that has never been touched, foretold.
    assert control.run("--check", "--diff")["changed"]
    assert "SECRET (new value)" in control.said
    assert "w0rd" not in control.said
    assert not server.root.exists()

    # All of it, because the server has nothing.
    first = control.run("-vvv", "--diff")
    assert "w0rd" not in control.said
    assert control.shipped() > 100_000
    release = server.release(first["release_id"])
    assert (release / ".env").read_text() == 'PLAIN="value"\nSECRET="s3cr3t-\\"${__:-$}{x}\'-w0rd"\n'
    assert f"--bind unix:{server.root}/run/blue.sock " in (release / ".hardstand" / "blue.conf").read_text()

    # What is new, and unasked, because the control node remembers: asked, this server would say that it has nothing.
    for reference in (server.root / "repo.git" / "refs" / "releases").iterdir():
        reference.unlink()
    server.repository.commit({"service.py": "app = 2\n"})
    second = control.run()
    assert control.shipped() < 2_000
    assert second["dependencies"] == "unchanged"

    # The memory is wrong, the server is another one: it asks, and what it needs is too large for one call.
    shutil.rmtree(server.root)
    server.repository.commit({"large": os.urandom(4_100_000)})
    third = control.run("-v")
    assert control.shipped() > 4_100_000
    assert (server.release(third["release_id"]) / "service.py").read_text() == "app = 2\n"


def test_a_release_is_named_after_its_commit_and_all_of_its_configuration(control: Control) -> None:
    code = {"service.py": "app = 1\n", "requirements.txt": "gunicorn==27.0.1\nuvicorn-worker==0.4.0\n"}
    commit = control.server.repository.commit(code)
    results = control.run_on(
        {
            "first": {},
            "same": {},
            "value": {"release_env": {"PLAIN": "other"}},
            "kept_secret": {"release_env": {}, "release_secrets": {"PLAIN": "value", "SECRET": SECRET}},
            "start_setting": {"release_workers": "3"},
            "health_check": {"release_health_path": "/other"},
        },
        "--check",
    )
    ids = {host: result["release_id"] for host, result in results.items()}
    assert ids.pop("first") == ids["same"], "the same configuration is the same release on every host"
    assert len(set(ids.values())) == len(ids), "each of these changes makes another release"
    assert {release_id.partition("-")[0] for release_id in ids.values()} == {commit[:8]}


def test_a_failure_shows_no_secret(control: Control) -> None:
    control.server.repository.commit({"requirements.txt": "no-such-thing==1\n"})
    control.run("-vvv", fails=True)
    assert "no-such-thing was not found" in control.said
    assert "w0rd" not in control.said
