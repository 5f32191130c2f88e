#!/usr/bin/python
"""Ansible module: see in one round trip what a server has of role python."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.python_host import Prefix, problem

DOCUMENTATION = r"""
module: python_state
short_description: See what a server has of role python
description:
  - Changes nothing. The role's tasks then do what is missing, so that a server that lacks nothing costs one round
    trip. A build counts only if it works now.
options:
  prefix:
    {description: Directory of pyenv and of what it built., type: path, required: true}
  build:
    {description: Name of the build that should be there., type: str, required: true}
  key:
    {description: Key that its stamp should hold., type: str, required: true}
  version:
    {description: Version of CPython., type: str, required: true}
  uv:
    {description: uv's virtualenv., type: path, required: true}
  wheels:
    {description: Directory of the wheels., type: path, required: true}
"""

RETURN = r"""
build:
  {description: O(build), type: str, returned: always}
built:
  {description: Whether the build is there and works., type: bool, returned: always}
problem:
  {description: Why a complete build does not work., type: str, returned: always}
active:
  {description: The build that the version's link points to., type: str, returned: always}
uv:
  {description: Version of uv. Empty where there is none that works., type: str, returned: always}
wheels:
  {description: Digest of the wheels. Empty where there are none., type: str, returned: always}
"""


def uv_version(module: AnsibleModule, virtualenv: Path) -> str:
    """Return the version of uv, empty where there is none that runs."""
    uv = virtualenv / "bin" / "uv"
    if not uv.exists():
        return ""
    code, output, _ = module.run_command([str(uv), "--version"])
    words = output.split()
    return str(words[1]) if code == 0 and len(words) > 1 else ""


def main() -> None:
    """Answer with what is there."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "required": True},
            "build": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": False},
            "version": {"type": "str", "required": True},
            "uv": {"type": "path", "required": True},
            "wheels": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    prefix = Prefix(p["prefix"])
    complete = prefix.build_key(p["build"]) == p["key"]
    trouble = problem(module, prefix.builds / p["build"]) if complete else ""
    digest = Path(p["wheels"]) / ".hardstand-digest"
    module.exit_json(
        changed=False,
        build=p["build"],
        built=complete and not trouble,
        problem=trouble,
        active=prefix.active(p["version"]),
        uv=uv_version(module, Path(p["uv"])),
        wheels=digest.read_text().strip() if digest.is_file() else "",
    )


if __name__ == "__main__":
    main()
