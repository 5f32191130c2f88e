"""Action plugin: what the module ``preflight_host`` cannot do from the server.

It turns a failed connection into a message that names the file to edit, waits for the deploy lock, recognises a holder
on this machine that has died, and gives Python to a bare server: the one thing that preflight ever changes.

Arguments, beside the module's own (``library/preflight_host.py``):
    source: where the server is defined, as ``file:line``.
    lock: the lock to take, as the module has it, or nothing; `dead_token` may name a holder known to be gone.
    lock_wait: seconds to wait for a lock that another run holds.

Returns what the module returns, and ``python_missing``: true when the server has no Python and this is a dry run, which
cannot look any further.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import time
import typing as t
import uuid
from pathlib import Path
from types import SimpleNamespace

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

MODULE_FILE = Path(__file__).resolve().parents[1] / "library" / "preflight_host.py"

# What a server without Python can still tell.
ASK_BARE_SERVER = "cat /etc/os-release; echo ---; df -Pm / | awk 'NR==2 {print $4}'"
LACKS_PYTHON = re.compile(r"interpreter .* was not found|python[\d.]*: .*not found|python[\d.]*: No such file")
INSTALL_PYTHON = (
    "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update &&"
    " apt-get -qq -o DPkg::Lock::Timeout=120 install --no-install-recommends python3 python3-apt </dev/null"
)


def process_start(pid: int) -> str:
    """Return when a process of this machine started, in the system's own words; empty when there is none.

    Together with the pid it names a process for good: pids are used again.
    """
    try:
        # The command's name, in parentheses, may contain anything; the start is the 20th field after it (proc(5)).
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self").is_dir():
            return ""
    # A control node without /proc, such as macOS.
    answer = subprocess.run(["/bin/ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S603
    return answer.stdout.strip()


def machine_identity() -> str:
    """Return what tells one set of pids from another: this boot and this pid namespace.

    Two CI containers on one host share the boot, and have different processes under the same pids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}"


def this_run() -> dict[str, t.Any]:
    """Return what a lock says about the run of Ansible that this worker process belongs to."""
    parent = multiprocessing.parent_process()
    pid = parent.pid if parent and parent.pid else os.getpid()
    # The first is what a git push says; see roles/git_push.
    user = os.environ.get("HARDSTAND_DEPLOY_WHO") or os.environ.get("SUDO_USER") or getpass.getuser()
    return {
        "owner": f"{user}@{socket.gethostname()}",
        "pid": pid,
        "started": process_start(pid),
        "machine": machine_identity(),
    }


def token_of(run: t.Mapping[str, t.Any]) -> str:
    """Return what tells the locks of one run from those of any other."""
    return f"{run['machine']}/{run['pid']}/{run['started']}"


def is_dead(holder: t.Mapping[str, t.Any]) -> bool:
    """Tell whether a holder ran on this machine and is gone. False when it cannot be known."""
    if holder.get("machine") != machine_identity() or not isinstance(holder.get("pid"), int):
        return False
    return process_start(holder["pid"]) != holder.get("started")


