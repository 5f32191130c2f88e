"""Callback plugin: whatever ends a deploy half-way, leave the fleet on one release and unlocked.

A play can rescue a failed task. It cannot rescue a server that is gone, a Ctrl-C, or a closed terminal. This plugin
watches a run that holds deploy locks, and when the run ends without having given them back it runs
playbooks/recover.yml, with the same inventory and variables, before ansible-playbook exits. The exit code stays.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path

from ansible import context
from ansible.plugins.callback import CallbackBase
from ansible.utils.display import Display

DOCUMENTATION = r"""
name: deploy_guard
type: aggregate
short_description: Undo a deploy that does not end by itself
description:
  - Enabled in ansible.cfg. Does nothing in a run that takes no deploy lock, such as a dry run.
"""

PLAYBOOK = Path(__file__).resolve().parents[3] / "playbooks" / "recover.yml"

# What leaves something to undo on a server.
_STEPS = ("release_build", "release_migrate", "release_cutover")

# Options of ansible-playbook that say how servers are reached: the attribute of its arguments and the option.
_OPTIONS = {
    "remote_user": "--user",
    "private_key_file": "--private-key",
    "connection": "--connection",
    "timeout": "--timeout",
    "ssh_common_args": "--ssh-common-args",
    "ssh_extra_args": "--ssh-extra-args",
    "become_method": "--become-method",
    "become_user": "--become-user",
    "become_password_file": "--become-password-file",
    "connection_password_file": "--connection-password-file",
    "forks": "--forks",
    "subset": "--limit",
}
# Seconds from an interruption to Ansible's own end. It ends at once, or never: a worker that is told to end while it
# hands over a result keeps the queue's lock, and Ansible waits for that.
_END_SECONDS = 20
# What ansible-playbook exits with when it is interrupted.
_INTERRUPTED = 99

_LISTS = {"inventory": "--inventory", "vault_ids": "--vault-id", "vault_password_files": "--vault-password-file"}


def own_token() -> str:
    """Return the token of this run's locks, as role preflight makes it."""
    preflight = runpy.run_path(str(PLAYBOOK.parents[1] / "roles/preflight/action_plugins/preflight_host.py"))
    return str(preflight["token_of"](preflight["this_run"]()))


def recovery_command(
    cliargs: t.Mapping[str, t.Any], token: str, forward: str, reason: str, deploy: t.Mapping[str, t.Any]
) -> list[str]:
    """Return the command that recovers what a run with these arguments has left half-done.

    Args:
        cliargs: ansible-playbook's parsed command line.
        token: of the run's lock, which the recovery takes over.
        forward: `yes` when the whole fleet had switched already, `no`, or `unlock` when nothing was begun.
        reason: what ended the run, for the records.
        deploy: who deployed what, for the records.
    """
    command = [sys.executable, sys.argv[0], str(PLAYBOOK)]
    for name, option in _LISTS.items():
        for value in cliargs.get(name) or ():
            command += [option, str(value)]
    for name, option in _OPTIONS.items():
        if value := cliargs.get(name):
            command += [option, str(value)]
    for value in cliargs.get("extra_vars") or ():
        command += ["--extra-vars", str(value)]
    own = {
        "preflight_takeover_token": token,
        "recover_forward": forward,
        "recover_reason": reason,
        "recover_deploy": dict(deploy),
    }
    return [*command, "--extra-vars", json.dumps(own)]


