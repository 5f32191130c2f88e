#!/usr/bin/python
"""Ansible module: install certbot into a virtualenv of its own, from pinned and hashed packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import replace_symlink

DOCUMENTATION = r"""
---
module: certificate_certbot
short_description: Install certbot into a virtualenv of its own
description:
  - Makes a virtualenv from the server's own Python and installs exactly what I(requirements) say, by hash.
  - A virtualenv belongs to the requirements and to the version of Python; when certbot answers,
    I(path)/current leads to it, and older ones are removed. So an interrupted run leaves the old one in use.
options:
  path:
    description: Directory of the virtualenvs. Its parent must exist.
    type: path
    required: true
  requirements:
    description: The packages, each with its version and its hashes, as pip reads them.
    type: str
    required: true
author: Hardstand
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Install certbot
  certificate_certbot:
    path: /opt/certbot
    requirements: "{{ lookup('ansible.builtin.file', 'certbot-requirements.txt') }}"
"""

RETURN = r"""
path:
  description: The virtualenv.
  type: str
  returned: always
"""

# pip of an older CPython trusts a list of its own otherwise, not the server's.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PYTHON = "/usr/bin/python3"


def key(requirements: str, version: str) -> str:
    """Return the name of the virtualenv for these requirements and this version of Python."""
    return hashlib.sha256(f"{version}\n{requirements}".encode()).hexdigest()[:12]


def install(module: AnsibleModule, venv: Path, requirements: str) -> None:
    """Make the virtualenv at `venv`; ends the module when a package cannot be had."""
    # Programs in a virtualenv name its path, so it is made in its place, and counts when the link leads to it.
    shutil.rmtree(venv, ignore_errors=True)
    code, output, errors = module.run_command([PYTHON, "-I", "-m", "venv", str(venv)])
    if code != 0:
        module.fail_json(msg=f"No virtualenv can be made for certbot:\n{(output + errors).strip()}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(requirements)
        file.flush()
        pip = [str(venv / "bin" / "pip"), "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir"]
        code, _, errors = module.run_command(
            [*pip, "--require-hashes", "--no-deps", "--only-binary=:all:", f"--requirement={file.name}"],
            environ_update={"PIP_CERT": str(CERTIFICATES)} if CERTIFICATES.is_file() else {},
        )
    if code != 0:
        module.fail_json(
            msg="certbot cannot be installed on this server, which gets it from a Python package index:\n"
            f"{errors.strip()}"
        )
    module.run_command([str(venv / "bin" / "certbot"), "--version"], check_rc=True)


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "requirements": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path, requirements = Path(module.params["path"]), module.params["requirements"]
    venv = path / key(requirements, ".".join(map(str, sys.version_info[:2])))
    current = path / "current"
    if current.is_symlink() and current.resolve() == venv.resolve() and (venv / "bin" / "certbot").exists():
        module.exit_json(changed=False, path=str(venv))
    if module.check_mode:
        module.exit_json(changed=True, path=str(venv))
    try:
        path.mkdir(mode=0o755, exist_ok=True)
        install(module, venv, requirements)
        replace_symlink(current, venv.name)
        for old in path.iterdir():
            if old.is_dir() and not old.is_symlink() and old != venv:
                shutil.rmtree(old)
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=True, path=str(venv))


if __name__ == "__main__":
    main()
