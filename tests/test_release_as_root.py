"""Without root: the tests that change accounts, in a user namespace where they may (Debian's package uidmap)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import NEEDS_ROOT

TESTS = Path(__file__).resolve().parent


def test_what_needs_root() -> None:
    """With root they are collected as they are, and this has nothing to add."""
    assert all((TESTS / name).is_file() for name in NEEDS_ROOT)
    if os.geteuid() == 0:
        return
    namespace = ["unshare", "--user", "--map-root-user", "--map-auto", "--"]
    command = [*namespace, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *NEEDS_ROOT]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
