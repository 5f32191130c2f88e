"""The modules of roles postgresql_backup and sqlite_backup, as Ansible runs them, and the roles' templates."""

from __future__ import annotations

import getpass
import grp
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.role_modules import run_module
from tests.role_templates import evaluate

PROJECT = Path(__file__).resolve().parents[1]
ROLE = PROJECT / "roles" / "postgresql_backup"


def run(module: str, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
    """Run a module of the role; returns its result."""
    return run_module(ROLE, module, arguments, check=check)


class TestFiles:
    """Module backup_files."""

    ME = {"owner": getpass.getuser(), "group": grp.getgrgid(os.getegid()).gr_name}  # noqa: RUF012 - nobody changes it

    def wanted(self, directory: Path, **changes: Any) -> dict[str, Any]:
        files = [
            {"path": str(directory / "d" / "plain"), "content": "hello\n", **self.ME},
            {"path": str(directory / "d" / "hidden"), "secret": "s3cret-word\n", "mode": "0600", **self.ME},
        ]
        return {"directories": [{"path": str(directory / "d"), "mode": "0750"}], "files": files, **changes}

    def test_first_and_again(self, tmp_path: Path) -> None:
        first = run("backup_files", **self.wanted(tmp_path))
        assert first["changed"] is True
        assert [Path(path).name for path in first["paths"]] == ["d", "plain", "hidden"]
        assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750
        assert (tmp_path / "d" / "hidden").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "d" / "hidden").read_text() == "s3cret-word\n"
        again = run("backup_files", **self.wanted(tmp_path))
        assert (again["changed"], again["paths"]) == (False, [])

    def test_what_differs_is_put_right(self, tmp_path: Path) -> None:
        run("backup_files", **self.wanted(tmp_path))
        (tmp_path / "d" / "plain").write_text("other\n")
        (tmp_path / "d" / "hidden").chmod(0o644)
        (tmp_path / "d").chmod(0o700)
        assert len(run("backup_files", **self.wanted(tmp_path))["paths"]) == 3
        assert run("backup_files", **self.wanted(tmp_path))["changed"] is False

    def test_a_directory_that_others_own_stays(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir(mode=0o700)
        assert run("backup_files", directories=[{"path": str(tmp_path / "d")}])["changed"] is False

    def test_a_dry_run_writes_nothing_and_needs_no_account(self, tmp_path: Path) -> None:
        wanted = self.wanted(tmp_path)
        wanted["files"][0]["group"] = "no-such-group"
        result = run("backup_files", check=True, **wanted)
        assert result["changed"] is True
        assert not list(tmp_path.iterdir())
        # A real one does need it, and says so.
        assert "There is no group no-such-group" in run("backup_files", **wanted)["msg"]

    def test_no_secret_is_shown(self, tmp_path: Path) -> None:
        for check in (True, False):
            result = run("backup_files", check=check, **self.wanted(tmp_path))
            assert "s3cret-word" not in json.dumps(result)
            assert [diff["after"] for diff in result["diff"]] == ["hello\n", ""]

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
    def test_a_schedule_that_systemd_does_not_know(self, tmp_path: Path) -> None:
        result = run("backup_files", **self.wanted(tmp_path, calendars=["Sun *-*-* 02:00:00", "someday"]))
        assert result["failed"] is True
        assert "someday" in result["msg"]
        assert not list(tmp_path.iterdir()), "nothing was written"


class TestProgram:
    """Module backup_program."""

    @pytest.fixture
    def program(self, tmp_path: Path) -> Path:
        path = tmp_path / "program"
        path.write_text('#!/bin/sh\necho "$2"\n[ -z "$3" ] || { echo "error: $3" >&2; exit 1; }\n')
        path.chmod(0o755)
        return path

    def test_what_it_says(self, program: Path) -> None:
        result = run("backup_program", argv=[str(program), "run", "done"])
        assert (result["changed"], result["lines"]) == (True, ["done"])

    def test_whether_it_changes_anything(self, program: Path) -> None:
        def told(line: str, changes: str) -> bool:
            return bool(run("backup_program", argv=[str(program), "x", line], changes=changes)["changed"])

        assert [told("changed: a thing", "told"), told("nothing", "told"), told("changed: x", "never")] == [
            True,
            False,
            False,
        ]

    def test_its_words_are_the_failure(self, program: Path) -> None:
        result = run("backup_program", argv=[str(program), "run", "begun", "no room: make some"])
        assert (result["failed"], result["msg"], result["lines"]) == (True, "no room: make some", ["begun"])

    def test_where_it_is_not(self, tmp_path: Path) -> None:
        gone = str(tmp_path / "gone")
        assert "deploy first" in run("backup_program", argv=[gone])["msg"]
        assert run("backup_program", argv=[gone], optional=True)["changed"] is False

    def test_a_dry_run_runs_nothing(self, tmp_path: Path) -> None:
        result = run("backup_program", check=True, argv=["/bin/sh", "-c", f"echo >{tmp_path}/made"])
        assert (result["changed"], result["lines"]) == (True, [])
        assert not (tmp_path / "made").exists()


class TestReady:
    """Module service_ready."""

    @pytest.fixture
    def service(self, open_directory: Path) -> Iterator[tuple[Path, list[bytes]]]:
        """An application behind a link to a socket; what it answers, the last for good."""
        answers = [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(open_directory / "blue.sock"))
            listener.listen()
            (open_directory / "live.sock").symlink_to("blue.sock")

            def serve() -> None:
                while True:
                    try:
                        client, _ = listener.accept()
                    except OSError:
                        return
                    with client:
                        client.recv(1000)
                        client.sendall(answers.pop(0) if len(answers) > 1 else answers[0])

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            yield open_directory / "live.sock", answers
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    def test_it_waits_for_it(self, service: tuple[Path, list[bytes]]) -> None:
        path, answers = service
        answers.append(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert run("service_ready", socket=str(path), path="/health", host="a.test", timeout=10)["ready"] is True

    def test_not_for_ever(self, service: tuple[Path, list[bytes]]) -> None:
        result = run("service_ready", socket=str(service[0]), path="/health", host="a.test", timeout=0.5)
        assert result["ready"] is False
        assert result["detail"].startswith("503")

    def test_where_there_is_no_application(self, tmp_path: Path) -> None:
        assert run("service_ready", socket=str(tmp_path / "x"), path="/", host="a")["ready"] is True


def postgresql(expression: str, **variables: Any) -> Any:
    """Evaluate an expression of role postgresql_backup on a database server that makes its own backups."""
    given = {
        "postgresql_backup_app": "blog",
        "postgresql_backup_database": "blog",
        "postgresql_backup_passphrase": "0123456789abcdef",
        "inventory_hostname": "db1",
        "ansible_facts": {"distribution_release": "trixie"},
        "ansible_managed": "managed",
    }
    return evaluate("postgresql_backup", expression, **given | variables)


TWO = {
    "postgresql_backup_keeper": {"name": "bak1", "address": "10.0.0.9"},
    "postgresql_backup_server": {"name": "db1", "address": "10.0.0.8"},
}


class TestTemplates:
    """What the roles write."""

    CONFIGURATION = "lookup('ansible.builtin.template', 'templates/pgbackrest.conf.j2')"

    def test_one_server(self) -> None:
        text = postgresql(self.CONFIGURATION)
        assert "repo1-cipher-pass=0123456789abcdef\n" in text
        assert "pg1-path=/var/lib/postgresql/17/main\n" in text
        assert "tls-" not in text
        assert "-host" not in text

    def test_the_passphrase_is_only_where_the_repository_is(self) -> None:
        text = postgresql(self.CONFIGURATION, **TWO, postgresql_backup_runs=False, postgresql_backup_address="10.0.0.8")
        assert "0123456789abcdef" not in text
        assert "repo1-host=10.0.0.9\nrepo1-host-type=tls\n" in text
        assert "tls-server-address=10.0.0.8\n" in text
        assert "tls-server-auth=blog-backup.internal=blog\n" in text

    def test_the_server_that_keeps_them(self) -> None:
        text = postgresql(self.CONFIGURATION, **TWO, postgresql_backup_here=False, postgresql_backup_address="10.0.0.9")
        assert "pg1-host=10.0.0.8\npg1-host-type=tls\n" in text
        assert "tls-server-auth=blog-db.internal=blog\n" in text
        assert "repo1-host" not in text

    def test_other_repositories(self) -> None:
        options = {"repo1-type": "s3", "repo1-s3-bucket": "b", "repo1-storage-verify-tls": False}
        text = postgresql(self.CONFIGURATION, postgresql_backup_options=options)
        assert "repo1-type=s3\nrepo1-s3-bucket=b\nrepo1-storage-verify-tls=n\n" in text
        settings = postgresql("_postgresql_backup_settings", postgresql_backup_options=options)
        assert (settings["repository_path"], settings["repository"]) == ("", "s3:/var/lib/pgbackrest")

    def test_what_the_program_is_told(self) -> None:
        settings = postgresql("_postgresql_backup_settings", **TWO, postgresql_backup_runs=False)
        assert (settings["runs_backups"], settings["has_database"], settings["repository_path"]) == (False, True, "")
        assert settings["repository"] == "/var/lib/pgbackrest on bak1"
        assert settings["timers"] == {"hardstand-backup-check-blog": True, "hardstand-restore-check-blog": False}
        assert postgresql("_postgresql_backup_settings")["timers"]["hardstand-backup-blog"] is True

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({}, ""),
            ({"postgresql_backup_passphrase": "short"}, "must have 16 characters or more"),
            ({"postgresql_backup_path": "relative"}, "must begin with /"),
            ({"postgresql_backup_keep_full": 0}, "must be 1 or more"),
            ({"postgresql_backup_options": {"repo1-path": "/x"}}, "repo1-path is set by the role"),
            ({"postgresql_backup_options": {"repo1-s3-key": "a\nb"}}, "repo1-s3-key must be one line"),
            (TWO, "The address of db1 is not known"),
        ],
    )
    def test_settings_that_are_wrong(self, changes: dict[str, Any], problem: str) -> None:
        assert problem in " ".join(postgresql("_postgresql_backup_problems", **changes) or ["", ""])
        assert len(postgresql("_postgresql_backup_problems", **changes)) == bool(problem)

    @pytest.mark.parametrize(
        ("request_", "problem"),
        [
            ({"restore_to": "latest"}, ""),
            ({"restore_to": "2026-11-24 18:00:00+00"}, ""),
            ({"restore_to": "2026-11-24T18:00:00.5Z", "restore_into": "beside"}, ""),
            ({"restore_discard": "main.before-1"}, ""),
            ({}, "Say what to restore"),
            ({"restore_to": "2026-11-24 18:00:00"}, "neither latest nor a moment"),
            ({"restore_to": "latest", "restore_into": "there"}, "say service or beside"),
        ],
    )
    @pytest.mark.parametrize("role", ["postgresql_backup", "sqlite_backup"])
    def test_what_an_operator_asks_for(self, role: str, request_: dict[str, str], problem: str) -> None:
        given = {f"{role}_{name}": value for name, value in request_.items()}
        given |= {f"{role}_app": "blog", "sqlite_backup_account": "blog", "sqlite_backup_database": "/srv/blog/a.db"}
        found = evaluate(role, f"_{role}_request_problem", **given, sqlite_backup_passphrase="0123456789abcdef")
        assert (problem in found) if problem else found == ""

    def test_sqlite_without_a_passphrase_is_off(self) -> None:
        def enabled(**variables: str) -> bool:
            given = {"sqlite_backup_app": "blog", "sqlite_backup_account": "blog"}
            return bool(evaluate("sqlite_backup", "_sqlite_backup_enabled", **given | variables))

        assert not enabled(sqlite_backup_database="/srv/blog/a.db")
        assert not enabled(sqlite_backup_passphrase="0123456789abcdef")
        assert not enabled(sqlite_backup_passphrase="0123456789abcdef", sqlite_backup_database="a.db")
        assert enabled(sqlite_backup_passphrase="0123456789abcdef", sqlite_backup_database="/srv/blog/a.db")

    def test_a_repository_with_a_password_in_its_url(self) -> None:
        given = {"sqlite_backup_app": "blog", "sqlite_backup_account": "blog"}
        settings = evaluate(
            "sqlite_backup", "_sqlite_backup_settings", **given, sqlite_backup_repository="rest:https://u:pw@h/blog"
        )
        assert (settings["repository"], settings["repository_path"]) == ("rest:https://…@h/blog", "")
        assert settings["restic_repository"] == "rest:https://u:pw@h/blog"
