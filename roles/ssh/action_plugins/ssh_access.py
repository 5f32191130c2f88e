"""Action plugin: change who may log in, prove by a new login that it works, and only then let it stand.

Runs the module of the same name, which documents what happens on the server. Its own part, on the control node: between
the change and its being kept it opens a second, fresh connection as the administrator that later runs use, and becomes
root there. When that does not work everything is taken back through the connection that is still open, or by the
server's own timer when that one is lost too.

Arguments, beside the module's own:
    operator: who has to be able to log in.
    settings_file: where an operator corrects ssh_admins.
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
        """Return what the module returns, or a failure that says what to correct and that nothing was changed."""
        super().run(tmp, task_vars)
        self.task_vars = task_vars or {}
        arguments = dict(self._task.args)
        operator = str(arguments.pop("operator", "") or "")
        self.settings = arguments.pop("settings_file", "group_vars/all/vars.yml")
        self.host = self.task_vars["inventory_hostname"]
        admins = arguments.get("admins") or []
        asks = any(admin["name"] == operator and admin.get("sudo") == "password" for admin in admins)
        password = self._become_password() if asks else None
        if asks and not password and SECOND.goes_by_ssh(self._connection):
            return self._failure(
                f"ssh_admins ({self.settings}) has sudo ask {operator} for a password, and Ansible has none: run "
                f"it with --ask-become-pass, once {operator} has a password (sudo passwd {operator} on the server)"
            )
        result = self._module(arguments)
        if result.get("failed"):
            return self._failure(str(result.get("msg", "failed")))
        if not result.get("armed"):
            return result
        if SECOND.goes_by_ssh(self._connection):
            command = "sudo -k -S -p '' true" if password else "sudo -n true"
            proof = SECOND.log_in(
                self._connection, self._play_context, operator or None, command, f"{password}\n" if password else None
            )
            if not proof.ok:
                return self._undo(operator, proof, int(arguments.get("undo_seconds", 90)))
            if operator:
                # Root's way in is closed: where connections are not shared, the next one has to be the administrator's.
                self._connection.set_option("remote_user", operator)
        kept = self._module({"state": "kept"})
        if kept.get("failed"):
            return self._failure(str(kept.get("msg", "failed")))
        return result

    def _undo(self, operator: str, proof: t.Any, seconds: int) -> dict[str, t.Any]:
        if proof.logged_in:
            text = (
                f'"{operator}" logs in, and cannot become root: {proof.reason}. Look at the files in /etc/sudoers.d '
                f"that are not ours, and at sudo of {operator} in ssh_admins ({self.settings})"
            )
        else:
            text = (
                f'"{operator}" could not log in: {proof.reason}. Look at the keys of {operator} in ssh_admins '
                f"({self.settings}), at the key that Ansible uses (ansible_ssh_private_key_file), and at other files "
                "in /etc/ssh/sshd_config.d"
            )
        if SECOND.taken_back(lambda: self._module({"state": "undone"})):
            return self._failure(text)
        return self._failure(text, f"The server takes everything back by itself, within {seconds} seconds.")

    def _become_password(self) -> str | None:
        if self._connection.become is None:
            return None
        password = self._connection.become.get_option("become_pass", playcontext=self._play_context)
        return str(password) if password else None

    def _module(self, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        result: dict[str, t.Any] = self._execute_module(
            module_name="ssh_access", module_args=arguments, task_vars=self.task_vars
        )
        return result

    def _failure(self, text: str, ending: str = "Nothing has been changed: one logs in as before.") -> dict[str, t.Any]:
        failed: dict[str, t.Any] = SECOND.failure(self.host, text, ending)
        return failed
