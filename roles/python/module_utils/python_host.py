"""What the modules of role python share: the layout of the prefix, and how a build becomes one to rely on.

PREFIX/bin, libexec, plugins …   pyenv, at one commit; PREFIX/.hardstand-pyenv says which
PREFIX/builds/<build>            a CPython; complete once its stamp .hardstand-build is there
PREFIX/versions/<version>        -> ../builds/<build>, the interpreter to use
PREFIX/cache, PREFIX/work        only while something is built

What is finished belongs to root: the account that compiles cannot change an interpreter that others run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import typing as t
from pathlib import Path

from ansible.module_utils.host_files import write_file

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

STAMP = ".hardstand-build"
PYENV_STAMP = ".hardstand-pyenv"

# What configure leaves out without a word when a header is missing.
MODULES = "ssl, sqlite3, bz2, lzma, ctypes, zlib, readline, curses, uuid"


class PythonError(Exception):
    """A build cannot be made or used; the text is for the operator."""


class Prefix:
    """The directory of pyenv and of what it built."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.builds = self.path / "builds"
        self.versions = self.path / "versions"
        self.cache = self.path / "cache"
        self.work = self.path / "work"

    def make(self) -> None:
        """Make the directories that are root's."""
        for directory in (self.path, self.builds, self.versions):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)

    def build_key(self, build: str) -> str:
        """Return the key of a complete build, empty where it is missing or incomplete."""
        stamp = self.builds / build / STAMP
        try:
            return str(json.loads(stamp.read_text())["key"])
        except (OSError, ValueError, KeyError):
            return ""

    def active(self, version: str) -> str:
        """Return the build that a version's link points to, empty where there is none."""
        link = self.versions / version
        return link.readlink().name if link.is_symlink() else ""

    def pyenv_version(self) -> str:
        """Return the commit of the pyenv that is installed, empty where none is or only half of one."""
        try:
            return str(json.loads((self.path / PYENV_STAMP).read_text())["commit"])
        except (OSError, ValueError, KeyError):
            return ""

    def install_pyenv(self, tree: Path, commit: str) -> None:
        """Move a tree of pyenv's into place, in the stead of an earlier one.

        Args:
            tree: directory below the prefix that holds the tree; what is left in it may go.
            commit: full sha of what the tree holds.
        """
        stamp = self.path / PYENV_STAMP
        try:
            earlier = list(json.loads(stamp.read_text())["entries"])
        except (OSError, ValueError, KeyError):
            earlier = []
        # pyenv's own tests and its settings for editors and GitHub are of no use here.
        entries = sorted(entry.name for entry in tree.iterdir() if entry.name[0] != "." and entry.name != "test")
        stamp.unlink(missing_ok=True)
        for name in {*earlier, *entries}:
            remove(self.path / name)
        for name in entries:
            (tree / name).rename(self.path / name)
        write_json(stamp, {"commit": commit, "entries": entries})


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, or nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(new: Path, path: Path, mark: str) -> None:
    """Move a finished directory to its place, in the stead of an earlier one of ours.

    Args:
        new: the directory; an earlier one passes through its parent, on the same file system.
        path: its place.
        mark: name of the file in it by which ours is known.

    Raises:
        PythonError: something is there that is not ours.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise PythonError(f"{path} on this server holds what Hardstand did not put there. Move it elsewhere.")
    old = new.parent / "old"
    if path.exists() or path.is_symlink():
        path.rename(old)
    new.rename(path)
    remove(old)


def write_json(path: Path, value: dict[str, t.Any]) -> None:
    """Write a stamp that is there either in full or not at all, also after a power failure."""
    write_file(path, json.dumps(value, indent=2, sort_keys=True) + "\n", 0o644)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(module: AnsibleModule, archive: Path, directory: Path) -> None:
    """Unpack an archive as root's files into a directory.

    Raises:
        PythonError: the archive is damaged, or the disk is full.
    """
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    command = ["/usr/bin/tar", "--extract", "--no-same-owner", f"--file={archive}", f"--directory={directory}"]
    code, _, errors = module.run_command(command)
    if code != 0:
        raise PythonError(f"{archive.name} cannot be unpacked: {errors.strip()}")


def problem(module: AnsibleModule, build: Path) -> str:
    """Return what keeps a build from being used, empty where it works: each module of MODULES can be imported."""
    python = build / "bin" / "python3"
    if not python.exists():
        return f"{python} is missing"
    code, _, errors = module.run_command([str(python), "-I", "-c", f"import {MODULES}"])
    return "" if code == 0 else str(errors.strip().splitlines()[-1])
