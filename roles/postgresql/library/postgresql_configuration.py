#!/usr/bin/python
"""Ansible module: PostgreSQL's configuration as one transaction, tested first; restarts only when it may."""

from __future__ import annotations

import grp
import os
import shutil
import tempfile
import time
import typing as t
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import NewFile, diff_of, replace_files
from ansible.module_utils.postgresql_host import Cluster, PostgresqlError, find_cluster, psql, query, run

DOCUMENTATION = r"""
---
module: postgresql_configuration
short_description: Replace PostgreSQL's configuration files, all of them or none, and let the server use them
description:
  - Lets C(postgres -C) read the configuration as it would be, in a private copy, and only then replaces the files. What
    pg_hba_file_rules finds wrong with the client rules is undone before the server reads them.
  - Reloads the server when it has not read what is on disk, also when an earlier run ended before it did so.
  - Restarts it for settings that need that only when O(restart) is given, or when nobody can be using it yet, because
    it has no database of anybody's and no connection. Otherwise the settings are returned as RV(pending).
  - Starts it when it does not run.
options:
  files:
    description: Files to write. Missing directories are made.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: The file., type: path, required: true}
      content: {description: Its content., type: str}
      source: {description: File on the server whose content it gets., type: path}
      mode: {description: "Its mode, in octal.", type: str, default: "0644"}
      group: {description: Its group. The owner is root., type: str, default: root}
      secret: {description: Keep the content out of the diff., type: bool, default: false}
  restart:
    description: Restart the server when settings wait for it.
    type: bool
    default: false
author: Hardstand
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Put the configuration in place
  postgresql_configuration:
    files:
      - path: /etc/postgresql/17/main/conf.d/hardstand.conf
        content: "{{ lookup('ansible.builtin.template', 'hardstand.conf.j2') }}"
"""

RETURN = r"""
paths:
  description: Files that were written.
  type: list
  elements: str
  returned: success
action:
  description: What was done to the server - nothing, reload, restart or start.
  type: str
  returned: success
pending:
  description: Settings that wait for a restart, each with its name, the running value and the value on disk.
  type: list
  elements: dict
  returned: success
max_connections:
  description: Connections that the running server allows; 0 when it does not run.
  type: int
  returned: success
"""

SYSTEMD = Path("/etc/systemd/system")
RELOAD_SECONDS = 15
START_SECONDS = 120

STATE = """
SELECT json_build_object(
  'loaded', extract(epoch FROM pg_conf_load_time()),
  'max_connections', current_setting('max_connections')::int,
  'databases', (SELECT count(*) FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres'),
  'clients', (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()),
  'pending', (SELECT coalesce(json_agg(json_build_object(
      'name', s.name, 'running', current_setting(s.name),
      'configured', (SELECT f.setting FROM pg_file_settings f WHERE lower(f.name) = lower(s.name)
        ORDER BY f.seqno DESC LIMIT 1))
    ORDER BY s.name), '[]') FROM pg_settings s WHERE s.pending_restart))
"""
HBA_ERRORS = """
SELECT coalesce(string_agg(format('line %s: %s', line_number, error), E'\\n' ORDER BY line_number), '')
FROM pg_hba_file_rules WHERE error IS NOT NULL
"""


class File(t.NamedTuple):
    """A file as it should be."""

    path: Path
    content: str
    mode: int
    group: str
    secret: bool

    def current(self) -> str | None:
        """Return what the file says now; None when it is not there."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def needed(self) -> bool:
        """Tell whether it differs from what it should be."""
        if self.current() != self.content:
            return True
        status = self.path.stat()
        return (status.st_mode & 0o7777, status.st_uid, status.st_gid) != (
            self.mode,
            0,
            grp.getgrnam(self.group).gr_gid,
        )


def replace(files: list[File]) -> None:
    """Replace all files, or none, with their owners and modes from the first byte on."""
    for file in files:
        file.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    replace_files([NewFile(file.path, file.content, file.mode, 0, grp.getgrnam(file.group).gr_gid) for file in files])


def test(cluster: Cluster, files: list[File]) -> None:
    """Let PostgreSQL read its configuration as it will be.

    Raises PostgresqlError with what it says against it.
    """
    with tempfile.TemporaryDirectory(prefix="postgresql-test-") as scratch:
        os.chown(scratch, 0, grp.getgrnam("postgres").gr_gid)
        Path(scratch).chmod(0o750)
        copy = Path(scratch) / "main"
        # Keys stay where they are: nothing here reads them.
        shutil.copytree(cluster.configuration, copy, ignore=shutil.ignore_patterns("*.key"))
        for path in [copy, *copy.rglob("*")]:
            os.chown(path, 0, grp.getgrnam("postgres").gr_gid)
            path.chmod(0o750 if path.is_dir() else 0o640)
        inside = [
            file._replace(path=copy / file.path.relative_to(cluster.configuration))
            for file in files
            if file.path.is_relative_to(cluster.configuration) and not file.secret
        ]
        replace(inside)
        asked = ["/usr/sbin/runuser", "--user", "postgres", "--", cluster.program("postgres")]
        done = run([*asked, "-C", "max_connections", "-D", str(copy)])
        if done.returncode != 0:
            said = done.stderr.replace(str(copy), str(cluster.configuration)).strip()
            raise PostgresqlError(f"PostgreSQL refuses this configuration; the one that is there was kept.\n{said}")


def check_rules(changes: list[File], before: t.Mapping[Path, str | None]) -> None:
    """Let the server look at the client rules on disk, before it reads them; put all files back if it refuses them.

    Raises PostgresqlError with what is wrong with them.
    """
    errors = psql(HBA_ERRORS).strip()
    if not errors:
        return
    replace([file._replace(content=content) for file in changes if (content := before[file.path]) is not None])
    for path in [file.path for file in changes if before[file.path] is None]:
        path.unlink()
    raise PostgresqlError(f"PostgreSQL refuses these client rules; everything was kept as it is.\npg_hba.conf {errors}")


def systemctl(*arguments: str) -> None:
    """Run systemctl; raises PostgresqlError with what it says when it fails."""
    done = run(["/usr/bin/systemctl", *arguments], timeout=START_SECONDS)
    if done.returncode != 0:
        raise PostgresqlError(f"systemctl {' '.join(arguments)}: {done.stderr.strip()}")


def last_words(cluster: Cluster) -> str:
    """Return the last lines of the server's own log, which say why it did not start."""
    log = Path(f"/var/log/postgresql/postgresql-{cluster.version}-{cluster.name}.log")
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    except OSError:
        return ""


