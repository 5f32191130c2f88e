"""Action plugin: make a vault of fresh secrets, and the password that opens it, on the control node.

Secrets are drawn and encrypted inside this process: no argument list, log, temporary file or result ever holds one.
What exists already, vault or password, is never touched.

Arguments:
    path: the vault to make.
    password_file: file with the vault password; made (0600, random) when there is none.
    random: names to give a random value of 256 bits.
    values: name of the variable that holds more names with their values. A name, so that no secret is an argument of
        the task, which callbacks may show. ``{random}`` inside a value becomes a random password.
    comment: first line of the vault, as people see it in ``ansible-vault edit``.
"""

from __future__ import annotations

import os
import secrets
import typing as t
from pathlib import Path

import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible.plugins.action import ActionBase


def create(path: Path, content: str) -> None:
    """Write a new file that only its owner can read.

    Raises:
        FileExistsError: something is there already.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(content)


def encrypted(text: str, password: str) -> str:
    """Return the text as ``ansible-vault encrypt`` would write it."""
    vault = VaultLib([("default", VaultSecret(password.encode()))])
    return str(vault.encrypt(text).decode())


class ActionModule(ActionBase):
    """Make what is missing of a vault and its password."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return which files were made."""
        super().run(tmp, task_vars)
        arguments = self._task.args
        vault, password_file = Path(arguments["path"]), Path(arguments["password_file"]).expanduser()
        made = [str(file) for file in (password_file, vault) if not file.exists()]
        if made and not self._task.check_mode:
            try:
                if str(password_file) in made:
                    create(password_file, f"{secrets.token_urlsafe(32)}\n")
                if str(vault) in made:
                    values = self._templar.template((task_vars or {}).get(arguments["values"])) or {}
                    content = self._content(arguments["random"], values, arguments["comment"])
                    create(vault, encrypted(content, password_file.read_text("utf-8").strip()))
            except OSError as error:
                raise AnsibleActionFail(f"{error.filename}: {error.strerror}") from error
        return {"changed": bool(made), "made": made}

    @staticmethod
    def _content(random: t.Iterable[str], values: t.Mapping[str, str], comment: str) -> str:
        content = {str(name): secrets.token_urlsafe(32) for name in random}
        for name, value in values.items():
            # Hexadecimal, which needs no escaping wherever it stands in a URL.
            content[str(name)] = str(value).replace("{random}", secrets.token_hex(24))
        return f"---\n# {comment}\n{yaml.safe_dump(content, default_style=None, width=1000, sort_keys=False)}"
