"""A second, fresh connection to a server: what proves that somebody can still log in.

The connection that a run already has proves nothing: it was let in before anything changed, and ssh shares it between
tasks. This one shares nothing, and is otherwise made as Ansible makes its own, with the same address, port, keys, jump
hosts and known host keys.
"""

from __future__ import annotations

import time
import typing as t

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.loader import connection_loader

# ssh takes the first of several values, and these stand first. Nothing else is changed.
FRESH = "-o ControlMaster=no -o ControlPath=none -o ControlPersist=no"

# What a server that is just taking up its new settings may answer for a moment.
PASSING = ("Connection refused", "Connection reset", "Connection closed", "kex_exchange_identification")


class Attempt(t.NamedTuple):
    """How a login went."""

    ok: bool
    # Whether there was a login at all, whatever the command said then.
    logged_in: bool
    # What ssh, or the command, said last.
    reason: str

    @property
    def refused(self) -> bool:
        """Whether the server is there and does not let this user in."""
        return not self.logged_in and "Permission denied" in self.reason


def goes_by_ssh(connection: t.Any) -> bool:
    """Return whether Ansible reaches the server by ssh; into a container it may go otherwise."""
    return bool(connection.transport == "ssh")


def taken_back(undo: t.Callable[[], dict[str, t.Any]]) -> bool:
    """Undo a change; return whether that could be done, and is not left to the server's own timer.

    Not only a lost connection stands in the way: with sudo changed, the one that is left may not become root any more.
    """
    try:
        return not undo().get("failed")
    except AnsibleError:
        return False


def failure(host: str, text: str, ending: str) -> dict[str, t.Any]:
    """Return a failed task's result: what is wrong on which server and, in a line of its own, how things are now."""
    text = text if text.endswith(".") else f"{text}."
    return {"failed": True, "changed": False, "msg": f"{host}: {text}\n{ending}"}


def last_words(text: str) -> str:
    """Return the last thing that ssh said: its reason, after its banners and warnings."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1].rpartition("via ssh: ")[2].rstrip(".") if lines else ""


def log_in(
    connection: t.Any,
    play_context: t.Any,
    user: str | None,
    command: str = "true",
    stdin: str | None = None,
    tries: int = 3,
) -> Attempt:
    """Log in anew and run a command.

    Args:
        connection: Ansible's connection to the server, whose options the new one has.
        play_context: the action plugin's.
        user: who logs in; None for whoever `connection` logs in as.
        command: what is run there. It has to end with 0.
        stdin: what it gets to read.
        tries: how often, one second apart, while the server is not listening.
    """
    options = dict(connection.get_options())
    options["ssh_args"] = f"{FRESH} {options.get('ssh_args') or ''}".strip()
    if user:
        options["remote_user"] = user
    attempt = Attempt(False, False, "it was not tried")
    for number in range(tries):
        if number:
            time.sleep(1)
        fresh = connection_loader.get("ansible.builtin.ssh", play_context, None)
        fresh.set_options(direct=options)
        try:
            code, out, err = fresh.exec_command(command, in_data=stdin.encode() if stdin else None, sudoable=False)
        except AnsibleConnectionFailure as error:
            attempt = Attempt(False, False, last_words(str(error)))
            if not any(words in attempt.reason for words in PASSING):
                break
        except AnsibleError as error:
            return Attempt(False, False, last_words(str(error)))
        else:
            said = last_words(err.decode(errors="replace")) or last_words(out.decode(errors="replace"))
            return Attempt(code == 0, True, said)
    return attempt
