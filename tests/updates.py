"""An update of a server's packages that a test can order: a package and a repository of our own, on the server itself.

So a test does not depend on what Debian has published by the day it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness import Server

PACKAGE = "hardstand-probe"
# What it leaves when its installation has begun.
BEGUN = "/var/lib/hardstand-probe"
# For the script of a version that takes as long as it takes, and the second time no time.
HANG_ONCE = f"test -e {BEGUN} || {{ touch {BEGUN}; sleep 600; }}"

_PUBLISH = """set -e
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
_REMOVE = (
    f"rm -rf /srv/probe /etc/apt/sources.list.d/probe.list {BEGUN}; dpkg --purge --force-all {PACKAGE} 2> /dev/null;"
    " apt-get -qq update"
)


def publish(server: Server, version: int, postinst: str = "exit 0") -> None:
    """Publish a version of the package on a server; the first one is installed.

    Args:
        server: where.
        version: of the package.
        postinst: what its installation runs, for sh, without single quotes.
    """
    server.sh(_PUBLISH.format(package=PACKAGE, version=version, postinst=postinst))
    if version == 1:
        server.sh(f"apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install {PACKAGE}")


def remove(server: Server) -> None:
    """Remove the package and its repository."""
    server.sh(_REMOVE)


def begun(server: Server) -> bool:
    """Return whether the installation of a version with HANG_ONCE is under way, or was."""
    return server.sh(f"ls {BEGUN}", check=False) == BEGUN


def state(server: Server) -> str:
    """Return the version of the package and dpkg's word for its state, such as `2 ii`."""
    return server.sh(f"dpkg-query --show --showformat '${{Version}} ${{db:Status-Abbrev}}' {PACKAGE}").strip()
