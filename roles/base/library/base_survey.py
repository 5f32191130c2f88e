#!/usr/bin/python
"""Ansible module: see in one round trip what a server lacks of role base."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: base_survey
short_description: See what a server lacks of role base
description:
  - Reads the state of packages, clock, accounts and directories, and changes nothing. The role's tasks then do what is
    missing, so that a server that lacks nothing costs one round trip.
options:
  packages:
    {description: Packages that should be installed., type: list, elements: str, required: true}
  time_package:
    {description: Package to install where nothing keeps the clock. Empty for none., type: str, default: ""}
  timezone:
    {description: Time zone that should be set; a path below C(/usr/share/zoneinfo)., type: str, required: true}
  accounts:
    {description: Service accounts that should exist., type: list, elements: str, default: []}
"""

RETURN = r"""
missing_packages:
  {description: What apt has to install., type: list, returned: always}
timezone:
  {description: Time zone now. Empty where /etc/localtime is no link to one., type: str, returned: always}
timezone_file:
  {description: What /etc/timezone says. Empty where there is none., type: str, returned: always}
timezone_exists:
  {description: Whether O(timezone) is one. True as well while tzdata is missing., type: bool, returned: always}
missing_accounts:
  {description: Which of O(accounts) to make., type: list, returned: always}
foreign_accounts:
  {description: A sentence for each of O(accounts) that exists and is not a service's., type: list, returned: always}
journald_directory:
  {description: Whether the directory for journald's drop-ins exists., type: bool, returned: always}
"""

ZONEINFO = Path("/usr/share/zoneinfo")
NO_SHELLS = ("/usr/sbin/nologin", "/sbin/nologin", "/bin/false", "/usr/bin/false")
# adduser.conf and login.defs agree on it: people's accounts begin at 1000.
FIRST_PERSON_UID = 1000


def installed_packages(module: AnsibleModule) -> dict[str, list[str]]:
    """Return every installed package's name with the virtual packages it provides."""
    _, listing, _ = module.run_command(
        ["/usr/bin/dpkg-query", "--show", "--showformat", r"${db:Status-Status}\t${Package}\t${Provides}\n"],
        check_rc=True,
    )
    rows = (line.split("\t") for line in listing.splitlines())
    return {
        package: [name.split()[0] for name in provides.split(",") if name.strip()]
        for status, package, provides in rows
        if status == "installed"
    }


def in_container(module: AnsibleModule) -> bool:
    """Return whether this is a container, which has its host's clock."""
    code, _, _ = module.run_command(["/usr/bin/systemd-detect-virt", "--container", "--quiet"])
    return bool(code == 0)


def missing_packages(module: AnsibleModule, wanted: list[str], time_package: str) -> list[str]:
    """Return the packages of `wanted` that are not installed, and `time_package` where nothing keeps the clock."""
    installed = installed_packages(module)
    missing = [package for package in wanted if package not in installed]
    keeps_time = any("time-daemon" in provides for provides in installed.values())
    if time_package and time_package not in installed and not keeps_time and not in_container(module):
        missing.append(time_package)
    return missing


def current_timezone() -> str:
    """Return the time zone that /etc/localtime links to, empty where it does not link to one."""
    link = Path("/etc/localtime")
    if not link.is_symlink():
        return ""
    target = Path("/etc", link.readlink())
    return str(target.relative_to(ZONEINFO)) if target.is_relative_to(ZONEINFO) else ""


def foreign(account: pwd.struct_passwd) -> str:
    """Return in a sentence why an account is not one that this role made, empty where it may be."""
    if account.pw_uid >= FIRST_PERSON_UID or account.pw_uid == 0:
        return f"{account.pw_name} is an account already, and not a system account (uid {account.pw_uid})"
    if account.pw_shell not in NO_SHELLS:
        return f"{account.pw_name} is an account already, and has a shell ({account.pw_shell})"
    if account.pw_dir != "/nonexistent":
        return f"{account.pw_name} is an account already, and another service's (home {account.pw_dir})"
    return ""


def survey_accounts(names: list[str]) -> tuple[list[str], list[str]]:
    """Return which accounts are missing, and why others are not ours."""
    missing: list[str] = []
    reasons: list[str] = []
    for name in names:
        try:
            reasons.append(foreign(pwd.getpwnam(name)))
        except KeyError:
            missing.append(name)
    return missing, [reason for reason in reasons if reason]


def main() -> None:
    """Answer with what is missing."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "required": True},
            "time_package": {"type": "str", "default": ""},
            "timezone": {"type": "str", "required": True},
            "accounts": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    p = module.params
    zone = Path("/etc/timezone")
    missing_accounts, foreign_accounts = survey_accounts(p["accounts"])
    module.exit_json(
        changed=False,
        missing_packages=missing_packages(module, p["packages"], p["time_package"]),
        timezone=current_timezone(),
        timezone_file=zone.read_text().strip() if zone.is_file() else "",
        timezone_exists=not ZONEINFO.is_dir() or (ZONEINFO / p["timezone"]).is_file(),
        missing_accounts=missing_accounts,
        foreign_accounts=foreign_accounts,
        journald_directory=Path("/etc/systemd/journald.conf.d").is_dir(),
    )


if __name__ == "__main__":
    main()
