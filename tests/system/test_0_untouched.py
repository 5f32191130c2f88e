"""Servers that nobody has touched, and servers that cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.servers import Server, wait_for

IMAGES = {
    # As cloud images are: Python is there. And as bare as Debian gets: it is not.
    "with-python": os.environ.get("HARDSTAND_IMAGE_DEBIAN12", "localhost/hardstand/debian12"),
    "bare": os.environ.get("HARDSTAND_IMAGE_DEBIAN13", "localhost/hardstand/debian13"),
}


@pytest.fixture(scope="module", params=sorted(IMAGES))
def untouched(
    request: pytest.FixtureRequest, scenario_inventory: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of the test's own, fresh from its image."""
    name = f"hardstand-untouched-{request.param}"
    hosts = tmp_path_factory.mktemp("inventory") / "hosts.json"
    variables = {"ansible_connection": "containers.podman.podman", "ansible_user": "root"}
    hosts.write_text(json.dumps({"app": {"hosts": {name: variables}}}))
    container = subprocess.run(
        ["podman", "run", "--detach", "--rm", "--name", name, "--systemd=always", IMAGES[request.param]],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        server = Server(name, 0, 0, Path(), [scenario_inventory, str(hosts)])
        wait_for(lambda: server.sh("systemctl is-system-running", check=False) in ("running", "degraded"), 60, "boot")
        yield server
    finally:
        subprocess.run(["podman", "rm", "--force", "--time", "0", container], check=True, capture_output=True)


def state(server: Server) -> str:
    """Return a listing of all that a playbook could change."""
    return server.sh(
        "find /etc /srv /opt /usr /var/lib/dpkg -xdev -not -name '*.pyc' -not -name __pycache__ "
        "-printf '%p %m %u %s %T@\\n' | sort"
    )


def changed(before: str, after: str) -> set[str]:
    """Return the paths of which two listings tell something different."""
    return {line.partition(" ")[0] for line in set(before.splitlines()) ^ set(after.splitlines())}


def test_check_mode_changes_nothing(untouched: Server) -> None:
    before = state(untouched)
    run = untouched.deploy("--check", "--diff")
    assert changed(before, state(untouched)) == set()
    if "bare" in untouched.name:
        assert "has no Python yet" in run.output
    else:
        assert run.changed > 10, "a dry run on a new server shows what it would do"
        assert "SECRET_KEY (new value)" in run.output


def test_an_unsupported_system_is_refused(untouched: Server) -> None:
    before = state(untouched)
    untouched.sh("mv /etc/os-release /etc/os-release.kept")
    untouched.sh(
        'printf \'PRETTY_NAME="Debian GNU/Linux 11 (bullseye)"\\nID=debian\\nVERSION_ID="11"\\n\' > /etc/os-release'
    )
    try:
        run = untouched.refuse()
    finally:
        untouched.sh("mv /etc/os-release.kept /etc/os-release")
    assert "Debian GNU/Linux 11 (bullseye), which is not supported" in run.output
    # The directory's own time is this test's doing.
    assert changed(before, state(untouched)) <= {"/etc"}


def test_an_unreachable_server_ends_the_deploy_for_all(untouched: Server, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    variables = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_user": "root"}
    hosts.write_text(json.dumps({"app": {"hosts": {"gone": variables}}}))
    both = Server(f"{untouched.name},gone", 0, 0, Path(), [*untouched.inventories, str(hosts)])
    run = both.refuse()
    assert "gone" in run.output
    assert "hosts.json" in run.output, "the file to edit"
    assert untouched.sh("test -e /etc/nginx && echo nginx", check=False) == ""
