"""What a hardened server has of its own kernel, and a reboot that is one."""

from __future__ import annotations

import pytest

from tests.harness import APP, wait_for
from tests.machine.conftest import Site
from tests.virtual_machine import VirtualMachine


@pytest.fixture
def machine(site: Site) -> VirtualMachine:
    return site.machine


def firewall(machine: VirtualMachine) -> str:
    """Return the rules that the kernel has, without what they have counted."""
    return machine.sh("nft --stateless list ruleset")


def wrong_kernel_settings(machine: VirtualMachine) -> list[str]:
    """Return the settings that the kernel has otherwise than their file says, or not at all."""
    said = machine.sh(
        "grep '^-' /etc/sysctl.d/zz-hardstand.conf | while IFS=' ' read -r name _ value; do"
        r' printf "%s\t%s\t%s\n" "${name#-}" "$value" "$(sysctl -n "${name#-}")"; done'
    )
    settings = [line.split("\t") for line in said.splitlines()]
    assert len(settings) > 30
    return [name for name, wanted, has in settings if wanted != has]


def test_the_kernel_has_all_settings(machine: VirtualMachine) -> None:
    assert wrong_kernel_settings(machine) == []


def test_modules_that_nobody_needs_cannot_be_loaded(machine: VirtualMachine) -> None:
    listed = machine.sh("sed -n 's/^blacklist //p' /etc/modprobe.d/hardstand.conf").split()
    there = [name for name in listed if machine.sh(f"modinfo -F filename {name} 2> /dev/null || true")]
    assert there, "this kernel has none of them, which proves nothing"
    for name in there:
        machine.sh(f"modprobe {name} 2> /dev/null && exit 1 || true")
    assert not set(machine.sh("lsmod | cut -d ' ' -f 1").split()) & {name.replace("-", "_") for name in there}
    # It is the file that keeps them out.
    machine.sh(f"modprobe --config /dev/null --dry-run {there[0]}")


def test_changes_of_accounts_and_rights_are_recorded(machine: VirtualMachine) -> None:
    rules = machine.sh("auditctl -l").splitlines()
    assert len(rules) >= len(machine.sh("grep '^-[wa]' /etc/audit/rules.d/hardstand.rules").splitlines())
    # As updates do; Debian's journald turns the records off then, unless it is told otherwise.
    machine.sh("systemctl restart systemd-journald")
    assert "enabled 1" in machine.sh("auditctl -s")
    try:
        machine.sh("touch /etc/sudoers.d/probe")

        def recorded() -> bool:
            return "/etc/sudoers.d/probe" in machine.sh(
                "ausearch --input-logs --key privileges --interpret 2> /dev/null || true"
            )

        wait_for(recorded, 30, "the kernel's record of a file in /etc/sudoers.d")
        # By whom, although root did it.
        assert "auid=ada" in machine.sh("ausearch --input-logs --key privileges --interpret")
    finally:
        machine.sh("rm -f /etc/sudoers.d/probe")


def test_programs_that_ran_are_recorded(machine: VirtualMachine) -> None:
    machine.sh(
        "cp /bin/true /usr/local/bin/hardstand-prob && /usr/local/bin/hardstand-prob; rm /usr/local/bin/hardstand-prob"
    )
    wait_for(lambda: "hardstand-prob" in machine.sh("lastcomm hardstand-prob || true"), 30, "the program's record")


def test_apparmor_is_on(machine: VirtualMachine) -> None:
    assert machine.sh("aa-enabled") == "Yes"
    assert "enforce" in machine.sh("cat /sys/kernel/security/apparmor/profiles")


def test_nothing_runs_from_shared_memory(site: Site, machine: VirtualMachine) -> None:
    machine.sh("cp /bin/true /dev/shm/probe; chmod +x /dev/shm/probe; /dev/shm/probe && exit 1; rm /dev/shm/probe")
    # Where gunicorn's workers say that they live, and where PostgreSQL would have its own.
    assert site.get("/health/ready")


def test_a_crash_leaves_no_core(machine: VirtualMachine) -> None:
    machine.sh("mkdir /tmp/probe && cd /tmp/probe && (ulimit -c unlimited; sh -c 'kill -SEGV $$') || true")
    assert machine.sh("ls -A /tmp/probe; rm -r /tmp/probe; ls -A /var/lib/systemd/coredump 2> /dev/null || true") == ""


def test_updates_reboot_a_machine_that_asks_for_it_and_everything_comes_back(site: Site) -> None:
    machine = site.machine
    # What is due otherwise, so that the reboot is for one reason.
    assert site.run("playbooks/patch.yml", patch_reboot="never").wait(1800).code == 0
    before, rules, release = machine.boot_id(), firewall(machine), site.get("/api/info")
    assert release
    machine.sh("touch /run/reboot-required")
    done = site.run("playbooks/patch.yml").wait(1800)
    assert done.code == 0, done.output
    assert machine.boot_id() != before
    # By the time that the playbook ends, not some time after it.
    assert site.get("/api/info") == release
    assert machine.sh(f"ls /run/lock/hardstand-{APP}.lock 2> /dev/null || true") == ""
    assert firewall(machine) == rules
    assert wrong_kernel_settings(machine) == []
    assert "enabled 1" in machine.sh("auditctl -s")
    assert "noexec" in machine.sh("findmnt --noheadings --output OPTIONS /dev/shm")
    assert machine.sh("systemctl list-units --failed --no-legend") == ""
    # A new boot is nothing that a deploy would change, nor a reason for another one.
    assert site.run("deploy.yml").wait(1800).changed == 0
    again = site.run("playbooks/patch.yml").wait(1800)
    assert (again.code, again.changed) == (0, 0), again.output
