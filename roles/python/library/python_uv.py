#!/usr/bin/python
"""Ansible module: install uv into a virtualenv of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.python_host import PythonError, put_in_place

DOCUMENTATION = r"""
module: python_uv
short_description: Install uv into a virtualenv of its own
description:
  - The virtualenv is made beside its place and moved there when uv answers, so an interrupted run leaves the old one.
options:
  path:
    {description: The virtualenv., type: path, required: true}
  version:
    {description: Version of uv., type: str, required: true}
  python:
    {description: Interpreter that makes the virtualenv., type: path, required: true}
  wheels:
    {description: Directory of wheels to install from instead of an index., type: str, default: ""}
"""

# pip of an older CPython trusts a list of its own otherwise, not the server's.
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def main() -> None:
    """Make the virtualenv anew."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "python": {"type": "path", "required": True},
            "wheels": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode:
        module.exit_json(changed=True)

    path = Path(p["path"])
    source = ["--no-index", f"--find-links={p['wheels']}"] if p["wheels"] else []
    with tempfile.TemporaryDirectory(prefix=".uv-", dir=path.parent) as directory:
        new = Path(directory, "new")
        module.run_command([p["python"], "-I", "-m", "venv", "--without-pip", str(new)], check_rc=True)
        pip = [p["python"], "-I", "-m", "pip", "--python", str(new / "bin" / "python"), "--disable-pip-version-check"]
        code, _, errors = module.run_command(
            [*pip, "install", "--quiet", "--no-cache-dir", "--only-binary=:all:", *source, f"uv=={p['version']}"],
            environ_update={"PIP_CERT": CERTIFICATES} if Path(CERTIFICATES).is_file() else {},
        )
        if code != 0:
            module.fail_json(
                msg=f"uv {p['version']} cannot be installed on this server:\n{errors.strip()}\n"
                "A server without a way to a package index takes wheels from the control node: python_wheel_directory."
            )
        module.run_command([str(new / "bin" / "uv"), "--version"], check_rc=True)
        new.chmod(0o755)
        try:
            put_in_place(new, path, "pyvenv.cfg")
        except PythonError as error:
            module.fail_json(msg=str(error))
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
