#!/usr/bin/python
"""Ansible module: which members of a load balancer's pool get requests, without a reload of nginx."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import diff_of, write_file

DOCUMENTATION = r"""
---
module: load_balancer_pool
short_description: Say which members of a pool get requests, and wait until those of the others have ended
description:
  - A reload of nginx resets idle keep-alive connections of clients, so a member is not taken out by one. Instead, the
    kernel of the load balancer refuses B(new) connections to a drained member. nginx sees "connection refused" at once
    and asks the next member, for a POST as well, because nothing has been sent yet. Connections that are there live on
    until nginx closes them, between two requests.
  - What is refused are opening packets (SYN). Connection tracking is not needed, and would take an established
    connection that it first sees in the middle for a new one.
  - The rules are in an nftables table of the pool's own. Other tables are never touched.
  - The state is I(directory)/I(pool).json, and I(directory)/I(pool).nft is what the kernel is told, at boot as well.
  - A member that is new starts drained, with the reason C(new).
options:
  pool:
    description: Name of the pool.
    type: str
    required: true
  state:
    description:
      - C(present) makes the pool consist of I(members).
      - C(drained) takes I(hosts) out, and waits until no connection to them is left.
      - C(serving) lets I(hosts) have requests again.
      - C(queried) only looks.
    type: str
    choices: [present, drained, serving, queried]
    default: present
  members:
    description:
      - Members of the pool, each with C(name), C(address) (IPv4 or IPv6) and C(port).
      - An empty address is one that is not known just now. The recorded one stays; a member without any is left out.
    type: list
    elements: dict
    default: []
  hosts:
    description: Names of members to drain or to let serve. Names that are no members are passed over and returned.
    type: list
    elements: str
    default: []
  reason:
    description: Why these members are drained. One that begins with C(operator) survives deploys.
    type: str
    default: ""
  by_operator:
    description: Whether C(serving) includes members that an operator has drained.
    type: bool
    default: false
  drain_last:
    description: Whether the last member that serves may be drained.
    type: bool
    default: false
  timeout:
    description: How long to wait for connections to end, in seconds. What is left then is returned, and is no failure.
    type: float
    default: 60
  directory:
    description: Directory of the state.
    type: path
    default: /etc/hardstand/pools
author: Hardstand
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Take app2 out
  load_balancer_pool:
    pool: blog
    state: drained
    hosts: [app2]
    reason: "operator: new disk"
"""

RETURN = r"""
servers:
  description: Address and port of every member, drained or not, as nginx writes them.
  type: list
  elements: str
  returned: success
members:
  description: Name of each member to its C(address), C(port), C(drained), C(reason) and C(since).
  type: dict
  returned: success
acted:
  description: Names of the members that were added, removed, drained or let serve.
  type: list
  elements: str
  returned: success
unknown:
  description: Names in I(hosts) that are no members, and members left out because they have no address.
  type: list
  elements: str
  returned: success
remaining:
  description: Name to number of connections that were still there when the time was up.
  type: dict
  returned: success
seconds:
  description: How long the connections took to end.
  type: float
  returned: success
at_boot:
  description: Whether the state is restored when nginx starts.
  type: bool
  returned: success
"""

NFT = "/usr/sbin/nft"
LOCKS = Path("/run/lock")
CONNECTIONS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
WANTS = Path("/etc/systemd/system/nginx.service.wants")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
POOL = re.compile(r"[a-z][a-z0-9-]*")
OPERATOR = "operator"
POLL_SECONDS = 0.1
CONNECT_SECONDS = 2.0
# nft limits a comment to 127 characters.
LONGEST_COMMENT = 120
# include/net/tcp_states.h: opening, established, and closed by the member while nginx may still be reading.
OPEN_STATES = {"01", "02", "08"}

Member = dict[str, Any]


class PoolError(Exception):
    """Something the operator has to put right; the text says what."""


def at(member: Member) -> str:
    """Return a member's address and port as nginx and people write them."""
    address = f"[{member['address']}]" if ":" in member["address"] else member["address"]
    return f"{address}:{member['port']}"


