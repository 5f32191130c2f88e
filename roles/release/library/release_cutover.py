#!/usr/bin/python
"""Ansible module: make a release live on this host without dropping a request."""

from __future__ import annotations

import fcntl
import os
import time
import typing as t
from contextlib import contextmanager
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.release_host import (
    SLOTS,
    Layout,
    Mask,
    ReleaseError,
    Supervisor,
    check_health,
    connections,
    last_lines,
    record_failure,
    replace_symlink,
)

DOCUMENTATION = r"""
module: release_cutover
short_description: Start a release in the idle slot, check it, make it live, drain and stop the old one
description:
  - All in one call, so that a lost control connection leaves the host on one release or the other. Running it again
    converges, from wherever an earlier run was cut off.
  - A release that does not become healthy is stopped and forgotten; the one that was live has not noticed.
  - When the release serves already nothing happens, except that a slot that is down is started again.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: "The release, built.", type: str, required: true}
  health_timeout: {description: Seconds the release has to become healthy., type: float, default: 60}
  drain_timeout: {description: Seconds to wait for the requests of the old release., type: float, default: 60}
  log_lines: {description: Lines of the application's log in an error., type: int, default: 60}
  log_directory: {description: Where Supervisor writes the application's log., type: path, default: /var/log/supervisor}
  supervisor_socket: {description: Where supervisord listens., type: path, default: /run/supervisor.sock}
  supervisor_directory: {description: Where supervisord reads programs., type: path, default: /etc/supervisor/conf.d}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
"""

RETURN = r"""
slot: {description: The live slot., type: str, returned: success}
previous: {description: The release that was live before., type: str, returned: success}
healthy_seconds: {description: From the slot's start to its first good health check., type: float, returned: changed}
drain_seconds: {description: From the cut-over to the old slot's last connection's end., type: float, returned: changed}
unfinished: {description: Connections left when the drain timeout had passed., type: int, returned: changed}
"""

# Seconds between two looks at something that is awaited: short against a start, long against what a look costs.
_POLL = 0.03