def bring_up(cluster: Cluster, action: str) -> None:
    """Start or restart the server, and wait until it answers.

    Raises PostgresqlError with the end of its log when it does not.
    """
    try:
        systemctl(action, cluster.unit)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psql("SELECT 1")
            except PostgresqlError:
                # Recovery after a crash may take a while; the unit says when there is nothing to wait for.
                systemctl("is-active", "--quiet", cluster.unit)
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return
    except PostgresqlError as error:
        raise PostgresqlError(f"PostgreSQL did not {action}: {error}\n{last_words(cluster)}") from error


def reload(loaded: float) -> None:
    """Let the server read its configuration, and wait until it has.

    Raises PostgresqlError with what pg_file_settings says when it does not take it.
    """
    psql("SELECT pg_reload_conf()")
    deadline = time.monotonic() + RELOAD_SECONDS
    # A new session learns from the main process what that has read.
    while query("SELECT extract(epoch FROM pg_conf_load_time())") <= loaded:
        if time.monotonic() > deadline:
            errors = psql("SELECT format('%s line %s: %s', sourcefile, sourceline, error) FROM pg_file_settings"
                          " WHERE error IS NOT NULL AND NOT applied")  # fmt: skip
            raise PostgresqlError(f"PostgreSQL does not take its configuration.\n{errors.strip()}")
        time.sleep(0.1)


def converge(parameters: dict[str, t.Any], *, check: bool, diff: bool) -> dict[str, t.Any]:
    """Bring files and server to what `parameters` ask for and return the module's result; with `check`, do nothing.

    Raises PostgresqlError when PostgreSQL says no, OSError when the disk does.
    """
    cluster = find_cluster()
    if cluster is None:
        raise PostgresqlError("There is no cluster of PostgreSQL on this server.")
    files = [
        File(
            Path(file["path"]),
            file["content"] if file["content"] is not None else Path(file["source"]).read_text(encoding="utf-8"),
            int(file["mode"], 8),
            file["group"],
            file["secret"],
        )
        for file in parameters["files"]
        # A dry run comes before what the source is made of.
        if not check or file["source"] is None or Path(file["source"]).exists()
    ]
    changes = [file for file in files if file.needed()]
    before = {file.path: file.current() for file in changes}
    nothing = {"loaded": 0.0, "max_connections": 0, "pending": [], "databases": 0, "clients": 0}
    state: dict[str, t.Any] = query(STATE) if cluster.running else nothing

    result: dict[str, t.Any] = {
        "changed": bool(changes),
        "paths": [str(file.path) for file in changes],
        "action": "nothing",
        "pending": state["pending"],
        "max_connections": state["max_connections"],
    }
    if diff:
        result["diff"] = [diff_of(file.path, before[file.path], file.content) for file in changes if not file.secret]
    if any(file.path.is_relative_to(cluster.configuration) for file in changes):
        test(cluster, changes)
    unread = cluster.running and any(
        file.path.stat().st_ctime > state["loaded"]
        for file in files
        if file.path.is_relative_to(cluster.configuration) and file.path.exists()
    )
    if check:
        result["changed"] = bool(changes) or unread or not cluster.running
        return result

    replace(changes)
    if any(file.path.is_relative_to(SYSTEMD) for file in changes):
        systemctl("daemon-reload")
    if not cluster.running:
        result["action"] = "start"
        bring_up(cluster, "start")
    elif unread or any(file.path.is_relative_to(cluster.configuration) for file in changes):
        check_rules(changes, before)
        result["action"] = "reload"
        reload(state["loaded"])
    state = query(STATE)
    if state["pending"] and (parameters["restart"] or state["databases"] == state["clients"] == 0):
        result["action"] = "restart"
        bring_up(cluster, "restart")
        state = query(STATE)
    result.update(
        changed=bool(changes) or result["action"] != "nothing",
        pending=state["pending"],
        max_connections=state["max_connections"],
    )
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "source": {"type": "path"},
                    "mode": {"type": "str", "default": "0644"},
                    "group": {"type": "str", "default": "root"},
                    "secret": {"type": "bool", "default": False},
                },
                "required_one_of": [("content", "source")],
                "mutually_exclusive": [("content", "source")],
            },
            "restart": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    try:
        result = converge(module.params, check=module.check_mode, diff=module._diff)
    except (PostgresqlError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
