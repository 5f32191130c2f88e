"""The role hardening: its module on files of our own, its templates and what its settings refuse."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.role_templates import ROLES, evaluate, load_file, read_yaml

SERVER: dict[str, Any] = {
    "hardening_enabled": True,
    "ansible_managed": "managed",
    "__hardening_place": {"container": False},
}
CONTAINER = SERVER | {"__hardening_place": {"container": True}}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loaded = load_file(ROLES / "hardening/library/hardening_system.py")
    monkeypatch.setattr(loaded, "LOGIN_DEFS", tmp_path / "login.defs")
    monkeypatch.setattr(loaded, "PROC_SYS", tmp_path / "sys")
    monkeypatch.setattr(loaded, "is_container", lambda: False)
    return loaded


def converge(module: ModuleType, *, check: bool = False, **parameters: Any) -> dict[str, Any]:
    asked = {"files": [], "absent": [], "login_defs": {}, "sysctl": {}, "units": []} | parameters
    result: dict[str, Any] = module.converge(asked, check=check, diff=True)
    return result


def kernel(tmp_path: Path, **settings: str) -> None:
    for name, value in settings.items():
        path = tmp_path / "sys" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def test_files_are_written_once_and_removed(module: ModuleType, tmp_path: Path) -> None:
    file, old = tmp_path / "a/new", tmp_path / "old"
    old.touch()
    wanted: dict[str, Any] = {"files": [{"path": str(file), "content": "x\n", "mode": "0600"}], "absent": [str(old)]}
    planned = converge(module, check=True, **wanted)
    assert planned["paths"] == [str(file), str(old)]
    assert not file.exists()
    assert old.exists()
    assert converge(module, **wanted)["changed"]
    assert (file.read_text(), file.stat().st_mode & 0o777, old.exists()) == ("x\n", 0o600, False)
    assert not converge(module, **wanted)["changed"]
    file.chmod(0o644)
    assert converge(module, **wanted)["paths"] == [str(file)]


def test_a_file_that_its_check_refuses_changes_nothing(module: ModuleType, tmp_path: Path) -> None:
    """A sudo file with an error would keep everybody from using sudo."""
    good, bad = tmp_path / "good", tmp_path / "sudoers"
    bad.write_text("fine\n")
    files = [
        {"path": str(good), "content": "x"},
        {"path": str(bad), "content": "broken\n", "check": ["/bin/grep", "-q", "fine"]},
    ]
    with pytest.raises(module.RefusedError, match="sudoers is not valid"):
        converge(module, files=files)
    assert bad.read_text() == "fine\n"
    assert not good.exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# UMASK is\nUMASK\t\t022\nX 1\n", "# UMASK is\nUMASK\t027\nX 1\n"),
        ("# UMASK is\nX 1\n", "# UMASK is\nX 1\nUMASK\t027\n"),
        ("UMASK 022\nX 1\nUMASK 077\n", "UMASK\t027\nX 1\n"),
        ("UMASK   027\n", "UMASK   027\n"),
        ("UMASK_OTHER 1\n", "UMASK_OTHER 1\nUMASK\t027\n"),
    ],
)
def test_login_defs_keeps_all_else(module: ModuleType, before: str, after: str) -> None:
    assert module.with_values(before, {"UMASK": "027"}) == after
    assert module.with_values(after, {"UMASK": "027"}) == after


def test_kernel_settings_are_set_once(module: ModuleType, tmp_path: Path) -> None:
    kernel(tmp_path, kernel__kptr_restrict="0", net__ipv4__ip_local_port_range="1\t2")
    wanted = {"kernel.kptr_restrict": 2, "net.ipv4.ip_local_port_range": "1 2", "kernel.not_there": 1}
    assert converge(module, check=True, sysctl=wanted)["sysctl"] == ["kernel.kptr_restrict"]
    assert (tmp_path / "sys/kernel/kptr_restrict").read_text() == "0\n"
    first = converge(module, sysctl=wanted)
    assert (first["sysctl"], first["refused"]) == (["kernel.kptr_restrict"], ["kernel.not_there"])
    again = converge(module, sysctl=wanted)
    assert not again["changed"]
    assert again["refused"] == ["kernel.not_there"]


def test_a_container_leaves_its_hosts_kernel_alone(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_container", lambda: True)
    kernel(tmp_path, kernel__kptr_restrict="0", net__core__x="0")
    result = converge(module, sysctl={"kernel.kptr_restrict": 2, "net.core.x": 1})
    assert (result["sysctl"], result["refused"]) == (["net.core.x"], ["kernel.kptr_restrict"])
    assert (tmp_path / "sys/kernel/kptr_restrict").read_text() == "0\n"


def rendered(name: str, **variables: Any) -> str:
    """Return a file of the role's, by its path."""
    known = SERVER | variables
    template = evaluate("hardening", f"_hardening_all_files['{name}']", **known)
    text: str = evaluate("hardening", f"lookup('ansible.builtin.template', '{template}')", **known)
    return text