class CallbackModule(CallbackBase):
    """See the module's docstring."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "deploy_guard"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.locked: set[str] = set()
        # Whether a task that takes locks is under way: what it has taken is known when it ends.
        self.locking = False
        self.token = ""
        self.begun = False
        self.deploy: dict[str, t.Any] = {}
        self.forward = False
        self.reason = "the run ended early"
        self.interrupted = False
        self.workers: list[int] = []
        self.ending = threading.Lock()
        self.terminal_gone = False
        self.pid = os.getpid()

    # What happens in the run

    def v2_playbook_on_start(self, playbook: t.Any) -> None:
        """Arrange to be called at the end, however it comes."""
        if Path(playbook._file_name).resolve() == PLAYBOOK:
            return
        atexit.register(self.at_exit)
        # A signal's handler only writes a byte: it must not take a lock that what it interrupts may hold.
        alarm, self.alarm = os.pipe()
        threading.Thread(target=self.end_if_stuck, args=(alarm,), daemon=True).start()
        # Ansible's own handler for Ctrl-C ends its workers and leaves in order; a SIGTERM would end it on the spot.
        interrupted = signal.getsignal(signal.SIGINT)
        if callable(interrupted):

            def leave(signum: int, frame: t.Any) -> None:
                # A push or a CI job that is cancelled may send several signals; one is enough.
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                self.reason = f"interrupted ({signal.Signals(signum).name})"
                self.terminal_gone = signum == signal.SIGHUP
                self.interrupted = True
                self.workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
                os.write(self.alarm, b"!")
                interrupted(signal.SIGINT, frame)

            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # Under nohup a closed terminal is to be survived.
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, leave)

    def v2_playbook_on_task_start(self, task: t.Any, is_conditional: bool) -> None:  # noqa: ARG002
        """Note the point of no return: the old release is stopped when, and only when, the whole fleet has switched."""
        self.leave_if_interrupted()
        self.locking = task.action == "preflight_host" and not task.check_mode
        if self.locking and not self.token:
            self.token = own_token()
        if task.action in _STEPS and not task.check_mode:
            self.begun = True
        if task.action == "release_cutover" and task.args.get("step") == "drain":
            self.forward = True

    def v2_playbook_on_play_start(self, play: t.Any) -> None:  # noqa: ARG002
        """Begin no play after an interruption."""
        self.leave_if_interrupted()

    def leave_if_interrupted(self) -> None:
        """Leave when an interruption has been lost.

        Python drops the exception of a signal that arrives inside a finaliser or a fork's hooks, and goes on. Begin
        nothing new then.
        """
        if self.interrupted and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    def v2_runner_on_ok(self, result: t.Any) -> None:
        """Note who is locked."""
        action, host, said = result.task.action, result.host.get_name(), result.result
        if action == "preflight_host" and said.get("lock"):
            self.locked.add(host)
        elif action in ("deploy_lock", "release_finish"):
            self.locked.discard(host)
        elif action in ("release_plan", "release_choice"):
            self.deploy = dict(said.get("deploy") or {})

    def v2_runner_on_failed(self, result: t.Any, ignore_errors: bool = False) -> None:
        """Note the first failure."""
        if not ignore_errors and self.reason == "the run ended early":
            self.reason = f"{result.host.get_name()} failed"
        if result.task.action == "release_finish":
            self.locked.discard(result.host.get_name())

    def v2_runner_on_unreachable(self, result: t.Any) -> None:
        """Note the first server that was lost."""
        if self.reason == "the run ended early":
            self.reason = f"{result.host.get_name()} was not reachable"

    # The end

    def end_if_stuck(self, alarm: int) -> None:
        """Recover and end in Ansible's place, when it has been interrupted and does not end. Runs beside it."""
        os.read(alarm, 1)
        time.sleep(_END_SECONDS)
        if self.ending.acquire(blocking=False):
            try:
                self.recover()
            finally:
                os._exit(_INTERRUPTED)

    def at_exit(self) -> None:
        """Recover when this run still holds a lock."""
        if os.getpid() != self.pid:
            return
        # Whoever comes second waits for the first, who ends the process.
        self.ending.acquire()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.recover()

    def recover(self) -> None:
        """Recover when this run still holds a lock."""
        if not (self.locked or self.locking):
            return
        # Ansible tells its workers to end, each with what it has started. Now and then one ends alone, and its task
        # goes on.
        for worker in self.workers:
            with contextlib.suppress(OSError):
                os.killpg(worker, signal.SIGTERM)
        display = Display()
        with contextlib.suppress(OSError, ValueError):
            text = "going back to the release that served before, and "
            if not self.begun:
                text = ""
            elif self.forward:
                text = "finishing it, and "
            display.display(f"\nThe run did not end by itself ({self.reason}): {text}unlocking. Please wait.")
            sys.stdout.flush()
        # While servers are being locked, another run may hold some of the locks, and keeps them.
        forward = "unlock" if not self.begun else "yes" if self.forward else "no"
        command = recovery_command(context.CLIARGS, self.token, forward, self.reason, self.deploy)
        # By number, because Ansible keeps its own from being inherited.
        out, err = (subprocess.DEVNULL, subprocess.DEVNULL) if self.terminal_gone else (1, 2)
        # A session of its own: the next Ctrl-C is not for it.
        result = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, check=False
        )
        if result.returncode:
            with contextlib.suppress(OSError, ValueError):
                display.error(
                    "The fleet could not be brought back to one release. When the cause above is mended: "
                    "ansible-playbook playbooks/recover.yml -i <the same inventory>"
                )
