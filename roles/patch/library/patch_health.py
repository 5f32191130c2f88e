#!/usr/bin/python
"""Ansible module: wait until a server serves."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: patch_health
short_description: Wait until a server serves
description:
  - Asks for a path until the answer is 2xx, on a unix socket, or over HTTPS on the loopback address. The certificate is
    not verified; both ends of the connection are this server.
  - Where there is no socket nothing was ever deployed, and there is nothing to wait for.
options:
  socket: {description: Socket of the application., type: path}
  port: {description: Port of HTTPS., type: int}
  name: {description: Name to ask HTTPS for., type: str}
  path: {description: What to ask for., type: str, required: true}
  host: {description: The Host header., type: str, required: true}
  timeout: {description: Seconds to wait., type: float, default: 120}
author: Hardstand
attributes:
  check_mode:
    support: full
"""

RETURN = r"""
detail: {description: What it said last., type: str, returned: always}
"""

PAUSE = 0.5


class Connection(http.client.HTTPConnection):
    """HTTP on a unix socket, or HTTPS to the loopback address."""

    def __init__(self, path: str | None, port: int | None, name: str | None) -> None:
        """Say where to connect to."""
        super().__init__("localhost", timeout=10)
        self.path, self.tls_port, self.name = path, port, name

    def connect(self) -> None:
        """Connect."""
        if self.path:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(10)
            self.sock.connect(self.path)
            return
        tls = ssl._create_unverified_context()  # noqa: S323 - see the documentation above
        self.sock = tls.wrap_socket(
            socket.create_connection(("127.0.0.1", self.tls_port or 443), timeout=10), server_hostname=self.name
        )


def ask(connection: Connection, path: str, host: str) -> tuple[bool, str]:
    """Ask once; returns whether the answer was 2xx, and the answer."""
    try:
        connection.request("GET", path, headers={"Host": host, "Accept": "application/json"})
        answer = connection.getresponse()
        text = " ".join(answer.read(1000).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException) as error:
        return False, str(error) or type(error).__name__
    finally:
        connection.close()
    return 200 <= answer.status < 300, f"{answer.status} {text}"[:300]


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path"},
            "port": {"type": "int"},
            "name": {"type": "str"},
            "path": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "timeout": {"type": "float", "default": 120},
        },
        required_one_of=[("socket", "port")],
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode or (p["socket"] and not Path(p["socket"]).is_symlink()):
        module.exit_json(changed=False, detail="nothing was deployed here yet")
    deadline = time.monotonic() + p["timeout"]
    while True:
        healthy, detail = ask(Connection(p["socket"], p["port"], p["name"]), p["path"], p["host"])
        if healthy:
            module.exit_json(changed=False, detail=detail)
        if time.monotonic() > deadline:
            module.fail_json(msg=f"It does not serve {p['timeout']:.0f} s after its update: {detail}", detail=detail)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
