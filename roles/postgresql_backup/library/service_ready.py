#!/usr/bin/python
"""Ansible module: wait until an application serves again."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import check_health

DOCUMENTATION = r"""
module: service_ready
short_description: Wait until an application behind a unix socket serves
description:
  - Asks for its health check until the answer is 2xx or the time is over. Never fails over what it finds.
  - Where nothing has ever been deployed there is nothing to wait for.
options:
  socket: {description: Socket of the application., type: path, required: true}
  path: {description: Path of the health check., type: str, required: true}
  host: {description: The Host header., type: str, required: true}
  timeout: {description: Seconds to wait., type: float, default: 120}
attributes:
  check_mode: {support: full}
author:
  - Hardstand
"""

EXAMPLES = r"""
- name: Wait until the application serves again
  service_ready:
    socket: /srv/blog/run/live.sock
    path: /health/ready
    host: blog.example.org
"""

RETURN = r"""
ready: {description: Whether it serves; true also where there is no application., type: bool, returned: always}
detail: {description: What it said last., type: str, returned: always}
"""

# Seconds between two questions.
INTERVAL = 0.2


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        {
            "socket": {"type": "path", "required": True},
            "path": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "timeout": {"type": "float", "default": 120},
        },
        supports_check_mode=True,
    )
    p = module.params
    socket = Path(p["socket"])
    if module.check_mode or not socket.is_symlink():
        module.exit_json(changed=False, ready=True, detail="there is no application here")
    deadline = time.monotonic() + p["timeout"]
    while True:
        answer = check_health(socket, p["path"], p["host"])
        if answer.healthy or time.monotonic() > deadline:
            module.exit_json(changed=False, ready=answer.healthy, detail=" ".join(answer.text.split())[:300])
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main()
