"""Action plugin: build CPython on a host, show how far it is, and bring the build to the control node's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
import typing as t
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

# Seconds between two looks at a build, and between two lines that say the same.
POLL_INTERVAL = 5
LINE_INTERVAL = 20


class ActionModule(ActionBase):
    """Ship the sources, call the module's steps one after the other, fetch the result."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Build, unless in check mode, which only says that it would."""
        task_vars = task_vars or {}
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        args = self._task.args
        if self._task.check_mode:
            return {**result, "changed": True, "msg": f"CPython {args['version']} would be built"}

        self._vars = task_vars
        started = time.monotonic()
        self._make_tmp_path()
        try:
            state = self._step("look")["state"]
            if state == "absent":
                self._step("start", **self._ship_sources(args))
                self._say("the build has started; it takes minutes, and goes on if this run is stopped")
            elif state == "running":
                self._say("an earlier run's build is still going on")
            if state in ("absent", "running"):
                self._wait()
            packed = self._step("finish")
            self._fetch(packed["pack"], packed["sha256"], Path(args["archive"]))
            self._step("clean")
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        self._say(f"done after {_duration(time.monotonic() - started)}, kept as {args['archive']}")
        return {**result, "changed": state != "built", "archive": args["archive"]}

    def _say(self, text: str) -> None:
        """Show a line at once."""
        host = self._vars["inventory_hostname"]
        display.display(f"  [{host}] CPython {self._task.args['version']}: {text}")

    def _step(self, step: str, **extra: str) -> dict[str, t.Any]:
        """Call the module for one step.

        Raises:
            AnsibleActionFail: the step failed; the module's message says why.
        """
        result: dict[str, t.Any] = self._execute_module(
            module_name="python_build",
            module_args={**self._task.args, "step": step, **extra},
            task_vars=self._vars,
        )
        if result.get("failed"):
            raise AnsibleActionFail(result.get("msg", "the module failed"), result=result)
        return result

    def _wait(self) -> None:
        """Return when the build has ended, and show meanwhile what it does."""
        shown, shown_at = "", 0.0
        while (status := self._step("poll"))["state"] == "running":
            phase = status["phase"]
            if phase != shown or time.monotonic() - shown_at >= LINE_INTERVAL:
                detail = f", {status['detail']}" if status["detail"] else ""
                self._say(f"{_duration(status['elapsed'])}, {phase}{detail}")
                shown, shown_at = phase, time.monotonic()
            time.sleep(POLL_INTERVAL)

    def _ship_sources(self, args: dict[str, t.Any]) -> dict[str, str]:
        """Copy what the source directory has to the host; return the module's arguments for it."""
        if not args.get("source_directory"):
            return {}
        directory = Path(args["source_directory"]).expanduser()
        shipped: dict[str, str] = {}
        if (directory / "pyenv").is_dir():
            with tempfile.TemporaryDirectory() as temporary:
                archive = Path(temporary, "pyenv.tar")
                self._archive_pyenv(directory / "pyenv", args["pyenv_version"], archive)
                shipped["pyenv_archive"] = self._ship(archive)
        for name in (f"Python-{args['version']}.tar.xz", f"Python-{args['version']}.tgz"):
            if (directory / name).is_file():
                shipped["source_archive"] = self._ship(directory / name)
                break
        return shipped

    def _ship(self, path: Path) -> str:
        """Copy a file to the host's temporary directory of this task, and return its path there."""
        remote: str = self._connection._shell.join_path(self._connection._shell.tmpdir, path.name)
        self._transfer_file(str(path), remote)
        self._fixup_perms2((self._connection._shell.tmpdir, remote))
        return remote

    def _archive_pyenv(self, checkout: Path, commit: str, archive: Path) -> None:
        """Write an archive of one commit of pyenv.

        Raises:
            AnsibleActionFail: the directory is not a git checkout, or does not have the commit.
        """
        git = subprocess.run(  # noqa: S603
            ["git", "-C", str(checkout), "archive", f"--output={archive}", commit],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        if git.returncode != 0:
            settings = f"{self._vars.get('inventory_dir', 'inventories/<env>')}/group_vars/all/vars.yml"
            raise AnsibleActionFail(
                f"{checkout} does not have pyenv's commit {commit}: {git.stderr.strip()}. Fetch it there, or name in "
                f"{settings} another commit (python_pyenv_version) or directory (python_source_directory)."
            )

    def _fetch(self, remote: str, sha256: str, archive: Path) -> None:
        """Bring a finished build to the cache, where it appears complete or not at all.

        Raises:
            AnsibleActionFail: the file arrived damaged.
        """
        self._say("bringing the build to the control node's cache")
        archive.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=archive.parent, prefix=f".{archive.name}-")
        os.close(descriptor)
        arriving = Path(name)
        try:
            self._connection.fetch_file(remote, name)
            with arriving.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise AnsibleActionFail(f"{remote} arrived damaged on the control node. Run again.")
            arriving.chmod(0o644)
            arriving.rename(archive)
        finally:
            arriving.unlink(missing_ok=True)


def _duration(seconds: float) -> str:
    """Return a time span as people say it: 95 is 1 min 35 s."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