def test_what_a_container_cannot_run_is_not_installed_there() -> None:
    real = set(evaluate("hardening", "_hardening_packages", **SERVER))
    assert real - set(evaluate("hardening", "_hardening_packages", **CONTAINER)) == {"apparmor", "auditd", "acct"}
    units = evaluate("hardening", "_hardening_units", **CONTAINER)
    assert units == ["hardstand-integrity.timer", "apt-daily.timer", "apt-daily-upgrade.timer"]
    assert "/etc/audit/rules.d/hardstand.rules" not in evaluate("hardening", "_hardening_files", **CONTAINER)
    assert "/etc/audit/rules.d/hardstand.rules" in evaluate("hardening", "_hardening_files", **SERVER)


def test_every_file_is_written_or_removed_and_every_template_used() -> None:
    off = {f"hardening_{name}": False for name in ("updates", "audit", "integrity", "accounting")}
    known = SERVER | off | {"hardening_sudo_log": ""}
    every = set(evaluate("hardening", "_hardening_all_files", **known))
    unwanted = set(evaluate("hardening", "_hardening_unwanted", **known))
    assert unwanted < every
    assert set(evaluate("hardening", "_hardening_files", **known)) == every - unwanted
    used = set(evaluate("hardening", "_hardening_all_files", **SERVER).values())
    assert used == {path.name for path in (ROLES / "hardening/templates").iterdir()}


def test_ones_own_rules_for_auditd_have_the_last_word() -> None:
    """augenrules keeps the last -e of all."""
    rules = rendered("/etc/audit/rules.d/hardstand.rules", hardening_audit_rules=["-e 2"]).splitlines()
    assert [rule for rule in rules if rule.startswith("-e ")] == ["-e 1", "-e 2"]


def test_no_file_is_one_of_role_base_as_well() -> None:
    """Each role would take away what the other has written, in every deploy."""
    text = (ROLES / "base/tasks/journal.yml").read_text()
    directory = evaluate("base", "_base_journald_directory")
    (other,) = re.findall(r"dest: (.*)", text.replace("{{ _base_journald_directory }}", directory))
    assert other.strip('"') not in evaluate("hardening", "_hardening_all_files", **SERVER)


def test_updates_restart_nothing_unless_told_when() -> None:
    text = rendered("/etc/apt/apt.conf.d/60hardstand")
    assert 'Automatic-Reboot "false";' in text
    assert "Reboot-Time" not in text
    assert '"supervisor$";' in text
    at_night = rendered("/etc/apt/apt.conf.d/60hardstand", hardening_reboot_time="04:30")
    assert 'Automatic-Reboot "true";' in at_night
    assert 'Automatic-Reboot-Time "04:30";' in at_night


@pytest.mark.skipif(not shutil.which("apt-config"), reason="there is no apt here")
def test_apt_understands_its_file(tmp_path: Path) -> None:
    file = tmp_path / "apt.conf"
    file.write_text(
        'Unattended-Upgrade::Origins-Pattern { "origin=Debian,codename=x,label=Debian"; };\n'
        'Unattended-Upgrade::Package-Blacklist { "vendors"; };\n'
        + rendered("/etc/apt/apt.conf.d/60hardstand", hardening_reboot_time="04:30")
    )
    done = subprocess.run(
        ["apt-config", "-c", file, "dump"], capture_output=True, text=True, check=True, env={"APT_CONFIG": "/dev/null"}
    )
    origins = [line for line in done.stdout.splitlines() if line.startswith("Unattended-Upgrade::Origins-Pattern::")]
    assert origins
    assert all("-Security" in line or "-security" in line for line in origins)
    assert "vendors" not in done.stdout
    assert 'Unattended-Upgrade::Automatic-Reboot-Time "04:30";' in done.stdout


@pytest.mark.skipif(not shutil.which("visudo"), reason="there is no sudo here")
def test_sudo_understands_its_file(tmp_path: Path) -> None:
    file = tmp_path / "sudoers"
    file.write_text(rendered("/etc/sudoers.d/hardstand-record"))
    assert subprocess.run(["visudo", "-c", "-q", "-f", file], check=False).returncode == 0


def test_kernel_file_says_what_is_set() -> None:
    text = rendered(
        "/etc/sysctl.d/zz-hardstand.conf", hardening_sysctl={"net.ipv4.conf.all.rp_filter": 2, "vm.swappiness": 5}
    )
    assert "-net.ipv4.conf.all.rp_filter = 2\n" in text
    assert "-vm.swappiness = 5\n" in text
    assert "-kernel.kptr_restrict = 2\n" in text
    assert "forward" not in text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"hardening_reboot_time": "4:30"}, "hardening_reboot_time"),
        ({"hardening_reboot_time": 16200}, "hardening_reboot_time"),
        ({"hardening_umask": "27"}, "hardening_umask"),
        ({"hardening_umask": "777"}, "hardening_umask"),
        ({"hardening_sudo_log": "sudo.log"}, "hardening_sudo_log"),
        ({"hardening_modules_off": ["usb storage"]}, "hardening_modules_off"),
        ({"hardening_sysctl": {"x y": 1}}, "hardening_sysctl"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], problem: str) -> None:
    (found,) = evaluate("hardening", "_hardening_problems", **SERVER | settings)
    assert found.startswith(problem)


