#!/usr/bin/python
"""Ansible module: put this host back on the release that served before a deploy that did not end."""

from __future__ import annotations

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import (
    Layout,
    ReleaseError,
    append_record,
    busy,
    deploy_record,
    interrupt,
    read_pending,
    read_records,
)
from ansible.module_utils.release_slots import ARGUMENTS, Cutover

DOCUMENTATION = r"""
module: release_recover
short_description: Undo, or bring to its end, a deploy that was cut off
description:
  - Ends the step of a deploy that is still under way on this host although nobody listens to it any more, then makes
    the release live that served before, and stops the other. Where that still runs it is a matter of one rename(2).
  - Does nothing on a host where no deploy is half-done.
  - M(release_cutover) notes in C(.deploy.json) below O(root) what there is to undo.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  forward:
    description: The whole fleet had switched, so finish what is left to do on the new release instead of going back.
    type: bool
    default: false
  reason: {description: Why the deploy did not end; for deploys.jsonl., type: str, default: it was cut off}
  deploy:
    description: Who deployed what, to record that it did not end well where nothing had been started yet.
    type: dict
    default: {}
  health_timeout: {description: Seconds a release has to become healthy., type: float, default: 60}
  drain_timeout: {description: Seconds to wait for requests that run., type: float, default: 60}
  log_lines: {description: Lines of the application's log in an error., type: int, default: 60}
  log_directory: {description: Where Supervisor writes the application's log., type: path, default: /var/log/supervisor}
  supervisor_socket: {description: Where supervisord listens., type: path, default: /run/supervisor.sock}
  supervisor_directory: {description: Where supervisord reads programs., type: path, default: /etc/supervisor/conf.d}
"""

RETURN = r"""
outcome: {description: "What became of the host, in words.", type: str, returned: success}
release: {description: The release that serves now; empty when none does., type: str, returned: success}
slot: {description: Its slot., type: str, returned: success}
pending:
  description: The release that a deploy was bringing up here when it was cut off; empty when none was.
  type: str
  returned: success
"""


def recover(p: dict[str, t.Any], layout: Layout, pending: dict[str, t.Any]) -> str:
    """Bring the host to one release; returns what became of it.

    Raises:
        ReleaseError: that release cannot serve.
    """
    live, old, new = layout.live_release() or "", pending["from"], pending["to"]
    if p["forward"]:
        Cutover({**p, "release_id": new}).run()
        if pending["deploy"].get("rollback") and old not in ("", new):
            append_record(layout, deploy_record(pending["deploy"], old, "rolled back"))
        record = deploy_record(pending["deploy"], new, "live", p["reason"])
        append_record(layout, {**record, "slot": layout.live_slot()})
        return "finished"
    if old:
        Cutover({**p, "release_id": old}).run()
        outcome = "switched back" if live != old else "unchanged"
    else:
        Cutover({**p, "release_id": new}).take_out()
        outcome = "taken out of service" if live else "not in service yet"
    record_once(layout, pending["deploy"], new, p["reason"])
    return outcome


def record_once(layout: Layout, deploy: t.Mapping[str, t.Any], release_id: str, reason: str) -> None:
    """Record that a deploy was undone, unless this host has failed and recorded why, or has finished."""
    if (read_records(layout) or [{}])[-1].get("id") != deploy["id"]:
        append_record(layout, deploy_record(deploy, release_id, "failed: undone", reason))


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "forward": {"type": "bool", "default": False},
            "reason": {"type": "str", "default": "it was cut off"},
            "deploy": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    p = module.params
    layout = Layout(p["root"], p["app"], p["log_directory"])
    outcome = "unchanged"
    pending = None
    try:
        if layout.root.is_dir():
            pending = read_pending(layout)
            if not module.check_mode:
                interrupt(layout)
                with busy(layout):
                    if pending := read_pending(layout):
                        outcome = recover(p, layout, pending)
                    elif p["deploy"] and not p["forward"]:
                        record_once(layout, p["deploy"], p["deploy"]["commit"][:8], p["reason"])
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=f"{error}\nThis host is not on the release that the others are on. Deploy, or roll back.")
    module.exit_json(
        changed=pending is not None,
        outcome=outcome,
        release=layout.live_release() or "",
        slot=layout.live_slot() or "",
        pending=(pending or {}).get("to", ""),
    )


if __name__ == "__main__":
    main()
