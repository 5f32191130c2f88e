"""Files on a server that are replaced in one step: a reader sees the old or the new, also after a power failure."""

from __future__ import annotations

import os
import tempfile
import typing as t
from pathlib import Path


class NewFile(t.NamedTuple):
    """A file as it is to be; without an owner and a group it gets those of the process."""

    path: Path
    content: str | bytes
    mode: int
    uid: int = -1
    gid: int = -1


def write_file(path: Path, content: str | bytes, mode: int, uid: int = -1, gid: int = -1) -> None:
    """Replace a file, and leave it as it was where that fails; nobody ever sees it with wider rights."""
    replace_files([NewFile(path, content, mode, uid, gid)])


def replace_files(files: t.Sequence[NewFile]) -> None:
    """Replace every file, or none of them.

    All are written and synced under passing names first, where a full disk shows; the renames cannot fail for that.
    """
    staged: list[Path] = []
    try:
        for new in files:
            # Hidden, and without the ending of its name, so that no program that reads a directory takes it for one of
            # its files. mkstemp creates 0600, so a key is never readable by others, not for an instant.
            descriptor, name = tempfile.mkstemp(dir=new.path.parent, prefix=f".{new.path.name}.")
            staged.append(Path(name))
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(new.content.encode() if isinstance(new.content, str) else new.content)
                stream.flush()
                os.fchown(descriptor, new.uid, new.gid)
                os.fchmod(descriptor, new.mode)
                os.fsync(descriptor)
        for beside, new in zip(staged, files, strict=True):
            beside.replace(new.path)
    except BaseException:
        for beside in staged:
            beside.unlink(missing_ok=True)
        raise


def diff_of(path: Path, before: str | None, after: str | None) -> dict[str, str]:
    """Return what `--diff` shows of a file; None is for one that is not there."""
    return {"before_header": str(path), "after_header": str(path), "before": before or "", "after": after or ""}


def replace_symlink(path: Path, target: str) -> None:
    """Point a symbolic link elsewhere with one rename(2): `ln -sfn` leaves a moment without a link."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(path)
    # A link may decide what a rebooted server serves, so it must be on the disk before what it led to goes.
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
