"""Action plugin: ship the control node's wheels to a host, all in one archive."""

from __future__ import annotations

import tarfile
import tempfile
import typing as t
from pathlib import Path

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Pack the directory, copy the archive, call the module of the same name."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Ship the wheels; in check mode say so only."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        source = Path(self._task.args["source"]).expanduser()
        wheels = sorted(source.glob("*.whl"))
        if self._task.check_mode:
            return {**result, "changed": True, "msg": f"{len(wheels)} wheels would be copied"}
        self._make_tmp_path()
        try:
            with tempfile.NamedTemporaryFile(suffix=".tar") as packed:
                # Wheels are compressed already.
                with tarfile.open(packed.name, "w") as archive:
                    for wheel in wheels:
                        archive.add(wheel.resolve(), arcname=wheel.name)
                remote = self._connection._shell.join_path(self._connection._shell.tmpdir, "wheels.tar")
                self._transfer_file(packed.name, remote)
            self._fixup_perms2((self._connection._shell.tmpdir, remote))
            module: dict[str, t.Any] = self._execute_module(
                module_args={**self._task.args, "source": remote}, task_vars=task_vars
            )
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return {**result, **module}
