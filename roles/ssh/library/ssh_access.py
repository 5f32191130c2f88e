#!/usr/bin/python
"""Ansible module: who may log in by ssh, with a way back."""

from __future__ import annotations

import base64
import os
import pwd
import re
import shlex
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import diff_of, write_file
from ansible.module_utils.undo_timer import SYSTEMCTL, ChangeError, UndoTimer, run

DOCUMENTATION = r"""
module: ssh_access
short_description: Who may log in by ssh, with a way back
description:
  - Makes administrators' accounts, their keys, their sudo rules and sshd's drop-in what they should be, checks them
    with visudo and sshd, and has sshd take them up. Sessions that are open stay open.
  - What it changes it can take back. A timer on the server does so after I(undo_seconds) unless I(state=kept) comes
    first, so that nobody needs to reach the server for it.
  - The action plugin of the same name calls it for each step, and proves in between that one can log in.
options:
  state:
    description:
      - V(applied) changes what is different, and arms the timer. V(kept) disarms it. V(undone) takes everything back
        now.
    type: str
    choices: [applied, kept, undone]
    default: applied
  admins:
    description: Administrators, each with name and keys.
    type: list
    elements: dict
    default: []
  sshd_config:
    description: Content of sshd's drop-in. Algorithms that this server's OpenSSH does not know are left out.
    type: str
    default: ""
  sudoers:
    description: Content of sudo's drop-in.
    type: str
    default: ""
  undo_seconds:
    description: When the timer goes off.
    type: int
    default: 90
"""

RETURN = r"""
armed:
  {description: Whether changes wait to be kept or undone., type: bool, returned: always}
created:
  {description: Accounts that were made., type: list, returned: always}
"""

SSH = Path("/etc/ssh")
SUDOERS = Path("/etc/sudoers.d/hardstand")
UNDO = Path("/var/lib/hardstand/ssh/undo")
TIMER = UndoTimer("hardstand-ssh-undo", UNDO / "undo", "ssh_undo_seconds")
HEADER = "# Written by role ssh; changes here are lost.\n"

SSHD, SSH_KEYGEN, VISUDO, USERADD = "/usr/sbin/sshd", "/usr/bin/ssh-keygen", "/usr/sbin/visudo", "/usr/sbin/useradd"

# What `ssh -Q` calls the algorithms of each option.
QUERIES = {"KexAlgorithms": "kex", "Ciphers": "cipher", "MACs": "mac", "HostKeyAlgorithms": "HostKeyAlgorithms"}

# moduli(5) counts the bits of a prime without the first one.
SMALLEST_MODULUS = 3071
RSA_BITS = 4096


def check_sudoers() -> None:
    """Raise ChangeError when a file of sudo has an error.

    visudo also minds other permissions than 0440, which sudo does not.
    """
    done = run(VISUDO, "-c", check=False)
    said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    wrong = [line for line in said if not line.endswith("parsed OK") and "bad permissions" not in line]
    if done.returncode != 0 and wrong:
        raise ChangeError(f"sudo's files have an error: {'; '.join(wrong)}")


def known_algorithms(option: str) -> set[str]:
    """Return the algorithms that this server's OpenSSH knows."""
    return set(run("/usr/bin/ssh", "-Q", QUERIES[option]).stdout.split())


def supported(config: str) -> str:
    """Return a configuration without algorithms that this server's OpenSSH does not know: sshd would not start."""
    lines = []
    for line in config.splitlines(keepends=True):
        option, _, value = line.strip().partition(" ")
        if option in QUERIES:
            known = known_algorithms(option)
            line = f"{option} {','.join(name for name in value.strip().split(',') if name in known)}\n"
        lines.append(line)
    return "".join(lines)


def strong_moduli(text: str) -> str:
    """Return the lines of moduli(5) whose primes are long enough."""
    rows = (line for line in text.splitlines(keepends=True) if line.strip() and not line.startswith("#"))
    return "".join(line for line in rows if int(line.split()[4]) >= SMALLEST_MODULUS)


