#!/usr/bin/python
"""Ansible module: put the control node's wheels on the server."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.python_host import PythonError, put_in_place, unpack

DOCUMENTATION = r"""
module: python_wheels
short_description: Put the control node's wheels on the server
description:
  - Replaces the server's directory of wheels by what an archive holds.
  - Called by the action plugin of the same name, which makes and ships the archive.
options:
  source:
    {description: Directory on the control node. The action plugin makes it an archive., type: path, required: true}
  path:
    {description: The directory., type: path, required: true}
  digest:
    {description: What to remember the wheels by., type: str, required: true}
"""

# What the role knows its own directory by, and what is in it.
MARK = ".hardstand-digest"


def main() -> None:
    """Unpack beside, then swap."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "path", "required": True},
            "path": {"type": "path", "required": True},
            "digest": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=True)
    path = Path(p["path"])
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=path.parent) as directory:
        new = Path(directory, "new")
        try:
            unpack(module, Path(p["source"]), new)
            for wheel in new.iterdir():
                wheel.chmod(0o644)
            (new / MARK).write_text(f"{p['digest']}\n")
            new.chmod(0o755)
            put_in_place(new, path, MARK)
        except PythonError as error:
            module.fail_json(msg=str(error))
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
