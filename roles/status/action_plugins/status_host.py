"""Action plugin: the module ``status_host``, for a server that may be gone.

A server that cannot be reached, or cannot run the module, is an answer like any other here, and no failure.

Arguments: the module's own (``library/status_host.py``).

Returns ``status``, as the module does, or ``problem``: why there is none.
"""

from __future__ import annotations

import re
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Ask one server for its status."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the server's status, or why there is none."""
        super().run(tmp, task_vars)
        try:
            result = self._execute_module(
                module_name="status_host", module_args=self._task.args, task_vars=task_vars or {}
            )
        except AnsibleConnectionFailure as error:
            # ssh says what is the matter last, after its banners and its warnings.
            said = re.sub(
                r"^(Failed to connect|Data could not be sent).*?ssh: (ssh: )?",
                "",
                str(error).strip().rpartition("\n")[2],
            )
            return {"changed": False, "problem": f"cannot be reached: {said}"}
        if result.get("failed"):
            said = str(result.get("module_stderr") or result.get("msg") or "failed").strip().rpartition("\n")[2]
            return {"changed": False, "problem": f"cannot be asked: {said}"}
        return {"changed": False, "status": result["status"]}
