#!/usr/bin/python
"""Ansible module: a bare repository of a control host, as its hook expects it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import replace_symlink

DOCUMENTATION = r"""
module: git_push_repository
short_description: Make a bare git repository with its settings and its hook
description:
  - Works as the account that owns the repository; git refuses repositories of others.
options:
  path:
    {description: The repository. Its parent directory exists., type: path, required: true}
  user:
    {description: Account that owns it., type: str, required: true}
  branch:
    {description: Branch that its HEAD names., type: str, required: true}
  hook:
    {description: Program that its pre-receive hook is a link to., type: path}
"""

CONFIG = {
    # What has been the branch, and when.
    "core.logallrefupdates": "true",
    "receive.denydeletes": "true",
    # The hook leaves that to the process that outlives it: a push is over when its deploy is.
    "receive.autogc": "false",
    # Notes between one push and the next, and no business of pushers.
    "transfer.hiderefs": "refs/hardstand",
}


class Repository:
    """The repository, and git as its owner runs it."""

    def __init__(self, path: Path, user: str) -> None:
        self.path = path
        self._user = user

    def git(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Run git in the repository and return what it says.

        Raises:
            OSError: git failed.
        """
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.path.parent), "LC_ALL": "C.UTF-8"}
        result = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=self.path.parent,
            env=environment,
            user=self._user,
            group=self._user,
            extra_groups=[],
            umask=0o077,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode not in allowed:
            raise OSError(f"git {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout.strip()

    def git_here(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Run git on the repository."""
        return self.git("--git-dir", str(self.path), *arguments, allowed=allowed)


def missing(repository: Repository, branch: str, hook: str | None) -> list[str]:
    """Return what has to be done: ``init``, ``head``, ``hook``, or names of settings."""
    if not (repository.path / "HEAD").is_file():
        return ["init", "head", *CONFIG, *(["hook"] if hook else [])]
    wanted = []
    if repository.git_here("symbolic-ref", "HEAD") != f"refs/heads/{branch}":
        wanted.append("head")
    for name, value in CONFIG.items():
        if repository.git_here("config", "--get", name, allowed=(0, 1)) != value:
            wanted.append(name)
    link = repository.path / "hooks/pre-receive"
    if hook and not (link.is_symlink() and str(link.readlink()) == hook):
        wanted.append("hook")
    return wanted


def make(repository: Repository, branch: str, hook: str | None, wanted: list[str]) -> None:
    """Do it."""
    if "init" in wanted:
        # Without the samples of hooks.
        repository.git("init", "--quiet", "--bare", "--template=", str(repository.path))
    if "head" in wanted:
        repository.git_here("symbolic-ref", "HEAD", f"refs/heads/{branch}")
    for name in CONFIG.keys() & wanted:
        repository.git_here("config", name, CONFIG[name])
    if hook and "hook" in wanted:
        link = repository.path / "hooks/pre-receive"
        link.parent.mkdir(exist_ok=True)
        replace_symlink(link, hook)


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "user": {"type": "str", "required": True},
            "branch": {"type": "str", "required": True},
            "hook": {"type": "path"},
        },
        supports_check_mode=True,
    )
    repository = Repository(Path(module.params["path"]), module.params["user"])
    branch, hook = module.params["branch"], module.params["hook"]
    try:
        wanted = missing(repository, branch, hook)
        if wanted and not module.check_mode:
            make(repository, branch, hook, wanted)
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(wanted), made=wanted)


if __name__ == "__main__":
    main()
