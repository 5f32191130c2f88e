"""The module nginx_configuration on a directory of our own, with a stand-in for nginx that refuses "broken"."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.role_templates import ROLES, load_file

# As nginx does, it reads the main file and, by relative paths, the sites next to it, and says where the fault is.
NGINX = """#!/bin/sh
[ "$1 $2 $3" = "-t -q -c" ] || exit 64
directory=$(dirname "$4")
echo asked >> "{calls}"
if grep -rn broken "$4" "$directory"/sites-enabled/*; then exit 1; fi
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loaded = load_file(ROLES / "nginx/library/nginx_configuration.py")
    monkeypatch.setattr(loaded, "PID_FILE", tmp_path / "nginx.pid")
    monkeypatch.setattr(loaded, "RELOADED", tmp_path / "reloaded")
    monkeypatch.setattr(loaded, "STARTS_AT_BOOT", tmp_path / "nginx.service")
    monkeypatch.setattr(loaded, "IPV6_ADDRESSES", tmp_path)
    return loaded


class Server:
    """A directory such as /etc/nginx, and how the module is called on it."""

    def __init__(self, module: ModuleType, root: Path) -> None:
        self.module = module
        self.etc = root / "etc/nginx"
        (self.etc / "sites-enabled").mkdir(parents=True)
        self.calls = root / "calls"
        self.executable = root / "nginx"
        self.executable.write_text(NGINX.format(calls=self.calls))
        self.executable.chmod(0o755)
        self.parameters: dict[str, Any] = {
            "files": [
                {"path": f"{self.etc}/nginx.conf", "content": "main;\n"},
                {"path": f"{self.etc}/sites-available/blog.conf", "content": "listen 80;\n  listen [::]:80;\nsite;\n"},
            ],
            "links": [{"path": f"{self.etc}/sites-enabled/blog.conf", "target": "../sites-available/blog.conf"}],
            "absent": [f"{self.etc}/sites-enabled/default"],
            "needs": [],
            "ipv6": True,
            "directory": str(self.etc),
            "executable": str(self.executable),
        }

    def converge(self, *, check: bool = False, diff: bool = False, **parameters: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.module.converge(self.parameters | parameters, check=check, diff=diff)
        return result

    def write(self, name: str, content: str) -> None:
        (self.etc / name).parent.mkdir(exist_ok=True)
        (self.etc / name).write_text(content)

    def tree(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.etc)): path.read_text() for path in sorted(self.etc.rglob("*")) if path.is_file()
        }

    def site(self, content: str) -> list[dict[str, str]]:
        return [self.parameters["files"][0], {"path": f"{self.etc}/sites-available/blog.conf", "content": content}]


@pytest.fixture
def server(module: ModuleType, tmp_path: Path) -> Server:
    return Server(module, tmp_path)


def test_files_links_and_removals_happen_together_and_once(server: Server) -> None:
    server.write("sites-available/default", "default;\n")
    (server.etc / "sites-enabled/default").symlink_to(server.etc / "sites-available/default")
    first = server.converge()
    assert first["changed"]
    assert len(first["paths"]) == 4
    assert (server.etc / "sites-enabled/blog.conf").readlink() == Path("../sites-available/blog.conf")
    assert (server.etc / "sites-enabled/blog.conf").read_text().endswith("site;\n")
    assert not (server.etc / "sites-enabled/default").is_symlink()
    assert (server.etc / "nginx.conf").stat().st_mode & 0o777 == 0o644
    assert server.converge() == {
        "changed": False,
        "loaded": True,
        "ready": False,
        "paths": [],
        "installed": True,
    }
    assert server.calls.read_text() == "asked\n"
    assert sorted(server.tree()) == [
        "nginx.conf",
        "sites-available/blog.conf",
        "sites-available/default",
        "sites-enabled/blog.conf",
    ]


@pytest.mark.parametrize("check", [False, True])
def test_what_nginx_refuses_is_never_on_disk(server: Server, *, check: bool) -> None:
    server.converge()
    before = server.tree()
    with pytest.raises(server.module.RefusedError) as refused:
        server.converge(check=check, files=server.site("broken\n"))
    assert f"{server.etc}/sites-enabled/blog.conf:1:broken" in refused.value.output
    assert server.tree() == before


def test_a_fault_elsewhere_shows_through_an_absolute_link(server: Server) -> None:
    server.write("sites-available/other", "broken;\n")
    (server.etc / "sites-enabled/other").symlink_to(server.etc / "sites-available/other")
    with pytest.raises(server.module.RefusedError):
        server.converge()
    # And a change that repairs the linked file is judged by what it repairs.
    files = [*server.parameters["files"], {"path": f"{server.etc}/sites-available/other", "content": "mended;\n"}]
    assert server.converge(files=files)["changed"]


def test_a_full_disk_leaves_everything_as_it_was(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.converge()
    before = server.tree()
    sync, left = os.fsync, [3]  # two files into the copy, then one of the two into the directory itself

    def full(descriptor: int) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        server.converge(
            files=[{**file, "content": "new;\n"} for file in server.parameters["files"]],
        )
    assert server.tree() == before


def test_check_mode_tells_and_writes_nothing(server: Server) -> None:
    result = server.converge(check=True, diff=True)
    assert result["changed"]
    assert {part["before"] for part in result["diff"]} == {""}
    assert server.tree() == {}


def test_check_mode_works_without_nginx_and_without_certificates(server: Server) -> None:
    files = server.site("broken without its certificate\n")
    assert server.converge(check=True, files=files, needs=["/nowhere.crt"])["changed"]
    server.executable.unlink()
    assert not server.converge(check=True)["installed"]
    with pytest.raises(server.module.RefusedError, match="install nginx first"):
        server.converge()


def test_no_ipv6_in_the_kernel_or_in_the_settings_leaves_its_lines_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = server.etc / "sites-available/blog.conf"
    server.converge()
    assert "[::]" in site.read_text()
    server.converge(ipv6=False)
    assert site.read_text() == "listen 80;\nsite;\n"
    monkeypatch.setattr(server.module, "IPV6_ADDRESSES", server.etc / "nowhere")
    assert not server.converge()["changed"]


def test_a_wrong_mode_is_put_right(server: Server) -> None:
    server.converge()
    (server.etc / "nginx.conf").chmod(0o600)
    assert server.converge()["paths"] == [f"{server.etc}/nginx.conf"]
    assert (server.etc / "nginx.conf").stat().st_mode & 0o777 == 0o644


def test_ready_means_running_now_and_after_a_reboot(server: Server) -> None:
    server.module.PID_FILE.write_text(str(os.getpid()))
    assert not server.converge()["ready"]
    server.module.STARTS_AT_BOOT.symlink_to("/usr/lib/systemd/system/nginx.service")
    assert server.converge()["ready"]
    server.module.PID_FILE.write_text("")  # as `nginx -t` leaves it when nginx does not run
    assert not server.converge()["ready"]


def test_files_newer_than_the_last_reload_count_as_a_change(server: Server, tmp_path: Path) -> None:
    """An earlier run wrote them and ended before its handlers, or a certificate was renewed without nginx."""
    certificate = tmp_path / "blog.crt"
    certificate.write_text("old")
    server.converge(needs=[str(certificate)])
    server.module.PID_FILE.write_text(str(os.getpid()))
    now = time.time_ns()
    os.utime(server.module.PID_FILE, ns=(now, now))
    assert server.converge(needs=[str(certificate)])["loaded"]

    time.sleep(0.02)
    certificate.write_text("new")
    stale = server.converge(needs=[str(certificate)])
    assert (stale["changed"], stale["loaded"], stale["paths"]) == (True, False, [])

    time.sleep(0.02)
    server.module.RELOADED.touch()
    assert not server.converge(needs=[str(certificate)])["changed"]
