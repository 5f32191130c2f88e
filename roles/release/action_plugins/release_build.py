"""Action plugin: render what a release consists of besides its code, ship what the server lacks, and build it there.

Runs the module of the same name, which documents what happens on the server. Its own part, on the control node:

- writes `.env`, so that secrets leave the vault in one place and in one argument that no output shows;
- computes the release id, `<short sha>-<config digest>`: the digest covers every rendered file, so a changed setting
  is a new release, and the same commit with the same configuration has the same id on every host;
- ships a git pack of what the server lacks. What was shipped last is remembered, so that in the normal case the
  pack goes along with the one call; when the memory is wrong the server says so, and gets a full answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
import typing as t
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

# A pack up to this size (bytes) travels inside the module call; a larger one is copied as a file first.
_INLINE_PACK = 4_000_000

# What the template module calls ansible_managed; the setting that changed it is deprecated.
_MANAGED = "Ansible managed"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOOK_VARIABLES = (
    "GIT_DIR",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
)
_SHA = re.compile(r"[0-9a-f]{40}")

_FILES = {
    "gunicorn.conf.py": ("gunicorn.conf.py.j2", None),
    "blue.conf": ("supervisor.conf.j2", "blue"),
    "green.conf": ("supervisor.conf.j2", "green"),
}


def encode_dotenv(values: t.Mapping[str, t.Any]) -> str:
    """Return values as the lines of a `.env` that python-dotenv and pydantic-settings read back unchanged.

    python-dotenv expands `${…}` even inside double quotes and knows no escape for it; `${__:-$}{` expands to `${`.

    Raises:
        AnsibleActionFail: a value cannot be carried by an environment variable.
    """
    lines = []
    for name, value in sorted(values.items()):
        if not _NAME.fullmatch(name):
            raise AnsibleActionFail(
                f"{name!r} in release_env or release_secrets is not a name that an environment can have."
            )
        if isinstance(value, bool):
            value = "true" if value else "false"
        text = "" if value is None else str(value)
        if "\0" in text:
            raise AnsibleActionFail(f"The value of {name} contains a NUL character, which no environment can carry.")
        text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f'{name}="{text.replace("${", "${__:-$}{")}"')
    return "".join(f"{line}\n" for line in lines)


def make_pack(path: str, commit: str, have: t.Iterable[str]) -> bytes:
    """Return a git pack with all that `commit` needs and a holder of the commits `have` lacks."""
    shas = [sha for sha in have if _SHA.fullmatch(sha)]
    known = [sha for sha in shas if not _git(path, "cat-file", "-e", f"{sha}^{{commit}}").returncode]
    wanted = "\n".join([commit, *(f"^{sha}" for sha in known)]) + "\n"
    result = _git(
        path, "pack-objects", "--revs", "--thin", "--stdout", "--quiet", "--delta-base-offset", stdin=wanted.encode()
    )
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip()
        raise AnsibleActionFail(f"git cannot pack {commit[:12]} of {path}: {said}")
    return result.stdout


def _git(path: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run git in a repository on the control node."""
    # Inside a git hook these name the hook's repository, and would win over the path.
    env = {name: value for name, value in os.environ.items() if name not in _HOOK_VARIABLES}
    return subprocess.run(["git", "-C", path, *arguments], env=env, input=stdin, capture_output=True, check=False)  # noqa: S603, S607