def test_defaults_are_accepted() -> None:
    assert evaluate("hardening", "_hardening_problems", **SERVER) == []
    assert evaluate("hardening", "hardening_enabled") is False


# Sandboxes --------------------------------------------------------------------------------------------------------


def sandbox(role: str, **variables: Any) -> str:
    text: str = evaluate(
        role, "lookup('ansible.builtin.template', 'hardstand-sandbox.conf.j2')", ansible_managed="managed", **variables
    )
    return text


def test_programs_write_where_they_are_told_to() -> None:
    line = "ReadWritePaths=/run /srv /var/log/supervisor"
    assert f"{line}\n" in sandbox("supervisor")
    text = sandbox("supervisor", supervisor_writable_paths=["/mnt/my disk"], supervisor_data_paths=["/var/lib/5%"])
    assert f'{line} -"/mnt/my disk" -"/var/lib/5%%"\n' in text


def test_generated_code_is_forbidden_only_when_asked_for() -> None:
    assert "MemoryDenyWriteExecute" not in sandbox("supervisor")
    assert "MemoryDenyWriteExecute=yes\n" in sandbox("supervisor", supervisor_sandbox_forbids_generated_code=True)


@pytest.mark.parametrize("path", ["data", "/srv/../etc x\n", '/a"b', "/", "/a%b"])
def test_paths_that_a_unit_would_misread_are_refused(path: str) -> None:
    assert evaluate("supervisor", "_supervisor_problems", supervisor_writable_paths=[path])


def test_sandboxes_are_on_where_hardening_is() -> None:
    wiring = read_yaml(ROLES.parent / "group_vars/all.yml")
    for name in ("supervisor_sandbox", "nginx_sandbox"):
        assert evaluate("hardening", name, **{name: wiring[name]}) is False
        assert evaluate("hardening", name, **{name: wiring[name]}, hardening_enabled=True) is True


@pytest.mark.parametrize(
    ("database", "paths"),
    [
        ("/srv/blog/shared/app.db", []),
        ("/mnt/data/app.db", ["/mnt/data"]),
        ("", []),
        ("app.db", []),
    ],
)
def test_a_database_elsewhere_can_be_written_to(database: str, paths: list[str]) -> None:
    wired = read_yaml(ROLES.parent / "group_vars/all.yml")["supervisor_data_paths"]
    assert evaluate("supervisor", "found", found=wired, sqlite_backup_database=database) == paths


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
@pytest.mark.parametrize("role", ["supervisor", "nginx"])
def test_exposure_is_small(role: str, tmp_path: Path) -> None:
    unit = tmp_path / f"{role}.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n" + sandbox(role))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "not supported" in done.stderr or "Failed to" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_files_of_debians_are_never_removed() -> None:
    known = SERVER | {"hardening_integrity": False}
    absent = evaluate("hardening", "_hardening_unwanted | difference(_hardening_vendors)", **known)
    assert "/etc/hardstand/aide.conf" in absent
    assert "/etc/default/debsums" not in absent
    assert "/etc/default/debsums" not in evaluate("hardening", "_hardening_files", **known)


@pytest.mark.parametrize(
    ("inside", "wanted", "running", "other"),
    [
        (False, None, None, False),
        (True, None, None, True),
        (False, "a", None, True),
        (True, "a", "a", False),
        (True, "a", "b", True),
        (True, "a", None, True),
    ],
)
def test_supervisord_in_another_sandbox_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    running: str | None,
    *,
    inside: bool,
    other: bool,
) -> None:
    """`wanted` is the sandbox on disk, `running` the one that supervisord was started with."""
    spec = importlib.util.spec_from_file_location(
        "supervisor_service", ROLES / "supervisor/library/supervisor_service.py"
    )
    assert spec is not None
    assert spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    # Its dataclass looks for the module that it is in.
    monkeypatch.setitem(sys.modules, "supervisor_service", service)
    spec.loader.exec_module(service)
    monkeypatch.setattr(service, "sandboxed", lambda _: inside)
    for name, content in (("sandbox", wanted), ("running", running)):
        if content is not None:
            (tmp_path / name).write_text(content)
    sandbox = str(tmp_path / "sandbox") if wanted is not None else ""
    assert service.sandbox_is_other(1, sandbox, tmp_path / "running") is other
