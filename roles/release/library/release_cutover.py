#!/usr/bin/python
"""Ansible module: make a release live on this host without dropping a request, in steps."""

from __future__ import annotations

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import Layout, ReleaseError, busy, record_failure
from ansible.module_utils.release_slots import ARGUMENTS, Cutover

DOCUMENTATION = r"""
module: release_cutover
short_description: Start a release in the idle slot, check it, make it live, drain and stop the old one
description:
  - In three steps, so that a fleet can take each of them together. Each is one call, so that a lost control connection
    leaves the host on one release or the other. Running them again converges, from wherever an earlier run was cut off.
  - A release that does not become healthy is stopped and forgotten; the one that was live has not noticed.
  - Until V(drain) the old release keeps running, so that going back to it is a matter of one rename(2). What is under
    way is noted in C(.deploy.json) below O(root); M(release_recover) undoes it from there.
  - When the release serves already nothing happens, except that a slot that is down is started again.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: "The release, built.", type: str, required: true}
  step:
    description:
      - V(start) starts it in the slot that nginx does not reach and waits until it is healthy.
      - V(switch) lets nginx reach it.
      - V(drain) waits for the requests of the old release and stops it.
      - V(all) does the three.
    type: str
    choices: [start, switch, drain, all]
    default: all
  health_timeout: {description: Seconds the release has to become healthy., type: float, default: 60}
  drain_timeout: {description: Seconds to wait for the requests of the old release., type: float, default: 60}
  log_lines: {description: Lines of the application's log in an error., type: int, default: 60}
  log_directory: {description: Where Supervisor writes the application's log., type: path, default: /var/log/supervisor}
  supervisor_socket: {description: Where supervisord listens., type: path, default: /run/supervisor.sock}
  supervisor_directory: {description: Where supervisord reads programs., type: path, default: /etc/supervisor/conf.d}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
"""

RETURN = r"""
done: {description: "Whether nothing was left to do, for V(start).", type: bool, returned: "for V(start) and V(all)"}
slot: {description: The slot of the release., type: str, returned: success}
previous: {description: The release that was live before., type: str, returned: "for V(start) and V(all)"}
healthy_seconds: {description: From the slot's start to its first good health check., type: float, returned: changed}
drain_seconds: {description: From the cut-over to the old slot's last connection's end., type: float, returned: changed}
unfinished: {description: Connections left when the drain timeout had passed., type: int, returned: changed}
"""


def start(module: AnsibleModule, layout: Layout) -> dict[str, t.Any]:
    """Do the step V(start), or V(all); returns the module's result."""
    p = module.params
    planned = {"changed": True, "done": False, "slot": "blue", "previous": layout.live_release() or ""}
    if live := layout.live_slot():
        planned["slot"] = "green" if live == "blue" else "blue"
    if module.check_mode and layout.release(p["release_id"]) is None:
        return planned
    cutover = Cutover(p)
    if cutover.is_done():
        # Nothing to do, but a service that cannot serve must not look like a deploy that succeeded.
        if not module.check_mode and live:
            cutover.await_healthy(live, max(cutover.log_size(live) - 4000, 0))
        return {"changed": False, "done": True, "slot": live, "previous": layout.live_release()}
    if module.check_mode:
        return planned
    with busy(layout):
        if p["step"] == "all":
            return {"changed": True, "done": False, **cutover.run()}
        cutover.begin(p["deploy"])
        slot, seconds = cutover.start_idle()
    return {**planned, "slot": slot, "healthy_seconds": seconds}


def go_on(module: AnsibleModule, layout: Layout) -> dict[str, t.Any]:
    """Do the step V(switch) or V(drain); returns the module's result."""
    if module.check_mode:
        return {"changed": True}
    cutover = Cutover(module.params)
    with busy(layout):
        if module.params["step"] == "switch":
            return {"changed": True, "slot": cutover.switch()}
        if layout.live_release() != module.params["release_id"]:
            # What nginx does not reach is the release itself then.
            raise ReleaseError(f"Release {module.params['release_id']} does not serve here yet.")
        drained, unfinished = cutover.retire()
    return {"changed": True, "slot": layout.live_slot(), "drain_seconds": drained, "unfinished": unfinished}


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            **ARGUMENTS,
            "release_id": {"type": "str", "required": True},
            "step": {"type": "str", "choices": ["start", "switch", "drain", "all"], "default": "all"},
            "deploy": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    layout = Layout(p["root"], p["app"], p["log_directory"])
    try:
        result = (start if p["step"] in ("start", "all") else go_on)(module, layout)
    except (ReleaseError, OSError) as error:
        record_failure(
            layout, p["deploy"], p["release_id"], "cut-over" if p["step"] == "all" else p["step"], str(error)
        )
        live = layout.live_release()
        if live == p["release_id"]:
            outcome = "It is the live release, and is left as it is."
        elif live:
            outcome = f"Release {live} still serves."
        else:
            outcome = "No release serves yet."
        module.fail_json(msg=f"{error}\n{outcome}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