class Shipped:
    """What each server was last sent, on the control node: a hint that saves a question, never relied upon."""

    def __init__(self, *key: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hardstand" / "shipped"
        self._file = cache / hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]

    def last(self) -> str | None:
        """Return the commit that was shipped last, or None."""
        try:
            return self._file.read_text()
        except OSError:
            return None

    def remember(self, commit: str) -> None:
        """Note what has been shipped; a cache that cannot be written costs a question next time."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as file:
                file.write(commit)
            Path(file.name).replace(self._file)
        except OSError:
            pass


class ActionModule(ActionBase):
    """See the module's docstring."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the module's result; `tmp` is deprecated, `task_vars` are the host's variables."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        args = dict(self._task.args)
        plan: dict[str, t.Any] = args.pop("plan")
        env, secrets = args.pop("env"), args.pop("secrets")
        settings = args["settings"]
        args["commit"], args["url"] = plan["commit"], plan["url"]
        # The kernel's list of connections names a socket as it was bound: one spelling here and in the start settings.
        args["root"] = os.path.normpath(args["root"])
        args["dotenv"] = encode_dotenv({**env, **secrets})
        args["secret_names"] = sorted(secrets)
        args["build_env"] = encode_dotenv(args["build_env"])

        digest = hashlib.sha256(
            json.dumps(
                [args["dotenv"], args["secret_names"], args["python"], settings, self._render(variables, args, "@")],
                sort_keys=True,
            ).encode()
        ).hexdigest()
        args["release_id"] = f"{plan['commit'][:8]}-{digest[:8]}"
        args["files"] = self._render(variables, args, args["release_id"])
        self._ship_and_build(result, variables, args, plan)
        return result

    def _render(self, variables: dict[str, t.Any], args: dict[str, t.Any], release_id: str) -> dict[str, str]:
        """Return the start settings of a release, rendered from the role's templates."""
        directory = f"{args['root']}/releases/{release_id}"
        rendered = {}
        for name, (template, slot) in _FILES.items():
            source = self._loader.get_text_file_contents(self._find_needle("templates", template))
            templar = self._templar.copy_with_new_env(
                available_variables={
                    "ansible_managed": _MANAGED,
                    **variables,
                    "release_root": args["root"],
                    "slot": slot,
                    "release_id": release_id,
                    "release_directory": directory,
                    "application_directory": str(Path(directory, args["subdirectory"])),
                }
            )
            rendered[name] = str(templar.template(trust_as_template(source), overrides={"trim_blocks": True}))
        return rendered

    def _ship_and_build(
        self, result: dict[str, t.Any], variables: dict[str, t.Any], args: dict[str, t.Any], plan: dict[str, t.Any]
    ) -> None:
        """Run the module, with what it needs of the repository when that lies on the control node."""
        path, commit = plan["path"], plan["commit"]
        if not path or self._task.check_mode:
            result.update(self._execute_module(module_args=args, task_vars=variables))
            return
        shipped = Shipped(path, variables["inventory_hostname"], str(variables.get("ansible_host", "")),
                          str(variables.get("ansible_port", "")), args["root"])  # fmt: skip
        last = shipped.last()
        first = dict(args)
        if last and last != commit:
            pack = make_pack(path, commit, [last])
            if len(pack) <= _INLINE_PACK:
                first["pack"] = base64.b64encode(pack).decode()
        result.update(self._execute_module(module_args=first, task_vars=variables))
        if result.get("missing_commit") and not result.get("failed"):
            pack = make_pack(path, commit, result["have"])
            result.clear()
            result.update(self._build_with(pack, args, variables))
        if not result.get("failed") and not result.get("unreachable"):
            shipped.remember(commit)

    def _build_with(self, pack: bytes, args: dict[str, t.Any], variables: dict[str, t.Any]) -> dict[str, t.Any]:
        """Run the module with a pack that is known to be needed."""
        args["pack_fits"] = True
        if len(pack) <= _INLINE_PACK:
            args["pack"] = base64.b64encode(pack).decode()
            return t.cast("dict[str, t.Any]", self._execute_module(module_args=args, task_vars=variables))
        remote = self._make_tmp_path()
        try:
            with tempfile.NamedTemporaryFile() as file:
                file.write(pack)
                file.flush()
                args["pack_file"] = self._transfer_file(file.name, self._connection._shell.join_path(remote, "pack"))
                self._fixup_perms2((remote, args["pack_file"]))
            return t.cast("dict[str, t.Any]", self._execute_module(module_args=args, task_vars=variables))
        finally:
            self._remove_tmp_path(remote)
