"""Updates, kernel, logins and records of a hardened server, and the sandboxes that its application runs in."""

from __future__ import annotations

import json
import re

import pytest

from tests.hardened.site import Server, Site
from tests.harness import APP

# systemd's judgement of Debian's units is 9.6; smaller is better.
EXPOSURE = 3.0

# Names of kernel settings whose value is another one than their file says, of those that this server may set.
WRONG = """
container=$(systemd-detect-virt --container)
grep '^-' /etc/sysctl.d/zz-hardstand.conf | while IFS=' ' read -r name _ value; do
    name=${name#-}
    case $container:$name in none:* | *:net.*) ;; *) continue ;; esac
    file=/proc/sys/$(echo "$name" | tr . /)
    if [ -w "$file" ] && [ "$(cat "$file")" != "$value" ]; then echo "$name"; fi
done
"""


@pytest.fixture(params=["public", "app"])
def server(request: pytest.FixtureRequest, site: Site) -> Server:
    """The server that clients reach, and the one that the application runs on, which may be the same."""
    return site.public if request.param == "public" else site.app


@pytest.fixture(params=["public-nginx", "app-nginx", "app-supervisor"])
def sandbox(request: pytest.FixtureRequest, site: Site) -> tuple[Server, str]:
    """A server, and a unit there that is sandboxed."""
    where, _, unit = request.param.partition("-")
    return (site.public if where == "public" else site.app), unit


def test_exposure(sandbox: tuple[Server, str]) -> None:
    server, unit = sandbox
    said = server.sh(f"systemd-analyze security {unit} --no-pager | tail -n 1")
    found = re.search(r"([0-9.]+) [A-Z]+", said)
    assert found, said
    assert float(found[1]) <= EXPOSURE, said


def test_the_process_is_in_the_sandbox_that_its_unit_says(sandbox: tuple[Server, str]) -> None:
    """Of a process that was there before its sandbox, systemd-analyze knows nothing."""
    server, unit = sandbox
    pid = server.sh(f"systemctl show {unit} --property MainPID --value")
    status = server.sh(f"cat /proc/{pid}/status")
    assert "NoNewPrivs:\t1\n" in status
    assert "Seccomp:\t2\n" in status


def test_an_application_in_the_sandbox_writes_where_it_may_and_nowhere_else(site: Site) -> None:
    """With the mounts that supervisord has given it, and its account."""
    server = site.app
    supervisord = server.sh("systemctl show supervisor --property MainPID --value")
    assert server.sh(f"readlink /proc/{supervisord}/ns/mnt") != server.sh("readlink /proc/1/ns/mnt")
    inside = f"nsenter --target {supervisord} --mount"
    account = f"{inside} setpriv --reuid {APP} --regid {APP} --clear-groups"
    for directory in (f"/srv/{APP}/shared", "/dev/shm", "/tmp"):  # noqa: S108
        server.sh(f"{account} sh -c 'touch {directory}/probe && rm {directory}/probe'")
    # Not even root in there.
    for directory in ("/etc", "/usr/bin", "/opt/pyenv", "/var/lib"):
        assert "Read-only file system" in server.sh(f"{inside} touch {directory}/probe 2>&1 || true"), directory
    assert server.sh(f"{inside} ls -A /home") == ""


def test_security_updates_come_by_themselves(server: Server) -> None:
    server.sh("systemctl is-enabled apt-daily.timer apt-daily-upgrade.timer")
    said = server.sh("unattended-upgrade --dry-run --verbose 2>&1")
    (origins,) = [line for line in said.splitlines() if line.startswith("Allowed origins")]
    assert all("ecurity" in origin for origin in origins.split(":", 1)[1].split(", origin="))


def test_no_core_is_dumped(server: Server) -> None:
    assert server.sh("sh -lc 'ulimit -c'").strip() == "0"


def test_kernel_settings_that_this_server_may_set_are_set(site: Site, server: Server) -> None:
    """Asked of the kernel; and a second run has nothing to do."""
    assert server.sh(WRONG) == ""
    done = site.play("deploy.yml", "--tags", "hardening")
    assert done.changed == 0
    # The lock has been given back by the run itself, although it has rolled nothing out.
    assert "did not end by itself" not in done.output


def test_what_sudo_was_used_for_is_written_down(server: Server) -> None:
    server.ssh("sudo -n true")
    assert "COMMAND=" in server.sh("cat /var/log/sudo.log")
    server.sh("visudo -c -q")


def test_changed_files_are_seen(server: Server) -> None:
    server.sh("systemctl start hardstand-integrity")
    since = server.sh("date '+%Y-%m-%d %H:%M:%S'").strip()
    try:
        server.sh("touch /etc/hardstand-probe; sleep 1; systemctl start hardstand-integrity")
        said = server.sh(f"journalctl --unit hardstand-integrity --since '{since}' --no-pager")
        assert "/etc/hardstand-probe" in said
    finally:
        server.sh("rm -f /etc/hardstand-probe")


def test_nothing_has_failed(server: Server) -> None:
    failed = json.loads(server.sh("systemctl list-units --failed --output json"))
    assert [unit["unit"] for unit in failed] == []
