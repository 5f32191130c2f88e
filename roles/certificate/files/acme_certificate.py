#!/usr/bin/python3
"""Get a certificate from an ACME authority, renew it, and put it where services read it.

Called as ``acme_certificate.py NAME due`` or ``acme_certificate.py NAME get``. Its settings are
/etc/hardstand/acme/<name>.json, and what became of it is in /var/lib/hardstand/certificates/<name>.json, which
playbooks/status.yml shows::

    {"names": ["blog.example.org"],          what the certificate is to cover
     "missing": [],                          what the one in place does not
     "directory_url": "https://…",           the authority
     "temporary": false,                     whether the one in place is not the authority's: nothing has come yet
     "starts": "…", "ends": "…",             of the one in place; null when there is none
     "checked": "…",                         the last attempt
     "succeeded": "…",                       the last one that went well, or null
     "failures": 0,                          attempts that have failed since
     "message": "",                          why the last one did
     "reload_due": false}                    whether services still have to be told of it

certbot decides when to renew, by the certificate's lifetime and by what the authority advises (ARI). Each NAME has a
directory of certbot's of its own, and so an account, a lock and a fate of its own. A certificate replaces one that is
in place only when it is valid and belongs to its key, both files at once; without one that does, the old one goes on
serving.

Times are UTC. The state file is replaced as a whole, so a reader never sees half of it.
"""

from __future__ import annotations

import argparse
import fcntl
import grp
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

SETTINGS = Path("/etc/hardstand/acme")
STATES = Path("/var/lib/hardstand/certificates")
CERTBOT = Path("/var/lib/hardstand/acme")
LOCKS = Path("/run/lock")

# Shares of a lifetime. certbot renews when a third is left (of lifetimes below ten days, a half).
DUE = 1 / 3
# With less than this, a name that cannot be proven must not keep the others from being renewed.
URGENT = 1 / 6

# Seconds that an attempt may take. certbot waits 90 s for each name, and an authority may be slow.
TIMEOUT = 900

State = dict[str, t.Any]


class AcmeError(Exception):
    """There is no new certificate; the text says why."""


def stamp(seconds: float) -> str:
    """Return a moment (seconds since the epoch) as the state file spells it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def openssl(*arguments: str, stdin: str) -> str:
    """Run openssl and return its output. Raises AcmeError with its own words when it fails."""
    done = subprocess.run(  # noqa: S603
        ["/usr/bin/openssl", *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        msg = f"openssl {arguments[0]} failed: {done.stderr.strip()}"
        raise AcmeError(msg)
    return done.stdout


class Certificate:
    """What is to know of the first certificate in a chain (PEM)."""

    def __init__(self, chain: str) -> None:
        """Read the chain. Raises AcmeError when openssl cannot."""
        said = openssl("x509", "-noout", "-dates", "-subject", "-issuer", "-ext", "subjectAltName", stdin=chain)
        fields = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        self.starts = float(ssl.cert_time_to_seconds(fields["notBefore"]))
        self.ends = float(ssl.cert_time_to_seconds(fields["notAfter"]))
        self.self_signed = fields["subject"] == fields["issuer"]
        self.names = sorted(name.lower() for name in re.findall(r"DNS:([^,\s]+)", said))

    def left(self) -> float:
        """Return the share of its lifetime that is left; 0 or less when it has ended."""
        return (self.ends - time.time()) / max(self.ends - self.starts, 1)


def read(path: Path) -> str:
    """Return the text of a file; nothing when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def replace_all(files: t.Sequence[tuple[Path, str, int, int]]) -> None:
    """Replace every (path, text, mode, group). All are written first, where a full disk shows, and then renamed."""
    staged: list[tuple[Path, Path]] = []
    try:
        for path, text, mode, group in files:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            staged.append((Path(name), path))
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
                if os.geteuid() == 0:
                    os.fchown(descriptor, 0, group)
                os.fchmod(descriptor, mode)
    except BaseException:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        raise
    for temporary, path in staged:
        temporary.replace(path)


def reason(output: str) -> str:
    """Return in one line why certbot failed, from what it said."""
    problems = re.findall(
        r"^\s*(?:Domain|Identifier):\s*(\S+).*\n\s*Type:\s*(\S+)\n\s*Detail:\s*(.+)$", output, re.MULTILINE
    )
    if problems:
        return "; ".join(f"{name}: {detail.strip()} ({kind})" for name, kind, detail in problems)
    lines = [line.strip() for line in output.splitlines()]
    skip = (
        "Ask for help",
        "Saving debug log",
        "See the logfile",
        "Some challenges have failed",
        "Renewing an existing",
        "Requesting a",
    )
    told = [line for line in lines if line and not line.startswith(skip)]
    # certbot's own sentence comes last.
    return told[-1] if told else "certbot said nothing"


