#!/usr/bin/python
"""Ansible module: nginx's configuration files as one transaction, tested before any of them is replaced."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: nginx_configuration
short_description: Replace nginx's configuration files, all of them or none
description:
  - Tests the configuration as it would be, in a private copy of nginx's directory, and only then replaces the files.
    A configuration that nginx refuses is never on disk, so it cannot stop nginx at the next reboot either.
  - One transaction and one round trip for any number of files. A test per file would see mixtures of old and new.
  - The main file has to include others by relative paths, for the test to see the copy and not the original.
  - Reports a change as well when nginx runs with older files than those on disk, because an earlier run ended before it
    reloaded nginx. Without that, a renewed certificate could lie there unused until it is too late.
  - In check mode on a server without nginx, or without one of the files in I(needs), the test is left out.
options:
  files:
    description: Files to write, each with C(path) and C(content). Missing directories are made. Mode 0644, owner root.
    type: list
    elements: dict
    required: true
  links:
    description: Symbolic links, each with C(path) and C(target). A relative target works in the copy as well.
    type: list
    elements: dict
    default: []
  absent:
    description: Files and links to remove.
    type: list
    elements: path
    default: []
  needs:
    description: Files that nginx reads when it reloads and that another role makes, such as certificates.
    type: list
    elements: path
    default: []
  ipv6:
    description:
      - Keep the C(listen [::]:…) lines. They are left out on a kernel without IPv6, whatever this says, because nginx
        would not start.
    type: bool
    default: true
  sandbox:
    description: Whether nginx is to run in a sandbox. A warning says so where it does not, or does and should not.
    type: bool
  directory:
    description: nginx's directory.
    type: path
    default: /etc/nginx
  executable:
    description: The nginx to test with.
    type: path
    default: /usr/sbin/nginx
author: Hardstand
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Put the site's configuration in place
  nginx_configuration:
    files:
      - path: /etc/nginx/sites-available/blog.conf
        content: "{{ lookup('ansible.builtin.template', 'site.conf.j2') }}"
    links:
      - path: /etc/nginx/sites-enabled/blog.conf
        target: ../sites-available/blog.conf
"""

RETURN = r"""
paths:
  description: What was written, linked or removed.
  type: list
  elements: str
  returned: success
loaded:
  description: Whether nginx already ran with what was on disk before this task.
  type: bool
  returned: success
ready:
  description: Whether nginx runs and starts at boot, so that nothing has to be asked of systemd.
  type: bool
  returned: success
installed:
  description: Whether nginx is there. False only in check mode.
  type: bool
  returned: success
output:
  description: What nginx said when it refused the configuration.
  type: str
  returned: failure
"""

FILE_MODE = 0o644
LISTEN_IPV6 = re.compile(r"^[ \t]*listen[ \t]+\[::\]:.*\n", re.MULTILINE)
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
PID_FILE = Path("/run/nginx.pid")
STARTS_AT_BOOT = Path("/etc/systemd/system/multi-user.target.wants/nginx.service")
RELOADED = Path("/run/hardstand-nginx.reloaded")  # as old as the last reload; nginx_reload keeps it


class RefusedError(Exception):
    """nginx refuses the configuration, or is not there to be asked."""

    def __init__(self, message: str, output: str = "") -> None:
        """Keep the message for the operator and nginx's own output."""
        super().__init__(message)
        self.output = output


class Change:
    """One path and what it should become: text, a link's target, or nothing at all."""

    def __init__(self, path: str, *, content: str | None = None, target: str | None = None) -> None:
        """Describe `path` as a file with `content`, as a link to `target`, or, with neither, as absent."""
        self.path = Path(path)
        self.content = content
        self.target = target

    @staticmethod
    def state(path: Path) -> str:
        """Return what is at `path`, as text for a comparison and for a diff."""
        if path.is_symlink():
            return f"link to {path.readlink()}\n"
        if not path.exists():
            return ""
        return path.read_text(encoding="utf-8", errors="surrogateescape")

    @property
    def wanted(self) -> str:
        """What `state` returns once the change is made."""
        if self.target is not None:
            return f"link to {self.target}\n"
        return self.content or ""

    def needed(self) -> bool:
        """Return whether the path differs from what it should be."""
        if self.state(self.path) != self.wanted or self.path.is_symlink() != (self.target is not None):
            return True
        return self.content is not None and self.path.stat().st_mode & 0o7777 != FILE_MODE

    def make(self, path: Path) -> None:
        """Make the file or the link, as `path`."""
        if self.target is not None:
            path.symlink_to(self.target)
            return
        with path.open("w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(self.content or "")
            stream.flush()
            os.fsync(stream.fileno())
        path.chmod(FILE_MODE)


def apply(changes: list[tuple[Change, Path]]) -> None:
    """Make each change at the path beside it.

    All files are written beside their place first, where a full disk shows; the renames cannot fail for that. Links and
    removals come last: a site is enabled only when all that it includes is there.
    """
    with contextlib.ExitStack() as stack:
        staged: list[tuple[Path | None, Path]] = []
        for change, path in sorted(changes, key=lambda pair: pair[0].content is None):
            if change.content is None and change.target is None:
                staged.append((None, path))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # Hidden, so that nginx's include patterns do not match it.
            beside = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".hardstand-"))
            change.make(Path(beside) / path.name)
            staged.append((Path(beside) / path.name, path))
        for made, path in staged:
            if made is None:
                path.unlink(missing_ok=True)
            else:
                made.replace(path)


