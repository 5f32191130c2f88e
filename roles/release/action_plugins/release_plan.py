"""Action plugin: decide, once and before anything changes, which commit a deploy runs.

Works on the control node alone. Returns, to be registered for every host:

`commit` (full sha), `version` (what was asked for), `url` (where servers fetch it from, or empty), `path` (the
repository on the control node, or empty), `uncommitted` (whether it stands for a working tree), and `deploy`:
what goes into deploys.jsonl (`id`, `commit`, `who`, `from`, `started` in seconds since the epoch).

Fails when the repository, or the version in it, does not exist, or when it has uncommitted changes that were not asked
for.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import typing as t
import uuid
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

_SHA = re.compile(r"[0-9a-f]{40}")
# Seconds that a remote repository has to list its branches.
_TIMEOUT = 60


def git(*arguments: str, path: str, env: dict[str, str] | None = None) -> str:
    """Run git in a repository on the control node and return its standard output, without the newline at its end.

    Raises:
        AnsibleActionFail: git failed; with what it said.
    """
    result = subprocess.run(  # noqa: S603
        ["git", "-C", path, *arguments],  # noqa: S607
        env={**git_env(), **(env or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        raise AnsibleActionFail(result.stderr.strip() or f"git {arguments[0]} failed.")
    return result.stdout.rstrip("\n")


def git_env() -> dict[str, str]:
    """Return the environment for git, which never asks for a password.

    Without GIT_DIR and its kin: inside a git hook they name the hook's repository, and would win over the path. What
    tells git how to connect, GIT_SSH_COMMAND for example, stays.
    """
    local = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_NAMESPACE"}
    local |= {"GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH"}
    return {name: value for name, value in os.environ.items() if name not in local} | {"GIT_TERMINAL_PROMPT": "0"}


def is_url(repository: str) -> bool:
    """Return whether servers fetch from here themselves: `scheme://…`, or ssh's `user@host:path`."""
    return "://" in repository or re.match(r"[^/]+@[^/]+:", repository) is not None


def head(path: str) -> str:
    """Return the commit that is checked out, or nothing when the branch that is has none yet."""
    try:
        return git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", path=path)
    except AnsibleActionFail:
        return ""


def commit_of_working_tree(path: str) -> str:
    """Return a commit that holds the working tree as it is, untracked files included; no branch or index is touched.

    The same tree on the same parent gives the same commit, so deploying it twice changes nothing.
    """
    parent = git("rev-parse", "HEAD", path=path)
    with tempfile.TemporaryDirectory() as directory:
        env = {"GIT_INDEX_FILE": f"{directory}/index"}
        git("read-tree", "HEAD", env=env, path=path)
        git("add", "--all", env=env, path=path)
        tree = git("write-tree", env=env, path=path)
    when = git("log", "-1", "--format=%ct +0000", path=path)
    who = {"NAME": "uncommitted", "EMAIL": "uncommitted@localhost", "DATE": when}
    identity = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
    return git("commit-tree", tree, "-p", parent, "-m", "Uncommitted changes", env=identity, path=path)


def resolve_path(path: str, version: str, allow_uncommitted: bool) -> tuple[str, bool]:
    """Return the commit that `version` names in a repository on the control node, and whether it is uncommitted work.

    Raises:
        AnsibleActionFail: with what to change.
    """
    try:
        git("rev-parse", "--git-dir", path=path)
    except AnsibleActionFail as error:
        raise AnsibleActionFail(f"release_repository is {path}, which is no git repository here ({error}).") from None
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{version}^{{commit}}", path=path)
    except AnsibleActionFail:
        branches = git("for-each-ref", "--format=%(refname:short)", "--count=20", "refs/heads", "refs/tags", path=path)
        known = ", ".join(branches.split()) or "it has no commit yet"
        raise AnsibleActionFail(
            f"release_version is {version!r}, which {path} has neither as a branch, tag nor commit ({known})."
        ) from None
    # A version other than what is checked out has nothing to do with the working tree.
    if commit != head(path) or git("rev-parse", "--is-inside-work-tree", path=path) != "true":
        return commit, False
    changes = git("status", "--porcelain", path=path)
    if not changes:
        return commit, False
    if allow_uncommitted:
        return commit_of_working_tree(path), True
    listed = "\n".join(changes.splitlines()[:10])
    raise AnsibleActionFail(
        f"{path} has uncommitted changes, which no commit names:\n{listed}\n"
        "Commit them, or deploy them as they are with -e release_allow_uncommitted=true."
    )


