"""Action plugin: read the playbooks and the environment of this control node, and ship them to a control host.

What is shipped: the project's files that git tracks, as they are now, except what only its development needs; and every
source of the inventory, with its vault as it is, encrypted. Not shipped: private keys, whatever their name.

The password of the vault is the one that this run opens it with. It goes to the host in the module's arguments, which
no output shows, and never into a file here.

Arguments, beside the module's own (``library/git_push_project.py``):
    project: directory of the project on this control node.

Returns what the module returns, and ``inventory_arguments``: how ansible-playbook is to be told of the inventory.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import tempfile
import textwrap
import typing as t
from pathlib import Path

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib
from ansible.plugins.action import ActionBase

# What the project has for its development, and the environments: the one that is deployed is shipped by itself.
LEFT_OUT = (".ci/", ".config/", ".github/", "app/", "bench/", "inventories/", "molecule/", "tests/")
PRIVATE_KEY = b"PRIVATE KEY-----"
ENCRYPTED = re.compile(r"^[ \t]*\$ANSIBLE_VAULT;[^\n]+(?:\n[ \t]*[0-9a-f]+[ \t]*$)+", re.MULTILINE)


def tracked(project: Path) -> list[Path]:
    """Return the project's files, relative to it.

    Raises:
        AnsibleActionFail: it is no git checkout.
    """
    command = ["git", "-C", str(project), "ls-files", "-z", "--cached"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise AnsibleActionFail(
            f"{project} is no git checkout, so it cannot be told what belongs to it: {result.stderr.strip()}"
        )
    names = [name for name in result.stdout.split("\0") if name and not name.startswith(LEFT_OUT)]
    return [Path(name) for name in names if (project / name).is_symlink() or (project / name).is_file()]


def environment_of(sources: t.Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Return the inventory's files by their place in the tree, and the sources as they are called there.

    Raises:
        AnsibleActionFail: a source is no file or directory.
    """
    files: dict[str, Path] = {}
    directories: dict[Path, str] = {}
    names = []
    for source in map(Path, sources):
        if not source.exists():
            raise AnsibleActionFail(f"-i {source} is no file or directory, and a control host needs one to be sent.")
        directory = source if source.is_dir() else source.parent
        # Two directories may have one name; there they are siblings.
        same = sum(known.name == directory.name for known in directories if known != directory)
        name = directories.setdefault(directory, directory.name + (f"-{same + 1}" if same else ""))
        names.append(f"inventories/{name}" + ("" if source.is_dir() else f"/{source.name}"))
        for file in sorted(directory.rglob("*")):
            if file.is_file() and ".git" not in file.parts and PRIVATE_KEY not in file.read_bytes():
                files[f"inventories/{name}/{file.relative_to(directory)}"] = file
    return files, names


def password_for(texts: t.Iterable[str], secrets: t.Iterable[tuple[str, t.Any]]) -> str:
    """Return the password that opens all that is encrypted in some texts.

    Raises:
        AnsibleActionFail: no single one does.
    """
    vaults = [textwrap.dedent(found).strip() for text in texts for found in ENCRYPTED.findall(text)]
    vaults = ["\n".join(line.strip() for line in vault.splitlines()) for vault in vaults]
    for name, secret in secrets:
        library = VaultLib([(name, secret)])
        try:
            for vault in vaults:
                library.decrypt(vault.encode())
        except AnsibleError:
            continue
        return str(secret.bytes.decode())
    raise AnsibleActionFail(
        "No single password opens everything that is encrypted in the inventory, and a control host has one. "
        "Encrypt it anew with the password of the vault: ansible-vault rekey"
    )


def add(archive: tarfile.TarFile, digest: t.Any, name: str, file: Path, follow: bool) -> None:
    """Add a file to the archive and to the digest, without owner and time, which mean nothing elsewhere."""
    entry = tarfile.TarInfo(name)
    content = b""
    if file.is_symlink() and not follow:
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(file.readlink()), 0o777
    else:
        content = file.read_bytes()
        entry.size, entry.mode = len(content), 0o755 if file.stat().st_mode & 0o100 else 0o644
    for part in (name, oct(entry.mode), entry.linkname):
        digest.update(part.encode() + b"\0")
    digest.update(hashlib.sha256(content).digest())
    archive.addfile(entry, io.BytesIO(content))


class ActionModule(ActionBase):
    """Ship what the host does not have."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return what was done."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = dict(self._task.args)
        project = Path(arguments.pop("project"))
        environment, names = environment_of(task_vars.get("ansible_inventory_sources") or [])
        texts = [file.read_text("utf-8", errors="replace") for file in environment.values()]
        arguments["vault_password"] = password_for(texts, self._loader._vault.secrets or [])

        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(prefix="hardstand-", suffix=".tar.gz") as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
                for path in tracked(project):
                    add(archive, digest, str(path), project / path, follow=False)
                for name, path in environment.items():
                    add(archive, digest, name, path, follow=True)
            file.flush()
            arguments["digest"] = digest.hexdigest()[:16]
            module = self._module(arguments, task_vars)
            if module.get("archive_wanted"):
                module = self._ship(arguments, task_vars, file.name)
        module.pop("invocation", None)
        reach = f"{arguments['root']}/reach"
        module["inventory_arguments"] = [word for name in [*names, reach] for word in ("-i", name)]
        return {**result, **module}

    def _module(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        module: dict[str, t.Any] = self._execute_module(
            module_name="git_push_project", module_args=arguments, task_vars=task_vars
        )
        return module

    def _ship(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any], archive: str) -> dict[str, t.Any]:
        self._make_tmp_path()
        shell = self._connection._shell
        try:
            remote = shell.join_path(shell.tmpdir, "project.tar.gz")
            self._transfer_file(archive, remote)
            self._fixup_perms2((shell.tmpdir, remote))
            return self._module({**arguments, "archive": remote}, task_vars)
        finally:
            self._remove_tmp_path(shell.tmpdir)