def test(changes: list[Change], directory: Path, executable: Path) -> None:
    """Ask nginx about `directory` as it will be after `changes`.

    Raises RefusedError, with what nginx said, when it says no.
    """
    with tempfile.TemporaryDirectory(prefix="nginx-test-") as scratch:
        copy = Path(scratch) / directory.name
        shutil.copytree(directory, copy, symlinks=True)
        for link in [path for path in copy.rglob("*") if path.is_symlink()]:
            target = link.readlink()
            if target.is_absolute() and target.is_relative_to(directory):
                link.unlink()
                link.symlink_to(copy / target.relative_to(directory))
        apply(
            [
                (change, copy / change.path.relative_to(directory))
                for change in changes
                if change.path.is_relative_to(directory)
            ]
        )
        done = subprocess.run(  # noqa: S603
            [str(executable), "-t", "-q", "-c", str(copy / "nginx.conf")],
            capture_output=True,
            text=True,
            check=False,
            umask=0o027,  # the test creates log files that are missing, and logs are not for everybody
        )
        if done.returncode != 0:
            output = (done.stderr + done.stdout).replace(str(copy), str(directory)).strip()
            raise RefusedError(f"nginx refuses this configuration; the one that is there was kept.\n{output}", output)


def runs() -> bool:
    """Return whether the master process that nginx's PID file names is there."""
    try:
        return Path(f"/proc/{int(PID_FILE.read_text(encoding='ascii'))}").exists()
    except (FileNotFoundError, ValueError):
        return False


def in_sandbox() -> bool | None:
    """Return whether nginx runs in a sandbox, which can be told by what no sandbox gives; None when it does not run."""
    if not runs():
        return None
    status = Path(f"/proc/{int(PID_FILE.read_text(encoding='ascii'))}/status").read_text(encoding="ascii")
    return "NoNewPrivs:\t1\n" in status


def is_loaded(paths: list[Path]) -> bool:
    """Return whether nginx was started or reloaded after the last change of all `paths`; True when it does not run.

    nginx writes its PID file when it starts. A file's ctime is when it got its name, which is after it was written.
    """
    if not runs():
        return True
    loaded = max(path.stat().st_mtime_ns for path in (PID_FILE, RELOADED) if path.exists())
    return all(path.lstat().st_ctime_ns <= loaded for path in paths if path.exists())


def converge(parameters: dict[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """Bring the files to what `parameters` ask for and return the module's result; with `check`, write nothing.

    Raises RefusedError when nginx is missing or says no, OSError when the disk does.
    """
    directory, executable = Path(parameters["directory"]), Path(parameters["executable"])
    installed = executable.exists()
    if not installed and not check:
        raise RefusedError(f"{executable} is missing; install nginx first.")

    keep_ipv6 = parameters["ipv6"] and IPV6_ADDRESSES.exists()
    wanted = [
        Change(file["path"], content=file["content"] if keep_ipv6 else LISTEN_IPV6.sub("", file["content"]))
        for file in parameters["files"]
    ]
    wanted += [Change(link["path"], target=link["target"]) for link in parameters["links"]]
    wanted += [Change(path) for path in parameters["absent"]]
    changes = [change for change in wanted if change.needed()]
    read_by_nginx = [change.path for change in wanted if change.path.is_relative_to(directory)]
    loaded = is_loaded(read_by_nginx + [Path(path) for path in parameters["needs"]])

    result: dict[str, Any] = {
        "changed": bool(changes) or not loaded,
        "loaded": loaded,
        "ready": runs() and STARTS_AT_BOOT.is_symlink(),
        "paths": [str(change.path) for change in changes],
        "installed": installed,
    }
    if diff:
        result["diff"] = [
            {
                "before": change.state(change.path),
                "after": change.wanted,
                "before_header": str(change.path),
                "after_header": str(change.path),
            }
            for change in changes
        ]
    missing = [path for path in parameters["needs"] if not Path(path).exists()]
    if changes and not (check and (missing or not installed)):
        test(changes, directory, executable)
    if not check:
        apply([(change, change.path) for change in changes])
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {"path": {"type": "path", "required": True}, "content": {"type": "str", "required": True}},
            },
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "target": {"type": "str", "required": True}},
            },
            "absent": {"type": "list", "elements": "path", "default": []},
            "needs": {"type": "list", "elements": "path", "default": []},
            "ipv6": {"type": "bool", "default": True},
            "sandbox": {"type": "bool"},
            "directory": {"type": "path", "default": "/etc/nginx"},
            "executable": {"type": "path", "default": "/usr/sbin/nginx"},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        result = converge(module.params, check=module.check_mode, diff=module._diff)
    except RefusedError as error:
        module.fail_json(msg=str(error), output=error.output)
    except OSError as error:
        module.fail_json(msg=str(error))
    if module.params["sandbox"] is not None and in_sandbox() is (not module.params["sandbox"]):
        module.warn(
            f"nginx runs {'outside' if module.params['sandbox'] else 'inside'} its sandbox until it starts again, "
            "because a restart would cut connections. At a quiet moment, run on this server: systemctl restart nginx"
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
