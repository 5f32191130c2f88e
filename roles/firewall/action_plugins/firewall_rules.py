"""Action plugin: change the firewall's rules, prove by a new login that one can still get in, and only then keep them.

Runs the module of the same name, which documents what happens on the server. Its own part, on the control node: between
the change and its being kept it opens a second, fresh connection, because the one that is there belongs to what the
kernel knows already and passes any rules. When that does not work the rules before are brought back, through the
connection that is still open, or by the server's own timer.

Arguments, beside the module's own:
    settings_file: where an operator corrects ssh_sources.
"""

from __future__ import annotations

import runpy
import typing as t
from pathlib import Path
from types import SimpleNamespace

from ansible.plugins.action import ActionBase

PREFLIGHT = Path(__file__).resolve().parents[2] / "preflight"
# An action plugin has no other way to import what several share.
SECOND = SimpleNamespace(**runpy.run_path(str(PREFLIGHT / "plugin_utils" / "second_connection.py")))


class ActionModule(ActionBase):
    """Apply, prove, and keep or undo."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return what the module returns, or a failure that says what to correct and that the rules are as before."""
        super().run(tmp, task_vars)
        self.task_vars = task_vars or {}
        arguments = dict(self._task.args)
        settings = arguments.pop("settings_file", "group_vars/all/vars.yml")
        result = self._module(arguments)
        if result.get("failed"):
            return self._failure(str(result.get("msg", "failed")))
        if not result.get("armed"):
            return result
        if SECOND.goes_by_ssh(self._connection):
            proof = SECOND.log_in(self._connection, self._play_context, None)
            if not proof.ok:
                text = (
                    f"with the new rules nobody logs in from here: {proof.reason}. Look at ssh_sources and ssh_port "
                    f"({settings}): this control node's address has to be among the sources, as the server sees it"
                )
                return self._undo(text, int(arguments.get("undo_seconds", 60)))
        kept = self._module({"state": "kept"})
        return self._failure(str(kept.get("msg", "failed"))) if kept.get("failed") else result

    def _undo(self, text: str, seconds: int) -> dict[str, t.Any]:
        if SECOND.taken_back(lambda: self._module({"state": "undone"})):
            return self._failure(text)
        return self._failure(text, f"The server goes back to the rules before by itself, within {seconds} seconds.")

    def _module(self, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        result: dict[str, t.Any] = self._execute_module(
            module_name="firewall_rules", module_args=arguments, task_vars=self.task_vars
        )
        return result

    def _failure(self, text: str, ending: str = "The rules are those from before.") -> dict[str, t.Any]:
        failed: dict[str, t.Any] = SECOND.failure(self.task_vars["inventory_hostname"], text, ending)
        return failed