def rsa_bits(public_key: str) -> int:
    """Return the size of an RSA key, given the line of its .pub file."""
    blob = base64.b64decode(public_key.split()[1])
    numbers = []
    while blob:
        (length,) = struct.unpack(">I", blob[:4])
        numbers.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return int.from_bytes(numbers[2], "big").bit_length()


class Access:
    """What is there, what should be, and the way back."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.created: list[str] = []
        self.ours = SSH / "hardstand"
        self.config = SSH / "sshd_config.d" / "00-hardstand.conf"
        self.rsa, self.ed25519 = SSH / "ssh_host_rsa4096_key", SSH / "ssh_host_ed25519_key"

    def wanted(self) -> dict[Path, tuple[str, int]]:
        """Return every file of ours with its content and mode."""
        files: dict[Path, tuple[str, int]] = {}
        for admin in self.parameters["admins"]:
            keys = "".join(f"{key.strip()}\n" for key in admin["keys"])
            files[self.ours / "keys" / admin["name"]] = (HEADER + keys, 0o644)
        moduli = SSH / "moduli"
        if moduli.is_file():
            files[self.ours / "moduli"] = (strong_moduli(moduli.read_text()), 0o644)
        files[SUDOERS] = (self.parameters["sudoers"], 0o440)
        # Last: nobody is to find the door closed before there is a key to it.
        files[self.config] = (supported(self.parameters["sshd_config"]), 0o644)
        return files

    def differences(self) -> tuple[dict[Path, tuple[str, int]], list[Path], list[str], list[Path]]:
        """Return files to write, files to remove, accounts to make and host keys to make."""
        wanted = self.wanted()
        write = {path: want for path, want in wanted.items() if not self._is(path, *want)}
        keys = self.ours / "keys"
        remove = [path for path in sorted(keys.iterdir()) if path not in wanted] if keys.is_dir() else []
        accounts = [admin["name"] for admin in self.parameters["admins"] if not self._exists(admin["name"])]
        host_keys = [path for path in (self.ed25519, self.rsa) if not path.is_file()]
        return write, remove, accounts, host_keys

    def apply(self, check: bool) -> dict[str, Any]:
        """Change what is different, with a timer that takes it back."""
        self._refuse_what_is_broken_already(check)
        write, remove, accounts, host_keys = self.differences()
        changed = bool(write or remove or accounts or host_keys)
        result = {
            "changed": changed,
            "armed": False,
            "created": accounts,
            "diff": [
                diff_of(path, path.read_text() if path.is_file() else None, write[path][0] if path in write else None)
                for path in [*write, *remove]
            ],
        }
        # What an earlier run has left is neither kept nor undone, so it is proven now.
        if check or not (changed or UNDO.exists()):
            return result
        self._validate_sudoers(write)
        self._arm([*write, *remove, *host_keys, *(Path(f"{path}.pub") for path in host_keys)], accounts)
        try:
            for name in accounts:
                run(USERADD, "--create-home", "--user-group", "--shell", "/bin/bash", "--password", "*", name)
                self.created.append(name)
            for path in host_keys:
                self._make_host_key(path)
            for path, (content, mode) in write.items():
                self._write(path, content, mode)
            for path in remove:
                path.unlink()
            check_sudoers()
            run(SSHD, "-t")
            run(SYSTEMCTL, "try-reload-or-restart", "ssh.service")
        except (ChangeError, OSError) as error:
            TIMER.undo()
            raise ChangeError(str(error)) from error
        return {**result, "armed": True}

    @staticmethod
    def _exists(name: str) -> bool:
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            return False
        if account.pw_uid == 0 or account.pw_shell.endswith(("/nologin", "/false")):
            raise ChangeError(
                f'there is an account "{name}" already that is nobody\'s to log in to '
                f"(uid {account.pw_uid}, shell {account.pw_shell}). Give the administrator another name in ssh_admins."
            )
        return True

    @staticmethod
    def _is(path: Path, content: str, mode: int) -> bool:
        if not path.is_file() or path.is_symlink():
            return False
        state = path.stat()
        return (state.st_mode & 0o7777, state.st_uid) == (mode, 0) and path.read_text() == content

    @staticmethod
    def _write(path: Path, content: str, mode: int) -> None:
        for directory in [path.parent.parent, path.parent]:
            if not directory.is_dir():
                directory.mkdir(mode=0o755)
                directory.chmod(0o755)
        write_file(path, content, mode)

    def _refuse_what_is_broken_already(self, check: bool) -> None:
        """What is not ours and has an error would be blamed on us, or keep us out."""
        # A dry run may come before they are installed.
        if not check or Path(VISUDO).exists():
            check_sudoers()
        if not check or Path(SSHD).exists():
            run(SSHD, "-t")

    @staticmethod
    def _validate_sudoers(write: dict[Path, tuple[str, int]]) -> None:
        if SUDOERS not in write:
            return
        with tempfile.NamedTemporaryFile("w", suffix=".sudoers") as file:
            file.write(write[SUDOERS][0])
            file.flush()
            run(VISUDO, "-c", "-f", file.name)

    def _make_host_key(self, path: Path) -> None:
        """Make a host key. A server that has a long RSA key already stays the same server to who knows it by that."""
        if path == self.ed25519:
            run(SSH_KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", path)
            return
        present, public = SSH / "ssh_host_rsa_key", SSH / "ssh_host_rsa_key.pub"
        if present.is_file() and public.is_file() and rsa_bits(public.read_text()) == RSA_BITS:
            shutil.copy2(public, f"{path}.pub")
            shutil.copy2(present, path)
            return
        run(SSH_KEYGEN, "-q", "-t", "rsa", "-b", str(RSA_BITS), "-N", "", "-f", path)

    def _arm(self, paths: list[Path], accounts: list[str]) -> None:
        """Keep what is there now, and have the server go back to it by itself."""
        TIMER.disarm()
        # An earlier run's way back leads further back, to what was proven last: it stays, and ours comes on top.
        script = TIMER.script
        earlier = script.read_text().splitlines()[2:-2] if script.is_file() else []
        saved = UNDO / "saved"
        saved.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (UNDO, UNDO.parent):
            directory.chmod(0o700)
        lines = []
        known = "\n".join(earlier)
        for path in paths:
            target = shlex.quote(str(path))
            if f" {target}" in known:
                continue
            if path.is_file():
                copy = saved / str(path).strip("/").replace("/", "%")
                shutil.copy2(path, copy)
                lines.append(f"cp -a {shlex.quote(str(copy))} {target}")
            else:
                lines.append(f"rm -f {target}")
        lines += [f"userdel -r {shlex.quote(name)} 2>/dev/null" for name in accounts]
        text = "\n".join(
            [
                "#!/bin/sh",
                "# Made by role ssh: takes back what it changed and nobody has proven to work.",
                *earlier,
                *lines,
                f"{SYSTEMCTL} try-reload-or-restart ssh.service",
                f"rmdir {self.ours / 'keys'} {self.ours} 2>/dev/null; rm -rf {UNDO}",
            ]
        )
        script.write_text(f"{text}\n")
        TIMER.arm(int(self.parameters["undo_seconds"]))


def keep() -> None:
    """Let stand what was changed. Raises ChangeError when the server has taken it back already."""
    TIMER.stop()
    shutil.rmtree(UNDO)
    TIMER.disarm()


def main() -> None:
    """Do one step."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["applied", "kept", "undone"], "default": "applied"},
            "admins": {"type": "list", "elements": "dict", "default": []},
            "sshd_config": {"type": "str", "default": ""},
            "sudoers": {"type": "str", "default": ""},
            "undo_seconds": {"type": "int", "default": 90},
        },
        supports_check_mode=True,
    )
    state = module.params["state"]
    try:
        if state == "applied":
            module.exit_json(**Access(module.params).apply(module.check_mode))
        elif not module.check_mode:
            (keep if state == "kept" else TIMER.undo)()
        module.exit_json(changed=state == "undone", armed=False, created=[])
    except (ChangeError, OSError) as error:
        module.fail_json(msg=re.sub(r"\s*\n\s*", "; ", str(error)))


if __name__ == "__main__":
    main()
