#!/usr/bin/python
"""Ansible module: one key and its certificate chain on a server, in one round trip."""

from __future__ import annotations

import base64
import grp
import os
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import NewFile, diff_of, replace_files, write_file

DOCUMENTATION = r"""
---
module: certificate_pair
short_description: Keep a private key and its certificate chain on a server
description:
  - Makes the private key where there is none, and never lets it leave the server.
  - Writes a certificate chain, and a key when one is given, only after the two have been shown to belong together.
    Both are replaced within microseconds, so that a service that starts meanwhile does not find two that do not match.
  - Returns what is there and a signing request, from which the control node decides whether a new certificate is due.
  - Needs nothing but the C(openssl) command, which comes with Debian's ca-certificates.
options:
  directory:
    description: Directory of the pair. Made (0755) when it is missing; its parent must exist.
    type: path
    required: true
  name:
    description: The pair is I(directory)/I(name).crt (0644) and I(directory)/I(name).key (0640).
    type: str
    required: true
  subject_alt_names:
    description: Names for the signing request, such as C(DNS:example.org) or C(IP:192.0.2.1). Empty for none.
    type: list
    elements: str
    default: []
  crl_url:
    description: Where clients find which certificates of the authority no longer count, for the signing request.
    type: str
    default: ""
  crl:
    description:
      - That list (PEM), to put at I(directory)/I(name).crl (0644), in the form (DER) that clients expect.
      - Empty for none.
    type: str
    default: ""
  client:
    description: Whether the signing request is for a certificate that its owner can also be a client with.
    type: bool
    default: false
  group:
    description: Group that may read the key. It must exist; in check mode it need not yet.
    type: str
    default: root
  temporary:
    description:
      - Whether to sign a certificate for I(subject_alt_names) with the key itself where there is none, so that a
        service can start before an authority has given one.
    type: bool
    default: false
  not_renewed_by:
    description:
      - Name of a systemd timer that renewed the pair while it was another authority's; stopped and removed with its
        service, so that it does not replace what is put in place here.
    type: str
  certificate:
    description: Certificate chain (PEM, the server's own first) to put in place. Without it the present one stays.
    type: str
  private_key:
    description: Private key (PEM, no passphrase). Without it the present one stays, or a P-256 one is made.
    type: str
author: Hardstand
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    description: Shows the certificate's subject, names, issuer and dates. Never the key.
"""

EXAMPLES = r"""
- name: Make the key where there is none and ask for a certificate
  certificate_pair:
    directory: /etc/ssl/hardstand
    name: blog
    subject_alt_names: ["DNS:blog.example.org"]
  register: pair
"""

RETURN = r"""
certificate:
  description: The chain on the server before this task (PEM). Empty when there is none.
  type: str
  returned: always
public_key:
  description: The public half of the key (PEM). Empty in check mode when there is no key yet.
  type: str
  returned: always
csr:
  description: Signing request (PEM). Empty without I(subject_alt_names), or in check mode when there is no key yet.
  type: str
  returned: always
"""

KEY_MODE = 0o640
CERTIFICATE_MODE = 0o644
DIRECTORY_MODE = 0o755
UNITS = Path("/etc/systemd/system")


class PairError(Exception):
    """Something the operator has to put right; the text says what."""


def openssl(*arguments: str, stdin: str = "") -> str:
    """Run C(openssl) and return its output. A key only ever travels through pipes, never through the arguments.

    Raises PairError with openssl's own words when it fails or is not installed.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["openssl", *arguments],  # noqa: S607
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise PairError("The command openssl is missing on this server: install the Debian package openssl.") from error
    if done.returncode != 0:
        raise PairError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def public_key_of_key(key: str) -> str:
    """Return the public half (PEM) of the private key `key` (PEM). Given a passphrase, openssl does not ask for one."""
    return openssl("pkey", "-pubout", "-passin", "pass:", stdin=key)


def public_key_of_certificate(certificate: str) -> str:
    """Return the public key (PEM) of the first certificate in the chain `certificate` (PEM)."""
    return openssl("x509", "-noout", "-pubkey", stdin=certificate)


def describe(certificate: str) -> str:
    """Return what a reader of a diff wants to know of a chain's first certificate; empty for an empty chain."""
    if not certificate:
        return ""
    return openssl("x509", "-noout", "-subject", "-issuer", "-dates", "-ext", "subjectAltName", stdin=certificate)


def new_key() -> str:
    """Return a fresh P-256 private key (PEM): cheaper to sign with than RSA, and accepted by every client in use."""
    return openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def signing_request(key_file: Path, subject_alt_names: list[str], *, client: bool, crl_url: str = "") -> str:
    """Return a signing request (PEM) for `subject_alt_names`, signed with the key in `key_file`.

    The first name becomes the common name, for people; clients look at the alternative names alone.
    X.520 limits a common name to 64 characters, so a longer one is cut.
    """
    common_name = subject_alt_names[0].partition(":")[2][:64]
    configuration = "\n".join(
        [
            "[req]",
            "prompt = no",
            "distinguished_name = subject",
            "req_extensions = extensions",
            "[subject]",
            f"CN = {common_name}",
            "[extensions]",
            "basicConstraints = critical,CA:FALSE",
            "keyUsage = critical,digitalSignature",
            f"extendedKeyUsage = serverAuth{',clientAuth' if client else ''}",
            f"subjectAltName = {','.join(subject_alt_names)}",
            f"crlDistributionPoints = URI:{crl_url}" if crl_url else "",
            "",
        ]
    )
    return openssl("req", "-new", "-key", str(key_file), "-config", "/dev/stdin", stdin=configuration)


