#!/usr/bin/python
"""Ansible module: unpack a CPython that another server built."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.python_host import Prefix, PythonError, problem, remove, unpack

DOCUMENTATION = r"""
module: python_unpack
short_description: Unpack a CPython that another server built
description:
  - The build appears under its name in one rename(2), complete, or not at all. pyenv comes with it.
  - Called by the action plugin of the same name, which ships the archive.
options:
  prefix:
    {description: Directory of pyenv and of what it built., type: path, required: true}
  build:
    {description: Name of the build., type: str, required: true}
  key:
    {description: Key that the build's stamp has to hold., type: str, required: true}
  archive:
    {description: "The archive: a file on the control node, which the action plugin ships.", type: path, required: true}
"""


def install(module: AnsibleModule, prefix: Prefix, build: str, key: str, archive: Path) -> None:
    """Unpack an archive beside its place, look at it, and move it there.

    Raises:
        PythonError: the archive is damaged, holds another build, or the build does not work on this server.
    """
    prefix.make()
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=prefix.path) as directory:
        unpack(module, archive, Path(directory))
        incoming = Path(directory, "build")
        manifest = json.loads(Path(directory, "manifest.json").read_text())
        if manifest["key"] != key:
            raise PythonError(f"{archive.name} holds another build than its name says; remove it, and it is made anew")
        place = prefix.builds / build
        # An incomplete build of an interrupted run, perhaps with that run's build still going on.
        module.run_command(["/usr/bin/systemctl", "stop", f"hardstand-python-{build}.service"])
        remove(place)
        incoming.rename(place)
        if prefix.pyenv_version() != manifest["pyenv"]:
            prefix.install_pyenv(Path(directory, "pyenv"), manifest["pyenv"])
    trouble = problem(module, prefix.builds / build)
    if trouble:
        raise PythonError(f"The build that {archive.name} holds does not work on this server: {trouble}")


def main() -> None:
    """Unpack, unless a build that works is there."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "required": True},
            "build": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": False},
            "archive": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    prefix = Prefix(p["prefix"])
    place = prefix.builds / p["build"]
    if prefix.build_key(p["build"]) == p["key"] and not problem(module, place):
        module.exit_json(changed=False)
    if not module.check_mode:
        try:
            install(module, prefix, p["build"], p["key"], Path(p["archive"]))
        except (PythonError, OSError, ValueError, KeyError) as error:
            module.fail_json(msg=str(error))
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