def note(name: str, member: Member) -> str:
    """Return the comment of a member's rule, which says all that the rule says."""
    return f"{at(member)} {name}"[:LONGEST_COMMENT]


def table_of(pool: str) -> str:
    """Return the name of the pool's nftables table; nft allows no hyphens there."""
    return f"hardstand_{pool.replace('-', '_')}"


def rules(pool: str, members: dict[str, Member]) -> str:
    """Return the input for nft that makes the pool's table hold a rule for each drained member.

    nft applies it as one transaction: there is no moment without the table, and no moment with half of it.
    """
    lines = [
        f"# Members of pool {pool} that get no new connections. Ansible managed: changes are lost.",
        f"table inet {table_of(pool)}",
        f"delete table inet {table_of(pool)}",
        f"table inet {table_of(pool)} {{",
        "    chain output {",
        "        type filter hook output priority filter; policy accept;",
    ]
    for name, member in members.items():
        if member["drained"]:
            family = "ip6" if ":" in member["address"] else "ip"
            lines.append(
                f"        {family} daddr {member['address']} tcp dport {member['port']}"
                " tcp flags & (fin | syn | rst | ack) == syn"
                f' reject with tcp reset comment "{note(name, member)}"'
            )
    return "\n".join([*lines, "    }", "}", ""])


def nft(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run nft. Raises PoolError when it is not installed."""
    try:
        return subprocess.run([NFT, *arguments], input=stdin, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise PoolError(f"{NFT} is missing: install the Debian package nftables.") from error


def in_kernel(pool: str) -> set[str] | None:
    """Return the comments of the rules that the kernel has for the pool; None when it has no table for it."""
    done = nft("-j", "list", "table", "inet", table_of(pool))
    if done.returncode != 0:
        return None
    found = json.loads(done.stdout)["nftables"]
    return {item["rule"].get("comment", "") for item in found if "rule" in item}


def load(text: str) -> None:
    """Tell the kernel. Raises PoolError, with nft's own words, when it refuses."""
    done = nft("-f", "-", stdin=text)
    if done.returncode != 0:
        raise PoolError(f"nft refuses the pool's rules: {done.stderr.strip()}\n{text}")


def remote(member: Member) -> str:
    """Return a member's address and port as /proc/net/tcp writes them: words in the byte order of the machine."""
    packed = ipaddress.ip_address(member["address"]).packed
    words = [packed[start : start + 4] for start in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, 'little'):08X}" for word in words) + f":{int(member['port']):04X}"


def connections(members: dict[str, Member]) -> dict[str, int]:
    """Return how many connections to each member are open; members without any are left out."""
    names = {remote(member): name for name, member in members.items()}
    found: dict[str, int] = {}
    for table in CONNECTIONS:
        if not table.exists():
            continue
        with table.open(encoding="ascii") as stream:
            next(stream, None)
            for line in stream:
                # proc(5): sl, local address, remote address, state
                fields = line.split(maxsplit=4)
                if fields[3] in OPEN_STATES and fields[2] in names:
                    found[names[fields[2]]] = found.get(names[fields[2]], 0) + 1
    return found


