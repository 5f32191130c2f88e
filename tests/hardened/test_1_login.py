"""Only administrators get in, and whatever goes wrong on the way there, they still do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hardened.site import slow_to_prove
from tests.harness import wait_for

# What decides who gets in. Host keys are named, not shown.
STATE = (
    "cat /etc/ssh/sshd_config.d/* /etc/sudoers.d/* /etc/ssh/hardstand/keys/* /etc/passwd; ls /etc/ssh;"
    " systemctl list-timers --all --no-legend | grep undo"
)
ROLE = ("deploy.yml", "--tags", "ssh")


@pytest.fixture
def unchanged(server: Any) -> Any:
    """Whatever the test does, nothing changes and the administrator gets in."""
    before = server.sh(STATE, check=False)
    yield
    assert server.sh(STATE, check=False) == before
    assert server.ssh("sudo -n id -un").stdout == "root\n"


@pytest.fixture
def another_key(tmp_path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "another"], check=True)
    return tmp_path / "another"


def admin(name: str, key: Path) -> dict[str, Any]:
    return {"name": name, "keys": [key.with_name(f"{key.name}.pub").read_text().strip()]}


def test_administrators_get_in_and_nobody_else(site: Any, server: Any, another_key: Path) -> None:
    assert server.ssh("sudo -n id -un").stdout == "root\n"
    for attempt in ({"user": "root"}, {"user": "nobody"}, {"key": another_key}):
        refused = server.ssh("true", **attempt)
        assert refused.returncode == 255, attempt
        # A password is not even asked for.
        assert "Permission denied (publickey)." in refused.stderr
    assert site.play(*ROLE).changed == 0


@pytest.mark.usefixtures("unchanged")
def test_a_wrong_key_of_the_administrator(site: Any, another_key: Path) -> None:
    done = site.play(*ROLE, ssh_admins=[admin(site.admin, another_key)])
    assert done.code != 0
    assert f'"{site.admin}" could not log in' in done.output
    assert f"Look at the keys of {site.admin} in ssh_admins" in done.output
    assert "Nothing has been changed: one logs in as before." in done.output


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("/etc/sudoers.d/site", "ada ALL=(ALL NOPASSWD", "/etc/sudoers.d/site:1"),
        ("/etc/ssh/sshd_config.d/90-site.conf", "DenyUsers {admin}", "could not log in"),
        ("/etc/ssh/sshd_config.d/90-site.conf", "NoSuchOption yes", "90-site.conf: line 1"),
    ],
)
def test_a_file_of_somebody_elses(
    site: Any, server: Any, another_key: Path, file: str, content: str, said: str
) -> None:
    """It was put there since, and nothing has read it yet. A change of ours must not make it take effect and stay."""
    colleague = admin("eve", another_key)
    server.sh(f"umask 337; echo '{content.format(admin=site.admin)}' >{file}")
    try:
        done = site.play(*ROLE, ssh_admins=[*site.admins, colleague])
        assert done.code != 0
        assert said in done.output
        assert "Nothing has been changed" in done.output
    finally:
        server.sh(f"rm {file}; systemctl reload ssh")


@pytest.mark.once
@pytest.mark.usefixtures("unchanged")
def test_a_control_node_that_never_comes_back(site: Any, server: Any, tmp_path: Path) -> None:
    """The server takes back by itself what nobody has proven: here while the proof is still being waited for."""
    settings = {"ssh_forwarding": True, "ssh_undo_seconds": 5, "ansible_ssh_executable": slow_to_prove(tmp_path)}
    run = site.run(*ROLE, **settings)
    wait_for(
        lambda: "Forwarding local" in server.sh("cat /etc/ssh/sshd_config.d/00-hardstand.conf"), 120, "it is changed"
    )
    wait_for(
        lambda: "Forwarding no" in server.sh("cat /etc/ssh/sshd_config.d/00-hardstand.conf"), 15, "it is taken back"
    )
    done = run.wait()
    assert done.code != 0
    assert "Raise ssh_undo_seconds" in done.output


def test_somebody_joins_and_leaves(site: Any, server: Any, another_key: Path) -> None:
    site.expect(*ROLE, ssh_admins=[*site.admins, admin("eve", another_key)])
    assert server.ssh("sudo -n id -un", user="eve", key=another_key).stdout == "root\n"
    site.expect(*ROLE)
    assert server.ssh("true", user="eve", key=another_key).returncode == 255
    assert "eve" not in server.sh("cat /etc/sudoers.d/*")


def test_a_dry_run_as_the_administrator_finds_nothing_to_do(site: Any) -> None:
    assert site.expect(*ROLE, "--check", "--diff").changed == 0


@pytest.mark.usefixtures("unchanged")
def test_a_restart_of_the_server(server: Any) -> None:
    server.kill()
    server.boot()
    wait_for(lambda: server.ssh("true").returncode == 0, 60, "the administrator logs in again")
