#!/usr/bin/python
"""Ansible module: give the deploy lock back."""

from __future__ import annotations

import os

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.deploy_lock import DeployLock

DOCUMENTATION = r"""
module: deploy_lock
short_description: Give the deploy lock back
description:
  - Removes the deploy lock of a server if this run holds it, and leaves any other alone.
  - Never fails and never counts as a change. M(preflight_host) takes the lock.
options:
  path:
    description: The lock's file, as M(preflight_host) returns it.
    type: path
    required: true
  token:
    description: The holder's token, as M(preflight_host) returns it.
    type: str
    required: true
attributes:
  check_mode:
    support: full
author:
  - Hardstand
"""

EXAMPLES = r"""
- name: Give the deploy lock back
  deploy_lock:
    path: "{{ __preflight_host.lock.path }}"
    token: "{{ __preflight_host.lock.token }}"
"""

RETURN = r"""
released:
  description: Whether this run held the lock.
  type: bool
  returned: always
"""


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        {"path": {"type": "path", "required": True}, "token": {"type": "str", "required": True, "no_log": False}},
        supports_check_mode=True,
    )
    released = not module.check_mode and DeployLock(module.params["path"], module.params["token"]).release()
    module.exit_json(changed=False, released=released)


if __name__ == "__main__":
    main()
