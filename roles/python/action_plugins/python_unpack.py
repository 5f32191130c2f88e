"""Action plugin: ship a cached build of CPython to a host and unpack it there."""

from __future__ import annotations

import typing as t
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Copy the archive, call the module of the same name."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Ship and unpack; in check mode say so only."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        archive = Path(self._task.args["archive"])
        if self._task.check_mode:
            return {**result, "changed": True, "msg": f"{archive.name} would be unpacked"}
        if not archive.is_file():
            raise AnsibleActionFail(f"No server has built {archive.name}; the host that should have did not get so far")
        self._make_tmp_path()
        try:
            remote = self._connection._shell.join_path(self._connection._shell.tmpdir, archive.name)
            self._transfer_file(str(archive), remote)
            self._fixup_perms2((self._connection._shell.tmpdir, remote))
            module: dict[str, t.Any] = self._execute_module(
                module_args={**self._task.args, "archive": remote}, task_vars=task_vars
            )
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return {**result, **module}
