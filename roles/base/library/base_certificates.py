#!/usr/bin/python
"""Ansible module: make CA certificates the system's, and no others of ours."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: base_certificates
short_description: Make CA certificates the system's, and no others of ours
description:
  - Installs certificates below C(/usr/local/share/ca-certificates), one file each, and runs
    C(update-ca-certificates) when something changed. Files that this module installed earlier and that are no
    longer asked for are removed.
  - Where the package ca-certificates is not installed yet, the files wait for it. Its installation picks them up.
options:
  content:
    {description: PEM texts with one or more certificates each., type: list, elements: str, required: true}
"""

RETURN = r"""
added: {description: Names of the files that were added., type: list, returned: always}
removed: {description: Names of the files that were removed., type: list, returned: always}
"""

DIRECTORY = Path("/usr/local/share/ca-certificates")
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
# What update-ca-certificates makes of a file; a link that outlives its file is a certificate that is still trusted.
LINKS = Path("/etc/ssl/certs")
# Tells our files from the administrator's own.
PREFIX = "hardstand-"
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def certificates(texts: list[str]) -> dict[str, str]:
    """Return file name and PEM of each certificate in `texts`.

    The name carries the certificate's SHA-256, so that a replaced certificate is another file. update-ca-certificates
    takes one certificate for each file, hence the split.

    Raises:
        ValueError: a text holds no certificate, or one that cannot be decoded.
    """
    found: dict[str, str] = {}
    for number, text in enumerate(texts, start=1):
        blocks = CERTIFICATE.findall(text)
        if not blocks:
            raise ValueError(f"file {number} of base_extra_ca_files holds no PEM certificate")
        for block in blocks:
            der = ssl.PEM_cert_to_DER_cert(block)
            found[f"{PREFIX}{hashlib.sha256(der).hexdigest()[:16]}.crt"] = ssl.DER_cert_to_PEM_cert(der)
    return found


def bundle_is_stale(wanted: dict[str, str]) -> bool:
    """Return whether the system's bundle does not follow from the files: an earlier run was interrupted."""
    links = {path.stem for path in LINKS.glob(f"{PREFIX}*.pem")}
    return bool(links - {Path(name).stem for name in wanted}) or not (
        BUNDLE.is_file() and all(text in BUNDLE.read_text() for text in wanted.values())
    )


def main() -> None:
    """Add, remove, rebuild the bundle."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={"content": {"type": "list", "elements": "str", "required": True}},
        supports_check_mode=True,
    )
    try:
        wanted = certificates(module.params["content"])
    except ValueError as error:
        module.fail_json(msg=f"A CA certificate cannot be used: {error}")
    present = {path.name: path.read_text() for path in DIRECTORY.glob(f"{PREFIX}*.crt")}
    update = module.get_bin_path("update-ca-certificates", opt_dirs=["/usr/sbin"])
    added = sorted(name for name, text in wanted.items() if present.get(name) != text)
    removed = sorted(present.keys() - wanted.keys())
    stale = update is not None and bundle_is_stale(wanted)
    if not module.check_mode and (added or removed or stale):
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        for name in added:
            (DIRECTORY / name).write_text(wanted[name])
            (DIRECTORY / name).chmod(0o644)
        for name in removed:
            (DIRECTORY / name).unlink()
        if update:
            # --fresh also drops what a removed file left in /etc/ssl/certs.
            module.run_command([update, "--fresh"], check_rc=True)
    module.exit_json(
        changed=bool(added or removed or stale),
        added=added,
        removed=removed,
        diff={
            "before_header": str(DIRECTORY),
            "after_header": str(DIRECTORY),
            "before": "".join(f"{name}\n" for name in sorted(present)),
            "after": "".join(f"{name}\n" for name in sorted(wanted)),
        },
    )


if __name__ == "__main__":
    main()
