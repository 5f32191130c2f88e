#!/usr/bin/python
"""Ansible module: see what a release would migrate, and migrate the database with it before it serves."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import time
import typing as t
from pathlib import Path

from ansible.module_utils import release_alembic
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import (
    Layout,
    Mask,
    ReleaseError,
    account,
    busy,
    last_lines,
    parse_dotenv,
    record_failure,
    run,
)

DOCUMENTATION = r"""
module: release_migrate
short_description: Migrate the database with the code and settings of a new release
description:
  - Runs in the release, with its C(.env) and virtualenv.
  - V(look) says what is pending, and, where nothing is, runs the migration command in the same breath, which then has
    nothing to do. V(run) runs it. V(refuse) records that the deploy has ended here for another reason.
  - When it fails the deploy ends here, and the release that was live still serves.
  - Called by the action plugin of the same name, which judges the pending SQL.
options:
  step: {description: What to do., type: str, choices: [look, run, refuse], required: true}
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: The release., type: str, required: true}
  user: {description: Account that migrates., type: str, required: true}
  application_user:
    description: Account that runs the application. Its group may read C(.env), and O(user) runs in that group.
    type: str
    required: true
  secrets: {description: "Environment of the migration alone, as lines of a C(.env).", type: str, default: ""}
  pending_command:
    description: >-
      Command that prints what is pending, a line for each; V(auto) asks Alembic where the migration command is its
      C(upgrade); empty does not ask.
    type: str
    default: auto
  sql: {description: Whether to return the SQL of what is pending on PostgreSQL., type: bool, default: false}
  changes: {description: Whether V(run) will change the database; V(look) has said so., type: bool, default: true}
  current: {description: The database's revisions; V(look) has said so., type: list, elements: str}
  reason: {description: Why the deploy ends here., type: str, default: ""}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
"""

RETURN = r"""
output: {description: What the command printed last., type: list, returned: when it has run}
built: {description: Whether the release is here., type: bool, returned: for look}
live_commit: {description: The commit that serves., type: str, returned: for look}
pending: {description: "What is pending: revision and message; null when nobody knows.", type: list, returned: for look}
current: {description: The revisions that the database has., type: list, returned: for look}
unseen: {description: Why check mode could not look., type: str, returned: for look}
changes: {description: Whether the database is about to change., type: bool, returned: for look}
ran: {description: Whether the migration command has run already., type: bool, returned: for look}
scripts: {description: "The pending SQL: see module_utils/release_alembic.py.", type: list, returned: for look}
"""


class Migration:
    """The migration of one release."""

    def __init__(self, parameters: t.Mapping[str, t.Any]) -> None:
        self.p = parameters
        self.layout = Layout(parameters["root"], parameters["app"])
        self.directory = self.layout.releases / parameters["release_id"]
        release = self.layout.release(parameters["release_id"])
        if release is None:
            raise ReleaseError(f"Release {parameters['release_id']} is not built here.")
        self.release = release
        self.application = self.directory / release["subdirectory"]
        self.command: str = release["migrate_command"]
        self.words = shlex.split(self.command)
        secrets = parse_dotenv(parameters["secrets"])
        self.mask = Mask.of_release(self.directory, secrets.values())
        # Not the home of the application: what it puts there, a driver's settings for example, is not for an account
        # that may do more.
        apart = parameters["user"] != parameters["application_user"]
        self.env = {
            "HOME": "/nonexistent" if apart else str(self.layout.shared),
            "PATH": f"{self.directory}/.venv/bin:/usr/bin:/bin",
            "HARDSTAND_RELEASE": parameters["release_id"],
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if release["python_path"]:
            self.env["PYTHONPATH"] = ":".join(str(self.application / path) for path in release["python_path"])
        dotenv = parse_dotenv((self.directory / ".env").read_text()) if release["export_env"] else {}
        self.env = {**dotenv, **secrets, **self.env}

    def start(self, command: t.Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of the release, as the account that migrates, in the group that may read `.env`."""
        group = account(self.p["application_user"]).gid
        return t.cast(
            "subprocess.CompletedProcess[str]",
            run(
                command,
                user=account(self.p["user"])._replace(gid=group),
                cwd=self.application,
                env=self.env,
                timeout=timeout or self.release["migrate_timeout"],
            ),
        )

    def alembic(self) -> list[str] | None:
        """Return the start of a command that runs module release_alembic in Alembic's place; None for another tool."""
        python = str(self.directory / ".venv" / "bin" / "python")
        source = inspect.getsource(release_alembic)
        if "upgrade" not in self.words:
            return None
        if Path(self.words[0]).name == "alembic":
            return [python, "-c", source, "script"]
        if Path(self.words[0]).name.startswith("python") and self.words[1:3] == ["-m", "alembic"]:
            return [python, "-c", source, "module"]
        return None

    def alembic_arguments(self) -> list[str]:
        """Return the migration command's arguments for Alembic."""
        return self.words[1 if Path(self.words[0]).name == "alembic" else 3 :]

    # The steps

    def look(self, *, check: bool) -> dict[str, t.Any]:
        """Return what is pending; where nothing is, run the command, unless `check`.

        Raises:
            ReleaseError: the database or the release does not say.
        """
        nobody_knows = {"pending": None, "changes": True, "ran": False}
        if self.p["pending_command"] == "auto":
            alembic = self.alembic()
            return nobody_knows if alembic is None else self.ask_alembic(alembic, check=check)
        if not self.p["pending_command"]:
            return nobody_knows
        what = f"`{self.p['pending_command']}` (release_migrate_pending_command)"
        try:
            result = self.start(shlex.split(self.p["pending_command"]))
        except ReleaseError as error:
            raise ReleaseError(f"{what} did not finish: {self.mask(str(error))}") from None
        said = self.mask(result.stdout)
        if result.returncode:
            raise ReleaseError(
                f"{what} failed with exit code {result.returncode}.\n{last_lines(said + self.mask(result.stderr), 25)}"
            )
        lines = [line.strip().partition(" ") for line in said.splitlines() if line.strip()]
        pending = [{"revision": first, "message": rest.strip()} for first, _, rest in lines]
        return {"pending": pending, "changes": bool(pending), "ran": False}

    def ask_alembic(self, alembic: t.Sequence[str], *, check: bool) -> dict[str, t.Any]:
        """Return what Alembic says; one start of Python is enough for a deploy that has nothing to migrate."""
        what = f"The migration `{self.command}` (release_migrate_command)"
        options = ["sql" if self.p["sql"] else "-", "-" if check else "run"]
        try:
            result = self.start([*alembic, *options, *self.alembic_arguments()])
        except ReleaseError as error:
            raise ReleaseError(f"{what} did not finish: {self.mask(str(error))}") from None
        found = _found(result)
        lines = [line for line in result.stdout.split("\n") if not line.startswith(release_alembic.MARK)]
        said = self.mask("\n".join(lines).strip() + "\n" + result.stderr)
        if result.returncode:
            raise ReleaseError(
                f"{what} failed with exit code {result.returncode}, before it has changed anything.\n"
                f"{last_lines(said, 25)}\nMend that, and deploy again."
            )
        if found is None or found["pending"] is None:
            return {"pending": None, "changes": True, "ran": False}
        for piece in found.get("scripts", []):
            piece.update({name: self.mask(piece[name]) for name in ("text", "error") if name in piece})
        done = not check and not found["pending"]
        return {**found, "changes": bool(found["pending"]), "ran": done}

    def run(self) -> dict[str, t.Any]:
        """Run the migration.

        Raises:
            ReleaseError: it failed or took too long; with its last words, secrets removed.
        """
        what = f"The migration `{self.command}` (release_migrate_command)"
        started = time.monotonic()
        try:
            result = self.start(self.words)
        except ReleaseError as error:
            raise ReleaseError(
                f"{what} did not finish: {self.mask(str(error))}{self.state()}\n"
                "If it only needs longer, raise release_migrate_timeout."
            ) from None
        out = result.stdout
        # Alembic says on standard output once more what it has logged.
        if out.strip().removeprefix("FAILED: ") in result.stderr:
            out = ""
        said = self.mask(out + result.stderr)
        if result.returncode:
            raise ReleaseError(
                f"{what} failed with exit code {result.returncode}.\n{last_lines(said, 25)}{self.state()}"
            )
        return {"output": last_lines(said, 25).splitlines(), "seconds": round(time.monotonic() - started, 2)}

    def revisions(self) -> list[str] | None:
        """Return the database's revisions; None where there is nobody to ask."""
        alembic = self.alembic()
        if alembic is None:
            return None
        try:
            found = _found(self.start([*alembic, "-", "-", *self.alembic_arguments()], timeout=30))
        except ReleaseError:
            return None
        return None if found is None else found.get("current")

    def state(self) -> str:
        """Return a line about what a failed migration has left."""
        before = self.p["current"]
        after = None if before is None else self.revisions()
        if before is None or after is None:
            return ""
        names = ", ".join(sorted(after)) or "none"
        if sorted(before) == sorted(after):
            return f"\nThe database is as it was, at revision {names}. Mend what is said above, and deploy again."
        return (
            f"\nThe database was at revision {', '.join(sorted(before)) or 'none'}, and is now at {names}: what came "
            "before the failure stays. Mend what is said above, and deploy again: it goes on from there."
        )


def _found(result: subprocess.CompletedProcess[str]) -> dict[str, t.Any] | None:
    """Return what module release_alembic has said, or None."""
    _, mark, rest = result.stdout.rpartition(f"\n{release_alembic.MARK}")
    return t.cast("dict[str, t.Any]", json.loads(rest.partition("\n")[0])) if mark else None


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["look", "run", "refuse"], "required": True},
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "release_id": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "application_user": {"type": "str", "required": True},
            # In one string: of a dictionary Ansible would also mask the short and harmless values, in all output.
            "secrets": {"type": "str", "default": "", "no_log": True},
            "pending_command": {"type": "str", "default": "auto"},
            "sql": {"type": "bool", "default": False},
            "changes": {"type": "bool", "default": True},
            "current": {"type": "list", "elements": "str"},
            "reason": {"type": "str", "default": ""},
            "deploy": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    layout = Layout(p["root"], p["app"])
    step, check = p["step"], module.check_mode
    if step == "refuse":
        if not check:
            record_failure(layout, p["deploy"], p["release_id"], "migrate", p["reason"])
        module.exit_json(changed=False)
    if step == "run" and check:
        module.exit_json(changed=p["changes"])
    os.umask(0o027)
    about: dict[str, t.Any] = {}
    if step == "look":
        live = layout.live_release()
        about["live_commit"] = (live and (layout.release(live) or {}).get("commit")) or ""
        about["built"] = layout.release(p["release_id"]) is not None
        if check and not about["built"]:
            module.exit_json(changed=False, pending=None, changes=True, ran=False, **about)
    try:
        if check:
            # Nothing is written, so it may look while somebody works.
            result = Migration(p).look(check=True)
        else:
            with busy(layout):
                migration = Migration(p)
                result = migration.look(check=False) if step == "look" else migration.run()
    except ReleaseError as error:
        if check:
            module.exit_json(changed=False, pending=None, changes=True, ran=False, unseen=str(error), **about)
        record_failure(layout, p["deploy"], p["release_id"], "migrate", str(error))
        module.fail_json(msg=f"{error}\nThe release that was live still serves.")
    module.exit_json(changed=step == "run" and p["changes"], **about, **result)


if __name__ == "__main__":
    main()
