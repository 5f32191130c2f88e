"""Where releases run on a server: two slots, one of which nginx reaches. Shared by the modules that change that."""

from __future__ import annotations

import json
import os
import time
import typing as t
from pathlib import Path

from ansible.module_utils.host_files import replace_symlink, write_file
from ansible.module_utils.release_host import (
    SLOTS,
    Layout,
    Mask,
    ReleaseError,
    Supervisor,
    check_health,
    connections,
    last_lines,
    read_pending,
)

# Seconds between two looks at something that is awaited: short against a start, long against what a look costs.
_POLL = 0.03

# What the modules that work on slots have in common.
ARGUMENTS: dict[str, dict[str, t.Any]] = {
    "app": {"type": "str", "required": True},
    "root": {"type": "path", "required": True},
    "health_timeout": {"type": "float", "default": 60},
    "drain_timeout": {"type": "float", "default": 60},
    "log_lines": {"type": "int", "default": 60},
    "log_directory": {"type": "path", "default": "/var/log/supervisor"},
    "supervisor_socket": {"type": "path", "default": "/run/supervisor.sock"},
    "supervisor_directory": {"type": "path", "default": "/etc/supervisor/conf.d"},
}


class Cutover:
    """One release on its way to serve, on one host. Each step may be repeated, and cut off anywhere."""

    def __init__(self, params: t.Mapping[str, t.Any]) -> None:
        self.p = params
        self.layout = Layout(params["root"], params["app"], params["log_directory"])
        self.supervisor = Supervisor(params["supervisor_socket"], params["supervisor_directory"])
        release = self.layout.release(params["release_id"])
        if release is None:
            raise ReleaseError(f"Release {params['release_id']} is not built here.")
        self.release = release
        self.directory = self.layout.releases / params["release_id"]

    def program_file(self, slot: str) -> bytes:
        """Return Supervisor's configuration for this release in a slot."""
        path: Path = self.directory / ".hardstand" / f"{slot}.conf"
        return path.read_bytes()

    def configured_in(self, slot: str) -> bool:
        """Return whether what a slot is configured to run is this release."""
        try:
            configured: bytes = self.supervisor.file(self.layout.program(slot)).read_bytes()
        except FileNotFoundError:
            return False
        return configured == self.program_file(slot)

    def serving_slot(self) -> str | None:
        """Return the live slot when what it is configured to run is this release."""
        slot = self.layout.live_slot()
        return slot if slot and self.configured_in(slot) else None

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

    def idle_slot(self) -> str:
        """Return the slot that nginx does not reach."""
        live = self.layout.live_slot()
        return other(live) if live else str(SLOTS[0])

    def runs_in(self, slot: str) -> bool:
        """Return whether a slot is configured to run this release, and is up."""
        return self.configured_in(slot) and self.supervisor.state(self.layout.program(slot)) in Supervisor.UP

    def begin(self, deploy: t.Mapping[str, t.Any]) -> None:
        """Note what is under way, so that it can be undone from here whatever becomes of the control node."""
        pending = read_pending(self.layout)
        # What an earlier deploy left half-done goes back to what served before that one, on every host alike.
        came_from = pending["from"] if pending else self.layout.live_release() or ""
        # The lock's token is no business of a file that outlives the run.
        told = {name: value for name, value in deploy.items() if name != "lock"}
        content = {"to": self.p["release_id"], "from": came_from, "deploy": told}
        write_file(self.layout.pending, json.dumps(content) + "\n", 0o644)

    def start_idle(self) -> tuple[str, float]:
        """Start the release where nginx does not reach it, or find it started; returns the slot and the seconds.

        Raises:
            ReleaseError: it cannot serve; it is stopped and forgotten, and what serves has not noticed.
        """
        slot = self.serving_slot()
        if slot is not None:
            # Cut off after the cut-over, or down: the old slot may still be there.
            if self.supervisor.state(self.layout.program(slot)) not in Supervisor.UP:
                self.remove(slot)  # Supervisor waits longer after each failed start; we do not.
            return slot, self.start(slot)
        slot = self.idle_slot()
        if not self.runs_in(slot):
            self.remove(slot)  # Left behind by a run that was cut off.
        try:
            return slot, self.start(slot)
        except Exception as error:  # not a signal, which may have cut off a word to Supervisor
            try:
                self.remove(slot)
            except ReleaseError as second:
                raise ReleaseError(f"{error}\n{second}") from error
            raise

    def switch(self) -> str:
        """Let nginx reach the release that was started; returns its slot. The old one keeps running.

        Raises:
            ReleaseError: it runs nowhere here, or does not answer where nginx looks for it.
        """
        slot = self.serving_slot() or self.idle_slot()
        if not self.runs_in(slot):
            raise ReleaseError(f"Release {self.p['release_id']} does not run here, although it was started.")
        offset = self.log_size(slot)
        self.make_live(slot)
        answer = check_health(self.layout.live_socket, self.release["health_path"], self.release["host_header"], 10.0)
        if not answer.healthy:
            raise ReleaseError(self.explain(slot, offset, f"is live and not healthy: {answer.text}"))
        return str(slot)

    def retire(self) -> tuple[float, int]:
        """Drain and stop the slot that nginx does not reach; returns the seconds it took and what was left."""
        slot = self.idle_slot()
        drained, unfinished = self.drain(slot)
        self.remove(slot)
        return drained, unfinished

    def run(self) -> dict[str, t.Any]:
        """Make the release live, all steps at once; returns what module release_cutover returns.

        Raises:
            ReleaseError: it is not live, and the old one still is.
        """
        previous = self.layout.live_release()
        slot, healthy = self.start_idle()
        self.make_live(slot)
        drained, unfinished = self.retire()
        self.layout.pending.unlink(missing_ok=True)
        return {
            "slot": slot,
            "previous": previous or "",
            "healthy_seconds": healthy,
            "drain_seconds": drained,
            "unfinished": unfinished,
        }

    def take_out(self) -> None:
        """Stop the release and leave nothing that serves: there was nothing before it."""
        self.layout.live_socket.unlink(missing_ok=True)
        self.layout.current.unlink(missing_ok=True)
        for slot in SLOTS:
            self.remove(slot)
        self.layout.pending.unlink(missing_ok=True)


def other(slot: str) -> str:
    """Return the slot that `slot` is not."""
    return str(SLOTS[1 - SLOTS.index(slot)])
