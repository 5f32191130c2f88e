"""Files that modules replace in one step: role preflight's module_utils/host_files.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.role_templates import ROLES, load_file

host_files: Any = load_file(ROLES / "preflight/module_utils/host_files.py")


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_file_gets_its_content_and_its_mode_whatever_the_umask_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text, mode in (("old", 0o644), ("new\N{SNOWMAN}", 0o600), (b"bytes", 0o755)):
        before = os.umask(0o077)
        try:
            host_files.write_file(file, text, mode)
        finally:
            os.umask(before)
        assert file.read_bytes() == (text.encode() if isinstance(text, str) else text)
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [file]


def test_who_has_opened_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with file.open() as reader:
        host_files.write_file(file, "new", 0o644)
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_a_disk_that_is_full_leaves_every_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("old key")
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_files.os, "fsync", fsync)
    new = [host_files.NewFile(tmp_path / name, f"new {name}", 0o600) for name in ("key", "certificate")]
    with pytest.raises(OSError, match="No space"):
        host_files.replace_files(new)
    assert content(tmp_path) == {"key": "old key"}
    host_files.replace_files(new)
    assert content(tmp_path) == {"key": "new key", "certificate": "new certificate"}


def test_what_is_in_the_way_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        host_files.write_file(tmp_path / "taken", "text", 0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_link_leads_elsewhere_also_after_a_run_that_was_cut_off(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for target in ("one", "two"):
        (tmp_path / ".current.new").symlink_to("half-done")
        host_files.replace_symlink(link, target)
        assert str(link.readlink()) == target
    assert list(tmp_path.iterdir()) == [link]
