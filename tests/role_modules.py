"""A role's modules in processes of their own, as on a server, without Ansible's way there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What Ansible's own wrapper does: the role's module_utils are there, the module's arguments are on standard input.
_RUNNER = """
import runpy, sys
import ansible.module_utils
from ansible.module_utils import basic
ansible.module_utils.__path__.append(sys.argv[1])
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.stdin.buffer.read(), "legacy"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_module(
    role: Path, name: str, arguments: Mapping[str, Any], *, check: bool = False
) -> subprocess.Popen[bytes]:
    """Start a module of a role; it may be killed."""
    command = [sys.executable, "-c", _RUNNER, str(role / "module_utils"), str(role / "library" / f"{name}.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdin is not None
    asked = {"_ansible_check_mode": check, "_ansible_diff": True, **arguments}
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": asked}).encode())
    process.stdin.close()
    process.stdin = None
    return process


def result_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return what a started module says."""
    out, err = process.communicate(timeout=60)
    try:
        result: dict[str, Any] = json.loads(out)
    except ValueError:
        raise AssertionError(f"the module broke:\n{err.decode()}\n{out.decode()}") from None
    return result


def run_module(role: Path, name: str, arguments: Mapping[str, Any], *, check: bool = False) -> dict[str, Any]:
    """Run a module of a role; returns its result."""
    return result_of(start_module(role, name, arguments, check=check))
