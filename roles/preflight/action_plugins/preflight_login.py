"""Action plugin: find out as whom this run can log in.

The inventory names an administrator, and a server that was never deployed to knows only root. This tries the one, and
the other only where the server refuses the first: later runs cost nothing, because the connection that is opened here
is the one that the rest of the run uses.

Arguments:
    admins: names of those who may log in once role ssh has run.
    settings_file: where an operator adds an administrator.
    source: where the server is defined, as ``file:line``.

Returns ``user``, who the inventory says logs in, and ``fallback``: whether only root can, in this run. A server that
does not answer at all is the next task's business, which knows what to say.
"""

from __future__ import annotations

import getpass
import runpy
import typing as t
from pathlib import Path
from types import SimpleNamespace

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

# An action plugin has no other way to import what several share.
SECOND = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).resolve().parents[1] / "plugin_utils" / "second_connection.py"))
)


def problem(user: str, admins: t.Sequence[str]) -> str:
    """Return why runs could not go on as this user once role ssh has run; empty when they can."""
    if user in admins:
        return ""
    who = f'Ansible logs in as "{user}"'
    if user == "root":
        return f"{who}, and with ssh_admins root can log in no longer."
    return f"{who}, who is not among ssh_admins and could log in no longer."


class ActionModule(ActionBase):
    """Try the user that the inventory names, then root."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return who logs in, and whether it is root for now."""
        super().run(tmp, task_vars)
        if not SECOND.goes_by_ssh(self._connection):
            return {"changed": False, "user": "", "fallback": False}
        user = self._connection.get_option("remote_user") or getpass.getuser()
        admins = list(self._task.args.get("admins") or [])
        if text := problem(user, admins):
            source = self._task.args.get("source", "hosts.yml")
            settings = self._task.args.get("settings_file", "group_vars/all/vars.yml")
            names = " or ".join(admins)
            hint = f"Set ansible_user to {names} (ssh_admins in {settings}); a fresh server is reached as root anyway."
            return {"failed": True, "changed": False, "msg": f"{source}: {text} {hint}\nNothing has been changed."}
        result = {"changed": False, "user": user, "fallback": False}
        try:
            self._low_level_execute_command("true", sudoable=False)
        except AnsibleConnectionFailure as error:
            if (
                "Permission denied" in str(error)
                and SECOND.log_in(self._connection, self._play_context, "root", tries=1).ok
            ):
                result["fallback"] = True
        return result