def answers(member: Member) -> bool:
    """Return whether the member accepts a connection."""
    try:
        socket.create_connection((member["address"], member["port"]), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class Pool:
    """A pool's state on this load balancer."""

    def __init__(self, parameters: dict[str, Any], *, check: bool) -> None:
        """Read the state; with `check`, nothing is ever written."""
        self.name: str = parameters["pool"]
        self.check = check
        self.directory = Path(parameters["directory"])
        self.state_file = self.directory / f"{self.name}.json"
        self.rules_file = self.directory / f"{self.name}.nft"
        if not POOL.fullmatch(self.name):
            raise PoolError(f"load_balancer_pool {self.name!r}: use lower-case letters, digits and hyphens.")
        self.before = self._read(self.state_file)
        self.members: dict[str, Member] = json.loads(json.dumps(self.before))
        self.unknown: list[str] = []

    @staticmethod
    def _read(file: Path) -> dict[str, Member]:
        try:
            found: dict[str, Member] = json.loads(file.read_text(encoding="utf-8"))["members"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError) as error:
            raise PoolError(f"{file} is damaged ({error}). Remove it; the next deploy makes it anew.") from error
        return found

    def _mark(self, name: str, *, drained: bool, reason: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.members[name] |= {"drained": drained, "reason": reason, "since": now}

    def known(self, hosts: list[str]) -> list[str]:
        """Return those of `hosts` that are members, and remember the others."""
        self.unknown += [name for name in hosts if name not in self.members]
        return [name for name in hosts if name in self.members]

    def consist_of(self, wanted: list[dict[str, Any]]) -> None:
        """Make the pool consist of these members. New ones are drained; known ones stay as they are."""
        old, self.members = self.members, {}
        for item in wanted:
            name, address = str(item["name"]), str(item["address"] or "")
            if not NAME.fullmatch(name):
                raise PoolError(f"The server name {name!r} cannot be used: letters, digits, dots, hyphens.")
            if not address and name not in old:
                self.unknown.append(name)
                continue
            try:
                address = str(ipaddress.ip_address(address)) if address else old[name]["address"]
            except ValueError as error:
                raise PoolError(
                    f"{name}: {address!r} is no IP address. Correct its internal_address in the inventory's hosts.yml."
                ) from error
            place = {"address": address, "port": int(item["port"])}
            self.members[name] = old.get(name, {}) | place
            if name not in old:
                self._mark(name, drained=True, reason="new")
        self._refuse_shared_places()

    def _refuse_shared_places(self) -> None:
        """Refuse two members at one address and port: draining the one would drain the other."""
        taken: dict[str, str] = {}
        for file in sorted(self.directory.glob("*.json")):
            if file != self.state_file:
                taken |= {at(member): f"{name} of pool {file.stem}" for name, member in self._read(file).items()}
        for name, member in self.members.items():
            if at(member) in taken:
                raise PoolError(
                    f"{name} and {taken[at(member)]} are both at {at(member)}, and draining one would drain the other."
                    " Give each application a nginx_peer_port of its own, and each server its own internal_address."
                )
            taken[at(member)] = name

    def drain(self, hosts: list[str], reason: str, *, last: bool) -> None:
        """Take `hosts` out. Raises PoolError when nobody would be left to serve."""
        chosen = self.known(hosts)
        serving = [name for name in chosen if not self.members[name]["drained"]]
        others = {name: m for name, m in self.members.items() if name not in chosen and not m["drained"]}
        if serving and not last and not any(answers(member) for member in others.values()):
            what = f"{', '.join(others)} would have to serve, and does not answer" if others else "nobody else serves"
            raise PoolError(
                f"{', '.join(serving)} cannot be drained: {what}."
                f" Pool {self.name} on this load balancer: {self.summary()}."
            )
        for name in chosen:
            member = self.members[name]
            by_operator = member["reason"].startswith(OPERATOR)
            if not member["drained"] or (reason != member["reason"] and not by_operator):
                self._mark(name, drained=True, reason=reason)

    def restore(self, hosts: list[str], *, by_operator: bool) -> None:
        """Let `hosts` serve; those that an operator has drained only with `by_operator`."""
        for name in self.known(hosts):
            member = self.members[name]
            if member["drained"] and (by_operator or not member["reason"].startswith(OPERATOR)):
                self._mark(name, drained=False, reason="")

    def summary(self) -> str:
        """Return the state of every member in one line, for a message."""
        states = (
            f"{name} {'drained (' + member['reason'] + ')' if member['drained'] else 'serves'}"
            for name, member in self.members.items()
        )
        return ", ".join(states) or "empty"

    @staticmethod
    def _text(members: dict[str, Member]) -> str:
        return json.dumps({"members": members}, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def _has(file: Path, text: str) -> bool:
        return file.exists() and file.read_text(encoding="utf-8") == text

    def _kernel_agrees(self) -> bool:
        """Return whether the kernel refuses every drained member and none that serves."""
        if not Path(NFT).exists() and self.check:
            return False
        found = in_kernel(self.name)
        if found is None:
            return False
        drained = {note(name, member) for name, member in self.members.items() if member["drained"]}
        serving = {at(member) for member in self.members.values() if not member["drained"]}
        return drained <= found and not any(comment.split(" ")[0] in serving for comment in found)

    def save(self) -> bool:
        """Write the state and tell the kernel, where they differ. Return whether they did."""
        files = {self.state_file: self._text(self.members), self.rules_file: rules(self.name, self.members)}
        agrees = self._kernel_agrees()
        wrong = {file: text for file, text in files.items() if not self._has(file, text)}
        if self.check or (agrees and not wrong):
            return bool(wrong) or not agrees
        self.directory.mkdir(parents=True, exist_ok=True)
        for file, text in wrong.items():
            write_file(file, text, 0o644)
        if not agrees or self.rules_file in wrong:
            # Drained servers that have just left the pool stay refused until nginx has been told, and the next change.
            places = {at(member) for member in self.members.values()}
            gone = {n: m for n, m in self.before.items() if n not in self.members and at(m) not in places}
            load(rules(self.name, gone | self.members))
        return True

    def wait(self, hosts: list[str], timeout: float) -> dict[str, int]:
        """Wait until no connection to `hosts` is left. Return what is left when the time is up."""
        chosen = {name: self.members[name] for name in hosts if name in self.members}
        deadline = time.monotonic() + timeout
        while (left := connections(chosen)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return left

    def result(self) -> dict[str, Any]:
        """Return what the module returns about the pool."""
        names = [*self.members, *(name for name in self.before if name not in self.members)]
        return {
            "servers": [at(member) for member in self.members.values()],
            "members": self.members,
            "acted": [name for name in names if self.members.get(name) != self.before.get(name)],
            "unknown": self.unknown,
            "remaining": {},
            "seconds": 0.0,
            "at_boot": (WANTS / f"hardstand-pool@{self.name}.service").is_symlink(),
            "diff": diff_of(
                self.state_file, self._text(self.before) if self.before else None, self._text(self.members)
            ),
        }


@contextlib.contextmanager
def only_one(pool: str, *, check: bool) -> Iterator[None]:
    """Keep other runs of this module from the pool's state meanwhile."""
    if check:
        yield
        return
    with (LOCKS / f"hardstand-pool-{pool}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def converge(parameters: dict[str, Any], *, check: bool) -> dict[str, Any]:
    """Bring the pool to what `parameters` ask for and return the module's result; with `check`, change nothing.

    Raises PoolError when that cannot be, OSError when the disk refuses.
    """
    state, hosts = parameters["state"], parameters["hosts"]
    with only_one(parameters["pool"], check=check):
        pool = Pool(parameters, check=check)
        if state == "present":
            pool.consist_of(parameters["members"])
        elif state == "drained":
            pool.drain(hosts, parameters["reason"], last=parameters["drain_last"])
        elif state == "serving":
            pool.restore(hosts, by_operator=parameters["by_operator"])
        changed = state != "queried" and pool.save()
    result = pool.result() | {"changed": changed}
    if state == "drained" and not check:
        begun = time.monotonic()
        result["remaining"] = pool.wait(hosts, parameters["timeout"])
        result["seconds"] = round(time.monotonic() - begun, 1)
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "pool": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "drained", "serving", "queried"], "default": "present"},
            "members": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "address": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                },
            },
            "hosts": {"type": "list", "elements": "str", "default": []},
            "reason": {"type": "str", "default": ""},
            "by_operator": {"type": "bool", "default": False},
            "drain_last": {"type": "bool", "default": False},
            "timeout": {"type": "float", "default": 60},
            "directory": {"type": "path", "default": "/etc/hardstand/pools"},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        result = converge(module.params, check=module.check_mode)
    except (PoolError, OSError) as error:
        module.fail_json(msg=str(error))
    if not module._diff:
        result.pop("diff")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
