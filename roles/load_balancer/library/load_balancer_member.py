#!/usr/bin/python
"""Ansible module: what an application server says of itself before a load balancer sends it requests again."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: load_balancer_member
short_description: Ask an application server, through its own nginx, whether it is healthy
description:
  - Reads which release is live, and asks for its health path over HTTPS on the loopback address, at the port that load
    balancers use. Changes nothing.
  - The certificate is not verified. Both ends of the connection are this server.
options:
  directory:
    description: The application's directory, with C(current) in it.
    type: path
    required: true
  port:
    description: Port at which nginx answers load balancers.
    type: int
    required: true
  server_name:
    description: Name in nginx's certificate for load balancers.
    type: str
    required: true
  timeout:
    description: How long the answer may take, in seconds.
    type: float
    default: 10
author: Hardstand
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Ask the server
  load_balancer_member:
    directory: /srv/blog
    port: 8443
    server_name: blog.internal
"""

RETURN = r"""
release:
  description: Id of the live release. Empty when there is none.
  type: str
  returned: success
healthy:
  description: Whether the health path answered 2xx.
  type: bool
  returned: success
detail:
  description: What it answered, or why there was no answer.
  type: str
  returned: success
"""

LOOPBACK = "127.0.0.1"


class Connection(http.client.HTTPSConnection):
    """HTTPS to one address under the name of another."""

    def __init__(self, port: int, server_name: str, timeout: float) -> None:
        """Connect to `port` of the loopback address, and ask for the certificate of `server_name`."""
        self.context = ssl._create_unverified_context()  # noqa: S323 - see the documentation above
        super().__init__(LOOPBACK, port, timeout=timeout, context=self.context)
        self.server_name = server_name

    def connect(self) -> None:
        """Open the connection."""
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = self.context.wrap_socket(plain, server_hostname=self.server_name)


def ask(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the release that is live and whether it is healthy."""
    found: dict[str, Any] = {"changed": False, "release": "", "healthy": False}
    try:
        release = json.loads((Path(parameters["directory"]) / "current/release.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return found | {"detail": f"no release is live ({error})"}
    found["release"] = release["release"]
    path = release["health_path"]
    connection = Connection(parameters["port"], parameters["server_name"], parameters["timeout"])
    try:
        connection.request("GET", path, headers={"Host": release["host_header"], "Connection": "close"})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return found | {"detail": f"{path} does not answer: {error}"}
    finally:
        connection.close()
    return found | {"healthy": 200 <= status < 300, "detail": f"{path} answers {status}"}


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "port": {"type": "int", "required": True},
            "server_name": {"type": "str", "required": True},
            "timeout": {"type": "float", "default": 10},
        },
        supports_check_mode=True,
    )
    module.exit_json(**ask(module.params))


if __name__ == "__main__":
    main()