def self_signed(request: str, key_file: Path) -> str:
    """Return a certificate (PEM) that says what `request` does and is signed with the key in `key_file`, for a week."""
    return openssl(
        "x509", "-req", "-days", "7", "-copy_extensions", "copyall", "-signkey", str(key_file), stdin=request
    )


def read(path: Path) -> str:
    """Return the text of `path`, or nothing when it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def read_bytes(path: Path) -> bytes:
    """Return the content of `path`, or nothing when it does not exist."""
    return path.read_bytes() if path.exists() else b""


def der_of_crl(text: str) -> bytes:
    """Return a list of revoked certificates (PEM) in the binary form that RFC 5280 has it served in.

    Raises PairError when it is none.
    """
    body = text.partition("-----BEGIN X509 CRL-----")[2].partition("-----END X509 CRL-----")[0]
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise PairError(f"The list of revoked certificates is not PEM: {error}") from None


def stop_renewal(unit: str, *, check: bool) -> bool:
    """Stop and remove the timer `unit` and its service. Return whether there was one."""
    files = [path for kind in ("timer", "service") if (path := UNITS / f"{unit}.{kind}").exists()]
    if files and not check:
        subprocess.run(["systemctl", "disable", "--now", f"{unit}.timer"], check=False, capture_output=True)  # noqa: S603, S607
        for path in files:
            path.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=False, capture_output=True)  # noqa: S607
    return bool(files)


def group_number(name: str, *, check: bool) -> int:
    """Return the number of a group; root's where a dry run does not find it, because what makes it has not run."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        if check:
            return 0
        raise PairError(f"There is no group {name} on this server, which is to read the key.") from None


def fix_mode(path: Path, mode: int, group: int = 0, *, check: bool) -> bool:
    """Give `path` its mode, and its owners, where we are root: root and `group`. Return whether anything changed."""
    status = path.stat()
    owned = os.geteuid() != 0 or (status.st_uid, status.st_gid) == (0, group)
    if status.st_mode & 0o7777 == mode and owned:
        return False
    if not check:
        path.chmod(mode)
        if not owned:
            os.chown(path, 0, group)
    return True


def converge(parameters: dict[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """Bring the pair to what `parameters` ask for and return the module's result.

    With `check` nothing is written. Raises PairError when key and certificate do not belong together or openssl fails.
    """
    directory = Path(parameters["directory"])
    key_file = directory / f"{parameters['name']}.key"
    certificate_file = directory / f"{parameters['name']}.crt"
    key, certificate = read(key_file), read(certificate_file)

    new: list[NewFile] = []
    if parameters["private_key"] and parameters["private_key"].strip() != key.strip():
        key = parameters["private_key"].strip() + "\n"
        new.append(NewFile(key_file, key, KEY_MODE))
    elif not key and not check:
        key = new_key()
        new.append(NewFile(key_file, key, KEY_MODE))
    changed = bool(new) or not key
    if parameters["not_renewed_by"]:
        changed |= stop_renewal(parameters["not_renewed_by"], check=check)

    wanted = (parameters["certificate"] or "").strip()
    replaces_certificate = bool(wanted) and wanted != certificate.strip()
    public_key = public_key_of_key(key) if key else ""
    if replaces_certificate:
        if public_key and public_key_of_certificate(wanted) != public_key:
            raise PairError(f"The certificate for {certificate_file} does not belong to the key; nothing was changed.")
        new.append(NewFile(certificate_file, wanted + "\n", CERTIFICATE_MODE))

    crl_file = directory / f"{parameters['name']}.crl"
    replaces_crl = bool(parameters["crl"]) and der_of_crl(parameters["crl"]) != read_bytes(crl_file)

    if not directory.is_dir():
        changed = True
        if not check:
            directory.mkdir(DIRECTORY_MODE)
    if directory.is_dir():
        changed |= fix_mode(directory, DIRECTORY_MODE, check=check)
    if not check:
        replace_files(new)
        if replaces_crl:
            write_file(crl_file, der_of_crl(parameters["crl"]), CERTIFICATE_MODE)
    group = group_number(parameters["group"], check=check)
    for path, mode, owner in ((key_file, KEY_MODE, group), (certificate_file, CERTIFICATE_MODE, 0)):
        if path.exists():
            changed |= fix_mode(path, mode, owner, check=check)

    result: dict[str, Any] = {
        "changed": changed or bool(new) or replaces_crl,
        "certificate": certificate,
        "public_key": public_key,
        "csr": "",
    }
    if parameters["subject_alt_names"] and key_file.exists():
        result["csr"] = signing_request(
            key_file, parameters["subject_alt_names"], client=parameters["client"], crl_url=parameters["crl_url"]
        )
    if parameters["temporary"] and not certificate and not wanted:
        result["changed"] = True
        if not check:
            write_file(certificate_file, self_signed(result["csr"], key_file), CERTIFICATE_MODE)
    if diff and replaces_certificate:
        result["diff"] = diff_of(certificate_file, describe(certificate), describe(wanted))
    return result


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "subject_alt_names": {"type": "list", "elements": "str", "default": []},
            "client": {"type": "bool", "default": False},
            "crl_url": {"type": "str", "default": ""},
            "crl": {"type": "str", "default": ""},
            "group": {"type": "str", "default": "root"},
            "temporary": {"type": "bool", "default": False},
            "not_renewed_by": {"type": "str"},
            "certificate": {"type": "str"},
            "private_key": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, check=module.check_mode, diff=module._diff)
    except (PairError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
