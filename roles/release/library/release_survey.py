#!/usr/bin/python
"""Ansible module: tell which releases this host has, and which of them have served."""

from __future__ import annotations

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import Layout, read_records

DOCUMENTATION = r"""
module: release_survey
short_description: Tell which releases a host has, and which of them have served well
description:
  - Changes nothing. A release counts when it is here, whole, and the last that C(deploys.jsonl) says of it is that it
    went live. One that a rollback has left no longer counts, until it is deployed again.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
"""

RETURN = r"""
live: {description: The release that serves; empty when none does., type: str, returned: success}
releases:
  description:
    - Releases that are here, the last one to go live first - C(release), C(commit), C(subject), C(when) it last went
      live (empty when it never did), C(good) whether it may be gone back to without being named, C(served) whether it
      ever went live.
  type: list
  elements: dict
  returned: success
"""


def survey(layout: Layout) -> list[dict[str, t.Any]]:
    """Return the releases that are here, the last one to go live first."""
    went_live: dict[str, str] = {}
    left: set[str] = set()
    for record in read_records(layout):
        release_id = str(record.get("release"))
        if record.get("outcome") == "live":
            went_live.pop(release_id, None)
            went_live[release_id] = str(record.get("when"))
            left.discard(release_id)
        elif record.get("outcome") == "rolled back":
            left.add(release_id)
    order = [*reversed(went_live)]
    try:
        here = sorted(path.name for path in layout.releases.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        here = []
    found = []
    for release_id in [*order, *(name for name in here if name not in went_live)]:
        release = layout.release(release_id)
        if release is not None:
            found.append(
                {
                    "release": release_id,
                    "commit": release["commit"],
                    "subject": release["subject"],
                    "when": went_live.get(release_id, ""),
                    "served": release_id in went_live,
                    "good": release_id in went_live and release_id not in left,
                }
            )
    return found


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={"app": {"type": "str", "required": True}, "root": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    layout = Layout(module.params["root"], module.params["app"])
    module.exit_json(changed=False, live=layout.live_release() or "", releases=survey(layout))


if __name__ == "__main__":
    main()
