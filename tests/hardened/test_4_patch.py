"""Updates of the operating system: one server at a time, nothing where nothing is due, an end at the first failure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import APP, wait_for

PATCH, STATUS = "playbooks/patch.yml", "playbooks/status.yml"
PACKAGE = "hardstand-probe"
# What it leaves when its installation has begun.
BEGUN = "/var/lib/hardstand-probe"

# A package and a repository of our own, on the server: whatever update a test needs, whatever Debian has today.
PUBLISH = """set -e
mkdir -p /srv/probe/build/DEBIAN
cd /srv/probe
printf 'Package: {package}\\nVersion: {version}\\nArchitecture: all\\nMaintainer: nobody\\nDescription: probe\\n' \
    > build/DEBIAN/control
printf '#!/bin/sh\\n{postinst}\\n' > build/DEBIAN/postinst
chmod 0755 build build/DEBIAN build/DEBIAN/postinst
dpkg-deb --build --root-owner-group build probe.deb > /dev/null
{{ cat build/DEBIAN/control; echo "Filename: ./probe.deb"; echo "Size: $(stat -c %s probe.deb)"
   echo "SHA256: $(sha256sum probe.deb | cut -d ' ' -f 1)"; }} > Packages
chmod -R a+rX /srv/probe
echo 'deb [trusted=yes] file:/srv/probe ./' > /etc/apt/sources.list.d/probe.list
"""
REMOVE = (
    f"rm -rf /srv/probe /etc/apt/sources.list.d/probe.list {BEGUN}; dpkg --purge --force-all {PACKAGE} 2> /dev/null;"
    " apt-get -qq update"
)
# nginx as it was before it had a sandbox, and the sandbox on the disk again.
START_OUTSIDE = """set -e
mv /etc/systemd/system/nginx.service.d /run/nginx.service.d.kept
systemctl daemon-reload && systemctl restart nginx
mv /run/nginx.service.d.kept /etc/systemd/system/nginx.service.d
systemctl daemon-reload
"""
FLAG = "/run/reboot-required"
VERSION = f"dpkg-query --show --showformat '${{Version}} ${{db:Status-Abbrev}}' {PACKAGE}"


@pytest.fixture
def publish(site: Any) -> Iterator[Callable[..., None]]:
    """Publish a version of the package on a server; the first one is installed."""

    def version(server: Any, number: int, postinst: str = "exit 0") -> None:
        server.sh(PUBLISH.format(package=PACKAGE, version=number, postinst=postinst))
        if number == 1:
            server.sh(f"apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install {PACKAGE}")

    yield version
    for name in site.names:
        site.server(name).sh(REMOVE)


def apps(site: Any) -> list[Any]:
    """Return the servers that the application runs on, in the inventory's order."""
    servers = [site.server(name) for name in site.names]
    return [server for server in servers if server.sh(f"test -L /srv/{APP}/run/live.sock && echo yes || true").strip()]


def starts(server: Any) -> str:
    """Return when supervisord and nginx were started."""
    found: str = server.sh("systemctl show supervisor nginx --property ActiveEnterTimestampMonotonic")
    return found


def test_nothing_is_touched_where_nothing_is_due(site: Any) -> None:
    # Whatever Debian has published since the servers were made.
    assert site.play(PATCH, patch_reboot="never").code == 0
    servers = apps(site)
    before = [starts(server) for server in servers]
    done = site.play(PATCH, patch_reboot="never")
    assert (done.code, done.changed) == (0, 0)
    assert "nothing to do" in done.output
    assert [starts(server) for server in servers] == before


@pytest.mark.once
def test_an_update_comes_and_the_lock_is_given_back(site: Any, publish: Callable[..., None]) -> None:
    server = apps(site)[0]
    publish(server, 1)
    publish(server, 2)
    done = site.play(PATCH, patch_reboot="never")
    assert done.code == 0, done.output
    assert f"1 updated: {PACKAGE}" in done.output
    assert server.sh(VERSION).strip() == "2 ii"
    assert server.sh(f"ls /run/lock/hardstand-{APP}.lock 2> /dev/null || true") == ""
    assert site.play(STATUS, status_fail=False).code == 0


def notes(site: Any) -> list[str]:
    """Return what the status says that waits."""
    said = site.expect(STATUS, status_format="json", status_fail=False).output
    (line,) = (line for line in said.splitlines() if line.startswith("{"))
    return [note["text"] for note in json.loads(line)["notes"]]


def test_the_status_says_what_waits_until_it_is_done(site: Any) -> None:
    server = apps(site)[0]
    assert notes(site) == []
    server.sh(f"touch {FLAG} && echo {PACKAGE} > {FLAG}.pkgs")
    server.sh(START_OUTSIDE)
    try:
        reboot, outside = notes(site)
        assert f"an update of {PACKAGE}" in reboot
        assert outside.startswith("nginx.service started before its sandbox")
        done = site.play(PATCH, patch_reboot="never")
        assert "restarted nginx.service" in done.output, done.output
        assert notes(site) == [reboot]
    finally:
        server.sh(f"rm {FLAG} {FLAG}.pkgs")
    assert notes(site) == []


def test_it_ends_at_the_first_failure_and_goes_on_later(site: Any, publish: Callable[..., None]) -> None:
    servers = apps(site)
    for server in servers:
        publish(server, 1)
        publish(server, 2, postinst="exit 1")
    done = site.play(PATCH, patch_reboot="never")
    assert done.code != 0
    assert "run playbooks/patch.yml again" in done.output
    assert server.sh(f"ls /run/lock/hardstand-{APP}.lock 2> /dev/null || true") == ""
    # dpkg's own word for a package whose script failed; the servers after the first have not seen it.
    states = [server.sh(VERSION).strip() for server in servers]
    assert states[0].startswith("2 iF")
    assert states[1:] == ["1 ii"] * (len(servers) - 1)

    for server in servers:
        publish(server, 3)
    assert site.play(PATCH, patch_reboot="never").code == 0
    assert {server.sh(VERSION).strip() for server in servers} == {"3 ii"}
    assert site.public.answers()


@pytest.mark.once
def test_a_server_that_dies_in_the_middle_is_named_and_let_in_later(site: Any, publish: Callable[..., None]) -> None:
    server = apps(site)[0]
    server.sh(f"rm -f {BEGUN}")
    publish(server, 1)
    # As long as it takes, and the second time at once.
    publish(server, 2, postinst=f"test -e {BEGUN} || {{ touch {BEGUN}; sleep 600; }}")
    run = site.run(PATCH, patch_reboot="never")
    wait_for(lambda: server.sh(f"ls {BEGUN}", check=False) == BEGUN, 300, "the update is under way")
    server.kill()
    done = run.wait()
    assert done.code != 0
    assert "app1: cannot be reached: " in done.output
    assert "run playbooks/patch.yml again" in done.output

    server.boot()
    done = site.play(PATCH, patch_reboot="never")
    assert done.code == 0, done.output
    assert "let in again" in done.output
    assert server.sh(VERSION).strip() == "2 ii"
    assert site.public.answers()
