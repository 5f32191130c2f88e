"""How tests log in: with one key, at one address, to a server whose own key is known."""

from __future__ import annotations

from pathlib import Path


def ssh_options(key: Path, known_hosts: Path, connect_seconds: int = 5) -> list[str]:
    """Return the arguments of ssh: this key and no other, to a host whose key is known, and nothing is asked."""
    options = {
        "UserKnownHostsFile": known_hosts,
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "ConnectTimeout": connect_seconds,
    }
    return [
        "-F",
        "none",
        "-i",
        str(key),
        *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
    ]


def ssh_command(login: str, command: str, key: Path, known_hosts: Path, connect_seconds: int = 5) -> list[str]:
    """Return what runs a command as `login` (user@address), on a connection of its own; exit code 255 is ssh's."""
    return ["ssh", *ssh_options(key, known_hosts, connect_seconds), login, command]
