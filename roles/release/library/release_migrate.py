#!/usr/bin/python
"""Ansible module: migrate the database with a release that does not serve yet."""

from __future__ import annotations

import os
import shlex
import time

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
  - Runs the release's migration command as the service account, in the release, with its C(.env) and virtualenv.
  - When it fails the deploy ends here, and the release that was live still serves.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: The release., type: str, required: true}
  user: {description: Account that runs the application., type: str, required: true}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
"""

RETURN = r"""
output: {description: What the command printed last., type: list, returned: success}
"""


def migrate(layout: Layout, release_id: str, user: str) -> dict[str, object]:
    """Run the migration of a release.

    Raises:
        ReleaseError: it failed or took too long; with its last words, secrets removed.
    """
    directory = layout.releases / release_id
    release = layout.release(release_id)
    if release is None:
        raise ReleaseError(f"Release {release_id} is not built here.")
    command = release["migrate_command"]
    application = directory / release["subdirectory"]
    mask = Mask.of_release(directory)
    env = {
        "HOME": str(layout.shared),
        "PATH": f"{directory}/.venv/bin:/usr/bin:/bin",
        "HARDSTAND_RELEASE": release_id,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if release["python_path"]:
        env["PYTHONPATH"] = ":".join(str(application / path) for path in release["python_path"])
    if release["export_env"]:
        env = {**parse_dotenv((directory / ".env").read_text()), **env}
    what = f"The migration `{command}` (release_migrate_command)"
    started = time.monotonic()
    try:
        result = run(
            shlex.split(command), user=account(user), cwd=application, env=env, timeout=release["migrate_timeout"]
        )
    except ReleaseError as error:
        raise ReleaseError(f"{what} did not finish: {mask(str(error))}") from None
    said = mask(result.stdout + result.stderr)
    if result.returncode:
        raise ReleaseError(f"{what} failed with exit code {result.returncode}.\n{last_lines(said, 25)}")
    return {"output": last_lines(said, 25).splitlines(), "seconds": round(time.monotonic() - started, 2)}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "release_id": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "deploy": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    layout = Layout(p["root"], p["app"])
    if module.check_mode:
        module.exit_json(changed=True)
    os.umask(0o027)
    try:
        with busy(layout):
            result = migrate(layout, p["release_id"], p["user"])
    except ReleaseError as error:
        record_failure(layout, p["deploy"], p["release_id"], "migrate", str(error))
        module.fail_json(msg=f"{error}\nThe release that was live still serves.")
    module.exit_json(changed=True, **result)


if __name__ == "__main__":
    main()