def deploy_of(commit: str) -> dict[str, t.Any]:
    """Return what goes into deploys.jsonl of a deploy of `commit` that begins now.

    Who deploys is the one that a git push names, or the person logged in here.
    """
    return {
        "id": uuid.uuid4().hex[:12],
        "commit": commit,
        "who": os.environ.get("HARDSTAND_DEPLOY_WHO") or os.environ.get("SUDO_USER") or getpass.getuser(),
        "from": socket.gethostname(),
        "started": time.time(),
    }


def resolve_url(url: str, version: str, deploy_key: str, known_hosts: t.Sequence[str] = ()) -> str:
    """Return the commit that `version` names in a remote repository.

    Args:
        url: the repository.
        version: branch, tag or full sha.
        deploy_key: private ssh key; empty leaves it to ssh's own.
        known_hosts: lines that alone are trusted; none leaves it to ssh's own.

    Raises:
        AnsibleActionFail: with what to change.
    """
    if _SHA.fullmatch(version):
        return version
    command = ["git", "ls-remote", "--", url, version, f"{version}^{{}}"]
    stdin = None
    if deploy_key:
        command = ["ssh-agent", "sh", "-c", 'ssh-add -q - && exec "$@" </dev/null', "sh", *command]
        stdin = deploy_key.rstrip("\n") + "\n"
    # Into a file and not a pipe: what git has started to connect with could hold a pipe open beyond the time limit.
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.NamedTemporaryFile("w") as known,
    ):
        ssh = "ssh -o BatchMode=yes"
        if known_hosts:
            known.write("".join(f"{line}\n" for line in known_hosts))
            known.flush()
            ssh += f" -o StrictHostKeyChecking=yes -o UserKnownHostsFile={shlex.quote(known.name)}"
        env = {"GIT_SSH_COMMAND": ssh, **git_env()}
        process = subprocess.Popen(  # noqa: S603
            command, env=env, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, start_new_session=True
        )
        try:
            process.communicate(stdin, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AnsibleActionFail(
                f"release_repository does not answer within {_TIMEOUT} s from the control node."
            ) from None
        out.seek(0)
        err.seek(0)
        answer, complaint = out.read(), err.read()
    if process.returncode:
        said = re.sub(r"://[^@/\s]+@", "://********@", complaint.strip())
        raise AnsibleActionFail(
            f"release_repository cannot be read from the control node:\n{said}\n"
            "Mend release_repository or release_deploy_key, or give the full commit as release_version."
        )
    found = {ref: commit for commit, _, ref in (line.partition("\t") for line in answer.splitlines())}
    for ref in (f"refs/tags/{version}^{{}}", f"refs/heads/{version}", f"refs/tags/{version}", version):
        if ref in found:
            return found[ref]
    raise AnsibleActionFail(
        f"release_version is {version!r}, which release_repository has neither as a branch nor as a tag "
        "(a commit must be given in full)."
    )


class ActionModule(ActionBase):
    """See the module's docstring."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the facts; `tmp` is deprecated, `task_vars` are the host's variables."""
        _, args = self.validate_argument_spec(
            argument_spec={
                "repository": {"type": "str", "required": True},
                "version": {"type": "str", "required": True},
                "allow_uncommitted": {"type": "bool", "default": False},
                "deploy_key": {"type": "str", "default": "", "no_log": True},
                "known_hosts": {"type": "list", "elements": "str", "default": []},
            }
        )
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        repository, uncommitted = args["repository"], False
        remote = is_url(repository)
        if remote:
            commit = resolve_url(repository, args["version"], args["deploy_key"], args["known_hosts"])
        else:
            repository = str(Path(repository).expanduser().absolute())
            commit, uncommitted = resolve_path(repository, args["version"], args["allow_uncommitted"])
        result.update(
            commit=commit,
            version=args["version"],
            url=repository if remote else "",
            path="" if remote else repository,
            uncommitted=uncommitted,
            deploy=deploy_of(commit),
        )
        result["msg"] = f"{args['version']} is {commit[:12]}" + (" (uncommitted changes)" if uncommitted else "")
        return result