class Acme:
    """One certificate on this server."""

    def __init__(self, name: str) -> None:
        """Read the settings of `name`. Raises AcmeError when there are none."""
        try:
            self.settings: dict[str, t.Any] = json.loads((SETTINGS / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            msg = f"{SETTINGS}/{name}.json is not there; deploy.yml writes it."
            raise AcmeError(msg) from None
        self.name = name
        self.names: list[str] = [wanted.lower() for wanted in self.settings["names"]]
        self.state_file = STATES / f"{name}.json"
        directory = Path(self.settings["directory"])
        self.certificate_file, self.key_file = directory / f"{name}.crt", directory / f"{name}.key"
        # Another authority knows nothing of this account, and its certificates are no reason to renew these or not.
        authority = hashlib.sha256(self.settings["directory_url"].encode()).hexdigest()[:8]
        self.home = CERTBOT / name / authority
        self.lineage = self.home / "live" / name

    def state(self) -> State:
        """Return what is written down; nothing of it where the file is missing or no JSON."""
        try:
            found = json.loads(self.state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def due(self) -> str:
        """Return why there should be a new certificate, or a look at it; empty when all is as it should be.

        Looks at this server alone: the authority is asked by the timer.
        """
        issued, placed = read(self.lineage / "fullchain.pem"), read(self.certificate_file)
        if not issued:
            return "the authority has not given one yet"
        if issued != placed or read(self.lineage / "privkey.pem") != read(self.key_file):
            return "it is not in place"
        certificate = Certificate(issued)
        if certificate.names != sorted(self.names):
            return "its names change"
        if certificate.left() < DUE:
            return "it ends soon"
        return "services have not been told of it" if self.state().get("reload_due") else ""

    def urgent(self) -> bool:
        """Return whether some of the names are better than none."""
        issued = read(self.lineage / "fullchain.pem")
        return not issued or Certificate(issued).left() < URGENT

    def obtain(self) -> None:
        """Have certbot issue or renew, if it finds that it is time to. Raises AcmeError when it fails."""
        try:
            self.certbot()
        except AcmeError as error:
            # An authority that was set up anew, as private ones and those for trials are, knows no account of before.
            if not re.search(r"accountDoesNotExist|account\b.* not found", str(error), re.IGNORECASE):
                raise
            shutil.rmtree(self.home / "accounts", ignore_errors=True)
            self.certbot()

    def certbot(self) -> None:
        """Run certbot. Raises AcmeError when it fails."""
        settings = self.settings
        command = [settings["certbot"], "certonly", "--non-interactive", "--agree-tos", "--keep-until-expiring"]
        command += ["--renew-with-new-domains", "--cert-name", self.name, "--domains", ",".join(self.names)]
        command += ["--webroot", "--webroot-path", settings["webroot"], "--server", settings["directory_url"]]
        command += [
            "--config-dir",
            str(self.home),
            "--work-dir",
            str(self.home / "work"),
            "--logs-dir",
            str(self.home / "logs"),
        ]
        command += ["--max-log-backups", "20", "--key-type", "ecdsa", "--elliptic-curve", "secp256r1"]
        command += ["--email", settings["email"]] if settings["email"] else ["--register-unsafely-without-email"]
        command += ["--preferred-profile", settings["profile"]] if settings["profile"] else []
        command += ["--allow-subset-of-names"] if len(self.names) > 1 and self.urgent() else []
        # Others may see a command line.
        options = "".join(
            f"{option} = {settings[name]}\n"
            for option, name in (("eab-kid", "eab_key_id"), ("eab-hmac-key", "eab_hmac_key"))
            if settings[name]
        )
        # Not among certbot's own, whose place an operator's other certbot shares.
        with tempfile.NamedTemporaryFile("w", suffix=".ini", encoding="utf-8") as file:
            file.write(options)
            file.flush()
            try:
                done = subprocess.run(  # noqa: S603
                    [*command, "--config", file.name],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=TIMEOUT,
                    stdin=subprocess.DEVNULL,
                    env={
                        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                        "LANG": "C.UTF-8",
                        "REQUESTS_CA_BUNDLE": settings["ca_file"],
                        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
                    },
                )
            except subprocess.TimeoutExpired:
                msg = f"certbot has not ended within {TIMEOUT} s"
                raise AcmeError(msg) from None
            except OSError as error:
                msg = f"certbot cannot be run: {error}"
                raise AcmeError(msg) from None
        if done.returncode != 0:
            raise AcmeError(reason(f"{done.stdout}\n{done.stderr}"))

    def put_in_place(self) -> bool:
        """Put what the authority gave where services read it; returns whether that changed anything.

        Raises:
            AcmeError: it is not fit to replace what is there.
        """
        chain, key = read(self.lineage / "fullchain.pem"), read(self.lineage / "privkey.pem")
        if not chain or not key:
            msg = f"certbot has left no certificate in {self.lineage}"
            raise AcmeError(msg)
        if chain == read(self.certificate_file) and key == read(self.key_file):
            return False
        certificate = Certificate(chain)
        if not certificate.starts - 60 <= time.time() < certificate.ends:
            lifetime = f"from {stamp(certificate.starts)} to {stamp(certificate.ends)}"
            msg = f"what the authority gave is valid {lifetime}, and not now"
            raise AcmeError(msg)
        if openssl("x509", "-noout", "-pubkey", stdin=chain) != openssl("pkey", "-pubout", stdin=key):
            msg = "what the authority gave does not belong to the key"
            raise AcmeError(msg)
        group = grp.getgrnam(self.settings["group"]).gr_gid
        replace_all([(self.key_file, key, 0o640, group), (self.certificate_file, chain, 0o644, 0)])
        return True

    def reload(self) -> None:
        """Have services read the pair again. Raises AcmeError when they do not."""
        if command := self.settings["reload"]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode != 0:
                msg = f"{command[0]} failed: {(done.stderr or done.stdout).strip()}"
                raise AcmeError(msg)

    def get(self) -> State:
        """Do what is due, write down what became of it, and return that and whether anything `changed`."""
        before = self.state()
        message, changed, reload_due = "", False, bool(before.get("reload_due"))
        # An attempt that failed may have left one that an earlier one could not put in place.
        for step in (self.obtain, self.put_in_place):
            try:
                changed = bool(step()) or changed
            except (AcmeError, OSError) as error:
                message = message or " ".join(str(error).split())
        if changed or reload_due:
            reload_due = True
            # Written down first: a machine that stops now tells its services the next time.
            self.write({**before, "reload_due": True})
            try:
                self.reload()
                reload_due = False
            except (AcmeError, OSError) as error:
                message = message or " ".join(str(error).split())
        state = self.found() | {
            "checked": stamp(time.time()),
            "succeeded": before.get("succeeded") if message else stamp(time.time()),
            "failures": int(before.get("failures") or 0) + 1 if message else 0,
            "message": message[:1000],
            "reload_due": reload_due,
        }
        if state["missing"] and not state["temporary"] and not message:
            state["message"] = f"the authority could not prove {', '.join(state['missing'])}"
            state["failures"] = int(before.get("failures") or 0) + 1
        self.write(state)
        self.prune()
        return {**state, "changed": changed}

    def found(self) -> State:
        """Return what there is to say of the pair in place."""
        state: State = {"names": self.names, "missing": self.names, "directory_url": self.settings["directory_url"]}
        placed = read(self.certificate_file)
        state |= {"temporary": placed != read(self.lineage / "fullchain.pem"), "starts": None, "ends": None}
        try:
            certificate = Certificate(placed)
        except AcmeError:
            return {**state, "temporary": True}
        missing = [name for name in self.names if name not in certificate.names]
        return {**state, "missing": missing, "starts": stamp(certificate.starts), "ends": stamp(certificate.ends)}

    def write(self, state: State) -> None:
        """Replace the state file."""
        replace_all([(self.state_file, json.dumps(state, indent=2) + "\n", 0o644, 0)])

    def prune(self) -> None:
        """Remove what belongs to authorities that are no longer asked, once this one has given a certificate."""
        if not (self.lineage / "fullchain.pem").exists():
            return
        for other in self.home.parent.iterdir():
            if other != self.home and other.is_dir():
                shutil.rmtree(other)


def main() -> int:
    """Run a command; returns the exit code: 1 when what it is to do has failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="name of the certificate")
    parser.add_argument("command", choices=["due", "get"])
    arguments = parser.parse_args()
    os.umask(0o022)
    try:
        acme = Acme(arguments.name)
        if arguments.command == "due":
            print(acme.due())
            return 0
        acme.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (LOCKS / f"hardstand-acme-{arguments.name}.lock").open("w") as lock:
            # A deploy and the timer at the same time: the second finds what the first has done.
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = acme.get()
    except (AcmeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(state))
    return 1 if state["message"] else 0


if __name__ == "__main__":
    sys.exit(main())
