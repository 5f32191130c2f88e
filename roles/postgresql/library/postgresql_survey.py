#!/usr/bin/python
"""Ansible module: look at Debian's PostgreSQL on a server, and refuse one that belongs to another application."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postgresql_host import PostgresqlError, find_cluster, run

DOCUMENTATION = r"""
---
module: postgresql_survey
short_description: Look at Debian's PostgreSQL on a server, and refuse one that belongs to another application
description:
  - Says which cluster the role works on, that at port 5432. Changes nothing.
options:
  app:
    description: Application that the server's database is for.
    type: str
    required: true
  marker:
    description: File that says which application this is.
    type: path
    required: true
  address:
    description: The server's own address at which PostgreSQL is to listen.
    type: str
    required: true
  package:
    description: Package that must be installed.
    type: str
    default: postgresql
author: Hardstand
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Look at PostgreSQL
  postgresql_survey:
    app: blog
    marker: /etc/hardstand/postgresql.json
    address: 10.0.0.5
  register: survey
"""

RETURN = r"""
installed:
  description: Whether the package is installed and there is a cluster.
  type: bool
  returned: success
version:
  description: Major version of the cluster; empty where there is none.
  type: str
  returned: success
configuration:
  description: Directory of its configuration; empty where there is none.
  type: str
  returned: success
data:
  description: Its data directory; empty where there is none.
  type: str
  returned: success
unit:
  description: Its systemd unit; empty where there is none.
  type: str
  returned: success
marked:
  description: Whether the marker names this application.
  type: bool
  returned: success
"""


def is_own_address(address: str) -> bool:
    """Tell whether an interface of this host has the address: only then can something listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def owner_of(marker: Path) -> str:
    """Return the application that the marker names; empty where there is no marker."""
    try:
        return str(json.loads(marker.read_text(encoding="utf-8"))["app"])
    except FileNotFoundError:
        return ""


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "marker": {"type": "path", "required": True},
            "address": {"type": "str", "required": True},
            "package": {"type": "str", "default": "postgresql"},
        },
        supports_check_mode=True,
    )
    p = module.params
    marker = Path(p["marker"])
    owner = owner_of(marker)
    if owner not in ("", p["app"]):
        module.fail_json(
            msg=f"The PostgreSQL of this server belongs to the application {owner}, and a server has one application's"
            f" database. Name another server in group db of {p['app']}, or give it a managed database."
            f" If {owner} is gone for good: rm {marker}"
        )
    if not is_own_address(p["address"]):
        module.fail_json(
            msg=f"{p['address']} is not an address of this server, so PostgreSQL cannot listen there."
            " Set internal_address at its name in hosts.yml to the address at which the application servers reach it."
        )
    try:
        cluster = find_cluster()
    except PostgresqlError as error:
        module.fail_json(msg=str(error))
    status = run(["/usr/bin/dpkg-query", "--show", "--showformat", "${db:Status-Status}", p["package"]]).stdout
    module.exit_json(
        changed=False,
        installed=status == "installed" and cluster is not None,
        version=cluster.version if cluster else "",
        configuration=str(cluster.configuration) if cluster else "",
        data=str(cluster.data) if cluster else "",
        unit=cluster.unit if cluster else "",
        marked=bool(owner),
    )


if __name__ == "__main__":
    main()
