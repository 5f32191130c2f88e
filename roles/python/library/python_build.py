#!/usr/bin/python
"""Ansible module: build CPython with pyenv, one step a call."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import time
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.python_host import STAMP, Prefix, PythonError, problem, remove, sha256, unpack, write_json

DOCUMENTATION = r"""
module: python_build
short_description: Build CPython with pyenv
description:
  - The action plugin of the same name calls it step by step, ships sources before, shows progress meanwhile, and brings
    the build to the control node's cache.
  - The build runs as an unprivileged account in a systemd unit of its own. It outlives a lost connection or a stopped
    Ansible; the next run waits for it instead of starting over.
  - A build counts only once its stamp is there, which is written last.
options:
  step:
    {description: What to do. Set by the action plugin., type: str, choices: [look, start, poll, finish, clean]}
  prefix:
    {description: Directory of pyenv and of what it built., type: path, required: true}
  build:
    {description: Name of the build., type: str, required: true}
  key:
    {description: Key for the build's stamp., type: str, required: true}
  version:
    {description: Version of CPython., type: str, required: true}
  options:
    {description: Options of CPython's configure., type: list, elements: str, default: []}
  jobs:
    {description: Compilers that run at a time., type: int, default: 1}
  account:
    {description: Account that compiles., type: str, required: true}
  pyenv_version:
    {description: Commit of pyenv., type: str, required: true}
  pyenv_repository:
    {description: Where to clone pyenv from., type: str, default: ""}
  pyenv_archive:
    {description: Archive of that commit on this host. Set by the action plugin., type: path}
  source_archive:
    {description: CPython's source archive on this host. Set by the action plugin., type: path}
  source_directory:
    {description: Directory on the control node with sources. Used by the action plugin., type: str, default: ""}
  archive:
    {description: Where to keep the build on the control node. Used by the action plugin., type: str}
"""

RETURN = r"""
state:
  {description: "C(absent), C(running), C(ended) or C(built).", type: str, returned: look and poll}
phase:
  {description: What a running build does., type: str, returned: poll}
detail:
  {description: How far the phase is. Empty where that cannot be told., type: str, returned: poll}
elapsed:
  {description: Seconds that a running build has taken so far., type: int, returned: poll}
pack:
  {description: The finished build as an archive on this host., type: path, returned: finish}
sha256:
  {description: Its SHA-256., type: str, returned: finish}
"""

COMPILING, PROFILING, RECOMPILING = "compiling", "profiling with CPython's own tests", "compiling with the profile"

# What begins a phase in a build's log, and how to call it. The phase that begins last is the current one.
PHASES = (
    (re.compile(r"^Downloading ", re.MULTILINE), "downloading the source"),
    (re.compile(r"^(Installing Python-|checking )", re.MULTILINE), "configuring"),
    (re.compile(r"^(gcc|cc|x86_64-\S+-gcc) ", re.MULTILINE), COMPILING),
    # Not "Running code to generate profile data": that is said before the code is even compiled.
    (re.compile(r"^.*\./python -m test --pgo", re.MULTILINE), PROFILING),
    (re.compile(r"^Rebuilding with profile guided optimizations", re.MULTILINE), RECOMPILING),
    # Not the first use of install(1): building copies a file with it as well.
    (re.compile(r"^Creating directory ", re.MULTILINE), "installing"),
    (re.compile(r"^(Listing|Compiling) '", re.MULTILINE), "compiling the standard library"),
)
COMPILED_FILE = re.compile(r"^(?:gcc|cc|x86_64-\S+-gcc)(?: .*)? -c ", re.MULTILINE)
PROFILING_TEST = re.compile(r"\[ *(\d+)/(\d+)[^\]]*\] test_", re.MULTILINE)
LOG_TAIL_LINES = 30
# Kept from the environment of the task for downloads.
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class Build:
    """One build of CPython on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.p: dict[str, t.Any] = module.params
        self.prefix = Prefix(self.p["prefix"])
        self.name: str = self.p["build"]
        self.place = self.prefix.builds / self.name
        self.work = self.prefix.work / self.name
        self.log = self.prefix.work / f"{self.name}.log"
        self.exit_code = self.work / "exit-code"
        # Its time of change is when the build began.
        self.begun = self.work / "begun"
        self.unit = f"hardstand-python-{self.name}.service"
        self.pack = self.prefix.cache / f"{self.name}.tar.gz"

    # Steps ----------------------------------------------------------------------------------------------------

    def look(self) -> dict[str, t.Any]:
        """Say whether there is anything to build."""
        if self.is_complete():
            return {"state": "built"}
        if self.is_running():
            return {"state": "running"}
        if self.exit_code.is_file() and self.exit_code.read_text().strip() == "0":
            # Ended after the run that started it was gone.
            return {"state": "ended"}
        return {"state": "absent"}

    def start(self) -> dict[str, t.Any]:
        """Start the build."""
        pwd.getpwnam(self.p["account"])
        self.prefix.make()
        self.make_for_account(self.prefix.work, self.prefix.cache)
        self.install_pyenv()
        environment = {**self.source_environment(), **self.environment()}
        for directory in (self.place, self.work):
            remove(directory)
        self.log.unlink(missing_ok=True)
        self.make_for_account(self.place, self.work)
        self.begun.touch()
        self.run_in_unit(environment)
        return {}

    def poll(self) -> dict[str, t.Any]:
        """Say how far the build is."""
        if not self.is_running():
            return {"state": "ended"}
        log = self.log.read_text(errors="replace") if self.log.is_file() else ""
        begun, phase = max(
            ((match.start(), name) for pattern, name in PHASES if (match := pattern.search(log))),
            default=(0, "starting"),
        )
        detail = ""
        if phase in (COMPILING, RECOMPILING):
            detail = f"{len(COMPILED_FILE.findall(log, begun))} files"
        elif phase == PROFILING and (tests := PROFILING_TEST.findall(log, begun)):
            detail = f"{tests[-1][0]} of {tests[-1][1]}"
        return {
            "state": "running",
            "phase": phase,
            "detail": detail,
            "elapsed": int(time.time() - self.begun.stat().st_mtime),
        }

    def finish(self) -> dict[str, t.Any]:
        """Accept the build or not, and pack it for other hosts."""
        if not self.is_complete():
            self.accept()
        for directory in (self.prefix.work, self.prefix.cache):
            directory.mkdir(mode=0o755, exist_ok=True)
        manifest = self.prefix.work / "manifest.json"
        write_json(manifest, {"key": self.p["key"], "pyenv": self.prefix.pyenv_version()})
        stamp = json.loads((self.prefix.path / ".hardstand-pyenv").read_text())
        self.run(
            [
                *("/usr/bin/tar", "--create", "--owner=0", "--group=0", "--use-compress-program=gzip -4"),
                f"--file={self.pack}",
                f"--transform=s,^builds/{re.escape(self.name)},build,S",
                r"--transform=s,^work/manifest\.json$,manifest.json,S",
                *(f"--transform=s,^{re.escape(entry)}\\($\\|/\\),pyenv/{entry}\\1,S" for entry in stamp["entries"]),
                f"--directory={self.prefix.path}",
                f"builds/{self.name}",
                "work/manifest.json",
                *stamp["entries"],
            ]
        )
        self.pack.chmod(0o644)
        return {"pack": str(self.pack), "sha256": sha256(self.pack)}

    def clean(self) -> dict[str, t.Any]:
        """Remove what only the build needed."""
        for directory in (self.work, self.prefix.cache, self.prefix.work):
            remove(directory)
        return {}

    # Before ---------------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Return whether the build is there and works."""
        return self.prefix.build_key(self.name) == self.p["key"] and not problem(self.module, self.place)

    def is_running(self) -> bool:
        """Return whether a run that may be gone has started the build."""
        code, _, _ = self.module.run_command(["/usr/bin/systemctl", "is-active", "--quiet", self.unit])
        return bool(code == 0)

    def make_for_account(self, *directories: Path) -> None:
        """Make directories that belong to the account that builds."""
        for directory in directories:
            directory.mkdir(mode=0o755, exist_ok=True)
            shutil.chown(directory, self.p["account"], self.p["account"])

    def install_pyenv(self) -> None:
        """Put pyenv at its commit in place, from the control node's archive or from its repository."""
        commit = self.p["pyenv_version"]
        if self.prefix.pyenv_version() == commit:
            return
        archive = self.p["pyenv_archive"] or self.fetch_pyenv(commit)
        tree = self.prefix.path / ".incoming-pyenv"
        remove(tree)
        unpack(self.module, Path(archive), tree)
        self.prefix.install_pyenv(tree, commit)
        remove(tree)

    def fetch_pyenv(self, commit: str) -> str:
        """Fetch a commit of pyenv from its repository, and return an archive of it.

        Raises:
            PythonError: the server does not reach the repository, or the repository does not have the commit.
        """
        url = self.p["pyenv_repository"]
        mirror = self.prefix.cache / "pyenv.git"
        archive = self.prefix.cache / "pyenv.tar"
        git = ["/usr/bin/git", f"--git-dir={mirror}", "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
        remove(mirror)
        self.run_as_account(["/usr/bin/git", "init", "--quiet", "--bare", str(mirror)])
        # Not every server hands out a commit by its sha alone.
        for what in (["--depth=1", url, commit], [url, "+refs/heads/*:refs/heads/*"]):
            code, errors = self.run_as_account([*git, "fetch", "--quiet", *what], check=False)
            if code == 0:
                break
        else:
            raise PythonError(
                f"This server cannot fetch pyenv from {url} (python_pyenv_repository):\n{errors}\nA server without "
                "a way there takes pyenv from the control node: a checkout of it as pyenv/ in python_source_directory."
            )
        code, errors = self.run_as_account([*git, "archive", f"--output={archive}", commit], check=False)
        if code != 0:
            raise PythonError(
                f"{url} (python_pyenv_repository) has no commit {commit} (python_pyenv_version): {errors}"
            )
        return str(archive)

    def source_environment(self) -> dict[str, str]:
        """Put the control node's source archive where pyenv looks for it, and return what makes pyenv take it.

        Raises:
            PythonError: pyenv does not know the version, or the archive is not the one that it knows.
        """
        version = self.p["version"]
        definition = self.prefix.path / "plugins/python-build/share/python-build" / version
        if not definition.is_file():
            raise PythonError(
                f"pyenv at {self.p['pyenv_version']} does not know CPython {version}. A newer one may: set "
                "python_pyenv_version to a later commit of pyenv, or python_version to an earlier CPython."
            )
        if not self.p["source_archive"]:
            return {}
        archive = Path(self.p["source_archive"])
        xz = archive.name.endswith(".xz")
        # Looked at here because pyenv, finding it damaged, would silently download another.
        found = re.search(
            rf"/Python-{re.escape(version)}\.{'tar.xz' if xz else 'tgz'}#([0-9a-f]{{64}})", definition.read_text()
        )
        digest = sha256(archive)
        if not found or digest != found[1]:
            raise PythonError(
                f"{archive.name} in python_source_directory is not the archive that pyenv knows: its SHA-256 is "
                f"{digest}, and has to be {found[1] if found else 'unknown'}. Remove the file, or fetch it again."
            )
        # pyenv calls it so, whatever upstream does.
        cached = self.prefix.cache / f"Python-{version}.tar.{'xz' if xz else 'gz'}"
        shutil.copyfile(archive, cached)
        cached.chmod(0o644)
        return {} if xz else {"_PYTHON_BUILD_FORCE_SKIP_XZ": "1"}

    def environment(self) -> dict[str, str]:
        """Return what pyenv and make read."""
        return {
            "HOME": str(self.work),
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.work),
            "MAKE_OPTS": f"-j{self.p['jobs']}",
            "PYENV_ROOT": str(self.prefix.path),
            "PYTHON_BUILD_CACHE_PATH": str(self.prefix.cache),
            # A server without a way out learns so in seconds.
            "PYTHON_BUILD_CURL_OPTS": "--connect-timeout 20 --speed-limit 1000 --speed-time 60",
            "PYTHON_CONFIGURE_OPTS": " ".join(self.p["options"]),
            **{name: os.environ[name] for name in PROXY_VARIABLES if name in os.environ},
        }

    def run_in_unit(self, environment: dict[str, str]) -> None:
        """Start pyenv's python-build in a unit of its own, behind everything else that wants the processor."""
        python_build = self.prefix.path / "plugins/python-build/bin/python-build"
        # The exit code is kept in a file, in one rename: nobody may be there to hear it.
        script = '"${@:2}"; echo $? > "$1.new"; mv "$1.new" "$1"'
        properties = {
            "User": self.p["account"],
            "WorkingDirectory": str(self.work),
            "Nice": "10",
            "NoNewPrivileges": "yes",
            "StandardOutput": f"append:{self.log}",
            "StandardError": f"append:{self.log}",
        }
        self.run(
            [
                *("/usr/bin/systemd-run", "--quiet", "--collect", f"--unit={self.unit}"),
                f"--description=Build of CPython {self.p['version']}",
                *(f"--property={name}={value}" for name, value in properties.items()),
                *(f"--setenv={name}={value}" for name, value in environment.items()),
                *("/bin/bash", "-c", script, "bash", str(self.exit_code)),
                *(str(python_build), "--verbose", self.p["version"], str(self.place)),
            ]
        )

    # After ----------------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """Make what pyenv left a build to rely on: try it, drop what only developers of CPython use, give it to root.

        Raises:
            PythonError: the build failed, or what it made lacks a module.
        """
        code = self.exit_code.read_text().strip() if self.exit_code.is_file() else "none, as if killed"
        if code != "0":
            remove(self.place)
            raise PythonError(f"The build of CPython {self.p['version']} failed (exit code {code}). {self.log_tail()}")
        trouble = problem(self.module, self.place)
        if trouble:
            raise PythonError(f"CPython {self.p['version']} was built, but does not work: {trouble}. {self.log_tail()}")
        for path in [*self.place.glob("lib/python3*/test"), *self.place.glob("lib/python3*/config-*/libpython*.a")]:
            remove(path)
        self.run(["/usr/bin/chown", "--recursive", "--no-dereference", "root:root", str(self.place)])
        write_json(
            self.place / STAMP,
            {
                "key": self.p["key"],
                "version": self.p["version"],
                "options": self.p["options"],
                "pyenv": self.p["pyenv_version"],
            },
        )

    def log_tail(self) -> str:
        """Return the end of the build's log, with what to do about the most common end of all."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        hint = ""
        if "failed to download" in text:
            hint = (
                "The server could not download the source. A server without a way out takes it from the control node: "
                f"Python-{self.p['version']}.tar.xz in python_source_directory.\n"
            )
        tail = "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
        return f"{hint}The log, {self.log} on the server, ends:\n{tail}"

    # Commands -------------------------------------------------------------------------------------------------

    def run(self, command: list[str]) -> None:
        """Run a command that has to succeed."""
        self.module.run_command(command, check_rc=True)

    def run_as_account(self, command: list[str], check: bool = True) -> tuple[int, str]:
        """Run a command as the account that builds; return its exit code and its error output."""
        code, _, errors = self.module.run_command(
            ["/usr/sbin/runuser", "-u", self.p["account"], "--", *command],
            check_rc=check,
            environ_update={"HOME": str(self.prefix.cache), "GIT_TERMINAL_PROMPT": "0"},
        )
        return code, errors.strip()


def main() -> None:
    """Do one step."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["look", "start", "poll", "finish", "clean"], "required": True},
            "prefix": {"type": "path", "required": True},
            "build": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": False},
            "version": {"type": "str", "required": True},
            "options": {"type": "list", "elements": "str", "default": []},
            "jobs": {"type": "int", "default": 1},
            "account": {"type": "str", "required": True},
            "pyenv_version": {"type": "str", "required": True},
            "pyenv_repository": {"type": "str", "default": ""},
            "pyenv_archive": {"type": "path"},
            "source_archive": {"type": "path"},
            "source_directory": {"type": "str", "default": ""},
            "archive": {"type": "str"},
        },
    )
    build = Build(module)
    steps = {
        "look": build.look,
        "start": build.start,
        "poll": build.poll,
        "finish": build.finish,
        "clean": build.clean,
    }
    try:
        result = steps[module.params["step"]]()
    except (PythonError, OSError, KeyError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=True, **result)


if __name__ == "__main__":
    main()
