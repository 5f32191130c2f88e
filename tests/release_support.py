"""Role release without a server: its modules on this machine, below a temporary root, with Debian's own accounts."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

from tests import role_modules
from tests.role_templates import ROLES, evaluate, load_file, read_yaml

ROLE = ROLES / "release"
APP = "blog"
RELEASE_ID = "0000000a-0000000b"


def load(path: str) -> ModuleType:
    """Import a file of the role by its path below the role."""
    return load_file(ROLE / path)


def start_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> subprocess.Popen[bytes]:
    """Start a module of the role in a process of its own, as on a server; it may be killed."""
    return role_modules.start_module(ROLE, name, arguments, check=check)


def run_module(name: str, arguments: Mapping[str, Any], *, check: bool = False) -> dict[str, Any]:
    """Run a module of the role; returns its result."""
    return role_modules.run_module(ROLE, name, arguments, check=check)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait until a condition holds and return what it is; fails with what has not come about within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"this has not come about within {seconds:g} s: {what}"
        time.sleep(0.01)
    return result


class Repository:
    """A git repository on the control node."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet", "--initial-branch=main", *options)

    def git(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run git; returns its output, stripped."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        for role in ("AUTHOR", "COMMITTER"):
            env |= {f"GIT_{role}_NAME": "A", f"GIT_{role}_EMAIL": "a@example.org"}
            env |= {f"GIT_{role}_DATE": "2024-05-06T07:08:09Z"}
        command = ["git", "-c", "init.templateDir=", "-C", str(self.path), *arguments]
        return subprocess.run(command, env=env, input=stdin, capture_output=True, check=True).stdout.decode().strip()

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        """Write files; None removes one."""
        for name, content in files.items():
            file = self.path / name
            if content is None:
                file.unlink()
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, files: Mapping[str, str | bytes | None], message: str = "Change") -> str:
        """Commit files; returns the sha."""
        self.write(files)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def pack(self, commit: str, have: Iterable[str] = ()) -> str:
        """Return what the control node ships, as the module takes it."""
        return base64.b64encode(build_action.make_pack(str(self.path), commit, have)).decode()


build_action = load("action_plugins/release_build.py")
plan_action = load("action_plugins/release_plan.py")


def variables(**changes: Any) -> dict[str, Any]:
    """Return the role's variables as a play has them."""
    values: dict[str, Any] = {}
    for name in ("defaults", "vars"):
        values |= read_yaml(ROLE / name / "main.yml")
    return values | {"release_app": APP, "release_module": "service:app"} | changes


def start_settings(root: Path, release_id: str, **changes: Any) -> dict[str, str]:
    """Return the start settings of a release, rendered by the action plugin from the role's templates."""
    evaluate("release", "1")  # makes Ansible's plugins known
    values = variables(release_root=str(root), **changes)
    action = build_action.ActionModule.__new__(build_action.ActionModule)
    action._loader = DataLoader()
    action._templar = Templar(loader=action._loader, variables=values)
    action._find_needle = lambda directory, name: str(ROLE / directory / name)
    arguments = {"root": str(root), "subdirectory": values["release_subdirectory"]}
    files: dict[str, str] = action._render(values, arguments, release_id)
    return files


def wheel(directory: Path, name: str, version: str, files: Mapping[str, str], requires: Iterable[str] = ()) -> None:
    """Make a wheel, the least that an installer takes."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    content = {
        **files,
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{stem}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in (*content, f"{stem}.dist-info/RECORD"))
    with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)


@functools.cache
def reachable_uv() -> Path:
    """Return uv's executable, where the build account reaches it; the control node's virtualenv may be closed to it."""
    directory = Path(tempfile.mkdtemp(prefix="hardstand-uv-"))
    atexit.register(shutil.rmtree, directory)
    directory.chmod(0o755)
    return Path(shutil.copy(Path(sys.executable).parent / "uv", directory))


def _may_enter(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


# The Python below the control node's virtualenv, which accounts other than ours can run where it is the system's.
PYTHON = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
# Accounts that every Debian has. A Python in somebody's home only its owner can run.
BUILDER = "nobody" if _may_enter(Path(PYTHON)) else "root"
SERVICE = "www-data"
PROXY_GROUP = "games"


class Server:
    """A server with one application below a temporary directory, and a repository to deploy to it."""

    def __init__(self, directory: Path, wheels: Path | None) -> None:
        self.directory = directory
        self.root = directory / "srv" / APP
        self.root.parent.mkdir()
        self.repository = Repository(directory / "repository")
        self.uv = reachable_uv()
        self.wheels = wheels
        self.shipped: list[str] = []
        self.deploy = {"id": "d1", "commit": "", "who": "tester", "from": "here", "started": 0, "lock": {}}

    def arguments(self, commit: str, release_id: str = RELEASE_ID, **changes: Any) -> dict[str, Any]:
        """Return the arguments of module release_build, with the commit's pack."""
        settings = {
            "module": "service:app",
            "subdirectory": changes.get("subdirectory", ""),
            "python_path": changes.get("python_path", []),
            "migrate_command": "",
            "migrate_timeout": 20,
            "export_env": False,
            "health_path": "/health",
            "host_header": "localhost",
            "request_timeout": 10,
        } | changes.pop("settings", {})
        arguments: dict[str, Any] = {
            "app": APP,
            "root": str(self.root),
            "release_id": release_id,
            "commit": commit,
            "python": PYTHON,
            "uv": str(self.uv),
            "wheel_directory": str(self.wheels or ""),
            "worker_class": "uvicorn_worker.UvicornWorker",
            "dotenv": 'KEY="value"\n',
            "files": {"gunicorn.conf.py": "# one\n", "blue.conf": "; blue\n", "green.conf": "; green\n"},
            "settings": settings,
            "build_user": BUILDER,
            "user": SERVICE,
            "proxy_group": PROXY_GROUP,
            "deploy": {**self.deploy, "commit": commit},
        }
        if "pack" not in changes and "url" not in changes:
            arguments["pack"] = self.repository.pack(commit)
        return arguments | changes

    def build(self, commit: str, release_id: str = RELEASE_ID, **changes: Any) -> dict[str, Any]:
        """Run module release_build."""
        return run_module("release_build", self.arguments(commit, release_id, **changes))

    def release(self, release_id: str = RELEASE_ID) -> Path:
        """Return a release's directory."""
        return self.root / "releases" / release_id

    def releases(self) -> list[str]:
        """Return all there is below releases/."""
        return sorted(path.name for path in (self.root / "releases").iterdir())

    def virtualenvs(self) -> list[str]:
        """Return the virtualenvs."""
        return sorted(path.name for path in (self.root / "venvs").iterdir() if not path.name.startswith("."))

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of deploys.jsonl."""
        file = self.root / "deploys.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