class ActionModule(ActionBase):
    """Check one server and take its deploy lock."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return facts and the lock, or a failure that says what to do about it."""
        super().run(tmp, task_vars)
        self.task_vars = task_vars or {}
        arguments = dict(self._task.args)
        self.host = self.task_vars["inventory_hostname"]
        self.source = arguments.pop("source", "the inventory")
        wait = int(arguments.pop("lock_wait", 0))
        try:
            return self._check(arguments, wait)
        except AnsibleConnectionFailure as error:
            return {"unreachable": True, "changed": False, "msg": self._unreachable(str(error))}

    def _check(self, arguments: dict[str, t.Any], wait: int) -> dict[str, t.Any]:
        run = this_run()
        lock: dict[str, t.Any] = {}
        if arguments.get("lock"):
            lock = {**arguments["lock"], "token": token_of(run), "holder": run}
            arguments["lock"] = lock
        else:
            arguments.pop("lock", None)
        changed = False
        result = self._module(arguments)
        if self._lacks_python(result):
            if failure := self._give_python(arguments):
                return failure
            changed, result = True, self._module(arguments)

        deadline = time.monotonic() + wait
        announced = False
        while not result.get("failed") and (holder := result.get("lock_holder")):
            if is_dead(holder):
                self._display.display(f"{self.host}: the deploy of {self._holder(holder)} has died; taking its lock")
                lock["dead_token"] = holder["token"]
            elif (left := deadline - time.monotonic()) > 0:
                if not announced:
                    self._display.display(f"{self.host}: waiting {wait} s for the deploy of {self._holder(holder)}")
                    announced = True
                time.sleep(min(2.0, left))
            else:
                text = f"is being deployed to by {self._holder(holder)}."
                hint = "Wait (-e preflight_lock_wait=SECONDS), or if that run is gone: -e preflight_lock_force=true"
                return self._failure(f"{text} {hint}", changed)
            result = self._module(arguments)

        if result.get("failed"):
            return self._failure(str(result.get("msg", "failed")), changed)
        result.pop("invocation", None)
        return {**result, "changed": changed, "python_missing": False}

    def _module(self, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        result: dict[str, t.Any] = self._execute_module(
            module_name="preflight_host", module_args=arguments, task_vars=self.task_vars
        )
        return result

    @staticmethod
    def _lacks_python(result: t.Mapping[str, t.Any]) -> bool:
        said = f"{result.get('msg', '')} {result.get('module_stderr', '')} {result.get('module_stdout', '')}"
        return bool(result.get("failed") and LACKS_PYTHON.search(said))

    def _give_python(self, arguments: dict[str, t.Any]) -> dict[str, t.Any] | None:
        """Install Python on a server that has none and could be deployed to; returns why not, or None."""
        module = SimpleNamespace(**runpy.run_path(str(MODULE_FILE)))

        release, _, free = self._raw(ASK_BARE_SERVER)["stdout"].partition("---")
        problem, _ = module.platform_problem(module.parse_os_release(release), arguments["platforms"])
        problems = [problem] if problem else []
        if free.strip().isdecimal():
            problems += module.disk_problems({"/": int(free)}, int(arguments["min_free_mb"]))
        if problems:
            return self._failure("; ".join(problems))
        if self._task.check_mode:
            text = f"{self.host} has no Python yet, so a dry run can look no further; a real run installs everything"
            self._display.display(text)
            return {"changed": True, "python_missing": True, "msg": text, "lock": {}}
        self._display.display(f"{self.host}: a bare server; installing Python, which Ansible needs there")
        answer = self._raw(INSTALL_PYTHON)
        if answer["rc"] != 0:
            output = f"{answer['stdout']}\n{answer['stderr']}".strip().splitlines()[-5:]
            return self._failure("\n  ".join(["has no Python, and apt-get could not install it:", *output]))
        return None

    def _raw(self, command: str) -> dict[str, t.Any]:
        answer: dict[str, t.Any] = self._low_level_execute_command(command)
        return answer

    def _holder(self, holder: t.Mapping[str, t.Any]) -> str:
        return f"{holder.get('owner', 'unknown')} (pid {holder.get('pid', '?')}) since {holder.get('since', 'unknown')}"

    def _failure(self, text: str, changed: bool = False) -> dict[str, t.Any]:
        ending = "Python was installed on it" if changed else "Nothing has been changed"
        text = text if text.endswith((".", "true")) else f"{text}."
        return {"failed": True, "changed": changed, "msg": f"{self.source}: {self.host} {text}\n{ending}."}

    def _unreachable(self, message: str) -> str:
        address = self.task_vars.get("ansible_host", self.host)
        port = self.task_vars.get("ansible_port", 22)
        user = self.task_vars.get("ansible_user")
        # ssh says what is the matter last, after its banners and its warnings.
        reason = re.sub(
            r"^(Failed to connect|Data could not be sent).*?ssh: (ssh: )?", "", message.strip().rpartition("\n")[2]
        )
        where = f"{address}, port {port}" + (f", user {user}" if user else "")
        hint = ""
        if "Host key verification failed" in message:
            hint = f" Its host key is not known, or has changed; look at it first: ssh -p {port} {address}"
        if len(self.task_vars.get("groups", {}).get("app", [])) > 1:
            hint += f"\nTo deploy to the other servers without it: -e preflight_without={self.host}"
        return (
            f"{self.source}: {self.host} ({where}) cannot be reached: {reason.removesuffix('.')}.{hint}\n"
            "Nothing has been changed. Correct ansible_host, ansible_port or ansible_user there, or start the server."
        )