class Cutover:
    """One cut-over on one host."""

    def __init__(self, params: dict[str, t.Any]) -> None:
        self.p = params
        self.layout = Layout(params["root"], params["app"], params["log_directory"])
        self.supervisor = Supervisor(params["supervisor_socket"], params["supervisor_directory"])
        release = self.layout.release(params["release_id"])
        if release is None:
            raise ReleaseError(f"Release {params['release_id']} is not built here.")
        self.release = release
        self.directory = self.layout.releases / params["release_id"]

    @contextmanager
    def alone(self) -> t.Iterator[None]:
        """Hold this host's cut-over lock; the kernel frees it however we end."""
        # In root's directory, not among the sockets: the application owns that one, and could plant a link there.
        with (self.layout.root / ".cutover.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReleaseError(
                    "Another cut-over is under way on this host; wait for it, or see who deploys."
                ) from None
            yield

    def program_file(self, slot: str) -> bytes:
        """Return Supervisor's configuration for this release in a slot."""
        path: Path = self.directory / ".hardstand" / f"{slot}.conf"
        return path.read_bytes()

    def serving_slot(self) -> str | None:
        """Return the live slot when what it is configured to run is this release."""
        slot = self.layout.live_slot()
        if slot is None:
            return None
        try:
            current = self.supervisor.file(self.layout.program(slot)).read_bytes()
        except FileNotFoundError:
            return None
        return slot if current == self.program_file(slot) else None

    def is_done(self) -> bool:
        """Return whether nothing is left to do: this release serves, alone."""
        slot = self.serving_slot()
        if slot is None or self.layout.live_release() != self.p["release_id"]:
            return False
        idle = self.layout.program(other(slot))
        return (
            not self.supervisor.file(idle).exists()
            and self.supervisor.state(idle) is None
            and self.supervisor.state(self.layout.program(slot)) in Supervisor.UP
        )

    def log_size(self, slot: str) -> int:
        """Return the size of a slot's log in bytes; 0 when there is none, or somebody removed it."""
        log: Path = self.layout.log(slot)
        return log.stat().st_size if log.exists() else 0

    def start(self, slot: str) -> float:
        """Start the release in a slot and wait until it can serve; returns the seconds it took.

        Raises:
            ReleaseError: it ended, or was not healthy in time; with the last lines of its log.
        """
        offset = self.log_size(slot)
        self.supervisor.start(self.layout.program(slot), self.program_file(slot))
        return self.await_healthy(slot, offset)

    def await_healthy(self, slot: str, offset: int) -> float:
        """Wait until the release that runs in a slot can serve; returns the seconds it took.

        Args:
            slot: where it runs.
            offset: size of the slot's log, in bytes, when this began; an error shows what came after.

        Raises:
            ReleaseError: it ended, or was not healthy in time.
        """
        program = self.layout.program(slot)
        started = time.monotonic()
        deadline = started + self.p["health_timeout"]
        while True:
            # Never wait long beyond the deadline for one answer, nor so short that a busy server cannot give it.
            patience = min(5.0, max(deadline - time.monotonic(), 0.5))
            answer = check_health(
                self.layout.socket(slot), self.release["health_path"], self.release["host_header"], patience
            )
            if answer.healthy:
                return round(time.monotonic() - started, 2)
            state = self.supervisor.state(program)
            if state not in Supervisor.UP:
                raise ReleaseError(self.explain(slot, offset, f"ended while it started ({state})"))
            if time.monotonic() > deadline:
                path, limit = self.release["health_path"], self.p["health_timeout"]
                why = f"was not healthy within {limit:g} s; {path} said: {answer.text}"
                raise ReleaseError(self.explain(slot, offset, why))
            time.sleep(_POLL)

    def explain(self, slot: str, offset: int, what: str) -> str:
        """Return what went wrong with a slot, with the log that it wrote since `offset` (bytes)."""
        try:
            with self.layout.log(slot).open("rb") as file:
                file.seek(offset if os.fstat(file.fileno()).st_size >= offset else 0)
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            text = ""
        mask = Mask.of_release(self.directory)
        tail = last_lines(mask(text), self.p["log_lines"]) or "(nothing)"
        return f"Release {self.p['release_id']} {mask(what)}.\nThe last lines of its log:\n{tail}"

    def make_live(self, slot: str) -> None:
        """Let nginx reach a slot. From the first rename(2) on, new connections go there."""
        if self.layout.live_slot() != slot:
            replace_symlink(self.layout.live_socket, f"{slot}.sock")
        if self.layout.live_release() != self.p["release_id"]:
            replace_symlink(self.layout.current, f"releases/{self.p['release_id']}")

    def drain(self, slot: str) -> tuple[float, int]:
        """Wait until nginx holds no connection to a slot; returns the seconds it took and how many are left.

        nginx keeps none idle for longer than two seconds, so what stays longer is a request.
        """
        started = time.monotonic()
        path = self.layout.socket(slot)
        while left := connections(path):
            if time.monotonic() - started > self.p["drain_timeout"]:
                break
            time.sleep(_POLL)
        return round(time.monotonic() - started, 2), left

    def remove(self, slot: str) -> None:
        """Stop what runs in a slot and forget it."""
        # Longer than Supervisor's own stopwaitsecs, after which it kills.
        self.supervisor.remove(self.layout.program(slot), self.release["request_timeout"] + 15)
        self.layout.socket(slot).unlink(missing_ok=True)

    def run(self) -> dict[str, t.Any]:
        """Make the release live; returns what the module returns.

        Raises:
            ReleaseError: it is not live, and the old one still is.
        """
        previous, old = self.layout.live_release(), self.layout.live_slot()
        slot = self.serving_slot()
        if slot is None:
            slot = other(old) if old else SLOTS[0]
            self.remove(slot)  # Left behind by a run that was cut off.
            try:
                healthy = self.start(slot)
            except BaseException as error:
                try:
                    self.remove(slot)
                except ReleaseError as second:
                    raise ReleaseError(f"{error}\n{second}") from error
                raise
        else:
            # Cut off after the cut-over, or down: the old slot may still be there.
            if self.supervisor.state(self.layout.program(slot)) not in Supervisor.UP:
                self.remove(slot)  # Supervisor waits longer after each failed start; we do not.
            healthy = self.start(slot)
        self.make_live(slot)
        drained, unfinished = self.drain(other(slot))
        self.remove(other(slot))
        return {
            "slot": slot,
            "previous": previous or "",
            "healthy_seconds": healthy,
            "drain_seconds": drained,
            "unfinished": unfinished,
        }


def other(slot: str) -> str:
    """Return the slot that `slot` is not."""
    return str(SLOTS[1 - SLOTS.index(slot)])


def cut_over(module: AnsibleModule) -> dict[str, t.Any]:
    """Do what is to be done; returns the module's result."""
    p = module.params
    layout = Layout(p["root"], p["app"])
    live = layout.live_slot()
    planned = {"changed": True, "slot": other(live or SLOTS[1]), "previous": layout.live_release() or ""}
    if module.check_mode and layout.release(p["release_id"]) is None:
        return planned
    cutover = Cutover(p)
    if cutover.is_done():
        # Nothing to do, but a service that cannot serve must not look like a deploy that succeeded.
        if not module.check_mode and live:
            cutover.await_healthy(live, max(cutover.log_size(live) - 4000, 0))
        return {"changed": False, "slot": live, "previous": layout.live_release()}
    if module.check_mode:
        return planned
    with cutover.alone():
        return {"changed": True, **cutover.run()}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "release_id": {"type": "str", "required": True},
            "health_timeout": {"type": "float", "default": 60},
            "drain_timeout": {"type": "float", "default": 60},
            "log_lines": {"type": "int", "default": 60},
            "log_directory": {"type": "path", "default": "/var/log/supervisor"},
            "supervisor_socket": {"type": "path", "default": "/run/supervisor.sock"},
            "supervisor_directory": {"type": "path", "default": "/etc/supervisor/conf.d"},
            "deploy": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        result = cut_over(module)
    except (ReleaseError, OSError) as error:
        layout = Layout(p["root"], p["app"])
        record_failure(layout, p["deploy"], p["release_id"], "cut-over", str(error))
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
