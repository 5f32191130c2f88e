#!/usr/bin/python
"""Ansible module: reload nginx and see that it did."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: nginx_reload
short_description: Reload nginx and wait until the new configuration is in use
description:
  - C(systemctl reload nginx) only sends a signal and reports success whatever comes of it. When nginx then cannot use
    the configuration (a port that another program holds is the usual reason, and C(nginx -t) does not see it), it
    goes on with the old one, and stays down after the next reboot.
  - This module sends the signal and waits for workers that were not there before. Without them it fails, with what
    nginx wrote to its error log.
  - Remembers when, so that M(nginx_configuration) knows what nginx runs with.
options:
  timeout:
    description: How long to wait for new workers, in seconds. nginx tries a busy port for 2.5 seconds.
    type: int
    default: 10
  error_log:
    description: nginx's main error log.
    type: path
    default: /var/log/nginx/error.log
author: Hardstand
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Reload nginx
  nginx_reload:
"""

RETURN = r"""
output:
  description: What nginx wrote to its error log meanwhile.
  type: str
  returned: failure
"""

PID_FILE = Path("/run/nginx.pid")
RELOADED = Path("/run/hardstand-nginx.reloaded")  # as old as the last reload; nginx_configuration asks it
POLL_SECONDS = 0.05


def master() -> int | None:
    """Return the process id of nginx's master, or None when nginx does not run."""
    try:
        pid = int(PID_FILE.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None
    return pid if Path(f"/proc/{pid}").exists() else None


def workers(parent: int) -> set[int]:
    """Return the process ids of the worker processes whose parent is `parent`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # man 5 proc: the parent is the second field after the command, which is in parentheses and free text.
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.add(int(entry.name))
    return found


def size(path: Path) -> int:
    """Return the size of `path` in bytes; 0 when it does not exist."""
    return path.stat().st_size if path.exists() else 0


def written_since(path: Path, offset: int) -> str:
    """Return what was appended to `path` after `offset` bytes."""
    if not path.exists():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(offset)
        return stream.read().strip()


def reload(module: AnsibleModule) -> None:
    """Reload nginx, and end the module when new workers are there or the time is up."""
    parent = master()
    if parent is None:
        module.fail_json(msg="nginx does not run; `journalctl -u nginx` on the server says why.")
        return

    error_log = Path(module.params["error_log"])
    offset, old = size(error_log), workers(parent)
    begun = time.time_ns()
    module.run_command(["systemctl", "reload", "nginx"], check_rc=True)
    deadline = time.monotonic() + module.params["timeout"]
    while not workers(parent) - old:
        if time.monotonic() > deadline:
            output = written_since(error_log, offset)
            module.fail_json(
                msg=f"nginx did not take the new configuration and goes on with the old one.\n{output}", output=output
            )
        time.sleep(POLL_SECONDS)
    RELOADED.touch()
    os.utime(RELOADED, ns=(begun, begun))
    module.exit_json(changed=True)


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "timeout": {"type": "int", "default": 10},
            "error_log": {"type": "path", "default": "/var/log/nginx/error.log"},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True)
    reload(module)


if __name__ == "__main__":
    main()
