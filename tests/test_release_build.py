"""Module release_build: a release is complete or not there, and nothing that it need not do is done."""

from __future__ import annotations

import base64
import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.release_support import (
    BUILDER,
    PROXY_GROUP,
    RELEASE_ID,
    SERVICE,
    Repository,
    Server,
    alive,
    eventually,
    run_module,
    start_module,
    wheel,
)
from tests.role_templates import evaluate

REQUIREMENTS = "gunicorn==27.0.1\nuvicorn-worker==0.4.0\nleft==1.0\n"
CODE = {"service.py": "app = 1\n", "requirements.txt": REQUIREMENTS}
COMMIT_TIME = 1714979289  # 2024-05-06T07:08:09Z


def owner(path: Path) -> tuple[str, str, int]:
    """Return the account, group and mode of a file."""
    stat = path.lstat()
    return pwd.getpwuid(stat.st_uid).pw_name, grp.getgrgid(stat.st_gid).gr_name, stat.st_mode & 0o7777


def group_of(account: str) -> str:
    return grp.getgrgid(pwd.getpwnam(account).pw_gid).gr_name


@pytest.fixture
def commit(server: Server) -> str:
    """A commit that can be deployed."""
    return server.repository.commit(CODE, "First\n\nMore about it.")


class TestARelease:
    def test_is_complete(self, server: Server, commit: str) -> None:
        result = server.build(commit, secret_names=["KEY"], settings={"module": "service:app"})
        assert result["changed"]
        assert (result["dependencies"], result["subject"], result["live"]) == ("installed", "First", False)
        release = server.release()
        assert (release / "service.py").read_text() == "app = 1\n"
        assert (release / ".env").read_text() == 'KEY="value"\n'
        assert (release / ".hardstand" / "blue.conf").read_text() == "; blue\n"
        about = json.loads((release / "release.json").read_text())
        assert (about["commit"], about["secret_names"], about["module"]) == (commit, ["KEY"], "service:app")
        lock = (release / "requirements.lock").read_text()
        assert "left==1.0" in lock
        assert "--hash=sha256:" in lock
        packages = [str(release / ".venv/bin/python"), "-c", "import gunicorn, left; print(gunicorn.__version__)"]
        assert subprocess.run(packages, capture_output=True, text=True, check=True).stdout == "27.0.1\n"

    def test_belongs_to_root_and_only_the_app_reads_its_secrets(self, server: Server, commit: str) -> None:
        server.build(commit)
        release = server.release()
        assert owner(release / ".env") == ("root", group_of(SERVICE), 0o640)
        venv = (release / ".venv").resolve()
        others = [path for path in (*release.rglob("*"), *venv.rglob("*")) if path.lstat().st_uid != 0]
        assert others == []
        assert owner(server.root / "run") == (SERVICE, PROXY_GROUP, 0o750)
        assert owner(server.root / "shared") == (SERVICE, group_of(SERVICE), 0o750)

    def test_has_the_commits_time_on_every_file_and_bytecode_that_fits(self, server: Server, commit: str) -> None:
        server.build(commit)
        release = server.release()
        assert (release / "service.py").stat().st_mtime == COMMIT_TIME
        (bytecode,) = (release / "__pycache__").glob("service.*.pyc")
        content = bytecode.read_bytes()
        assert int.from_bytes(content[8:12], "little") == COMMIT_TIME
        assert str(release / "service.py").encode() in content

    def test_is_built_once(self, server: Server, commit: str) -> None:
        server.build(commit)
        before = server.release().stat()
        assert not server.build(commit)["changed"]
        assert server.release().stat() == before

    def test_is_foretold_and_not_made_in_check_mode(self, server: Server, commit: str) -> None:
        arguments = server.arguments(commit, dotenv='KEY="s3cr3t-value"\n', secret_names=["KEY"])
        result = run_module("release_build", arguments, check=True)
        assert result["changed"]
        assert "KEY (new value)" in result["diff"]["after"]
        assert "s3cr3t" not in json.dumps(result)
        assert not server.root.exists()

    def test_keeps_its_own_names_whatever_the_commit_has_there(self, server: Server, tmp_path: Path) -> None:
        files = {**CODE, ".venv/bin/python": "x", "release.json/file": "x", ".env": "KEY=committed", "app/x.py": ""}
        (server.repository.path / ".hardstand").symlink_to(tmp_path)
        commit = server.repository.commit(files)
        assert server.build(commit)["changed"]
        assert list(tmp_path.iterdir()) == []
        assert (server.release() / ".env").read_text() == 'KEY="value"\n'
        assert (server.release() / ".venv/bin/gunicorn").parent.is_dir()

    def test_shows_no_file_of_the_server_through_a_link_in_the_commit(self, server: Server) -> None:
        secret = server.directory / "secret"
        secret.write_text("left==1.0 # secret")
        secret.chmod(0o600)
        (server.repository.path / "requirements.lock").symlink_to(secret)
        server.build(server.repository.commit(CODE))
        assert "secret" not in (server.release() / "requirements.lock").read_text()


class TestVirtualenv:
    def test_is_shared_by_releases_with_the_same_dependencies(self, server: Server, commit: str) -> None:
        server.build(commit)
        calls = server.directory / "calls"
        uv = server.directory / "uv-that-tells"
        uv.write_text(f'#!/bin/sh\necho "$1" >>{calls}\nexec {server.uv} "$@"\n')
        uv.chmod(0o755)
        second = server.repository.commit({"service.py": "app = 2\n"})
        result = server.build(second, "0000000c-0000000b", uv=str(uv))
        assert result["dependencies"] == "unchanged"
        assert not calls.exists(), "a deploy of code alone ran uv"
        assert len(server.virtualenvs()) == 1
        third = server.build(second, "0000000c-0000000d", dotenv='KEY="other"\n', uv=str(uv))
        assert third["changed"]
        assert third["release_id"] == "0000000c-0000000d"
        assert len(server.virtualenvs()) == 1

    def test_is_another_for_other_dependencies(self, server: Server, commit: str) -> None:
        server.build(commit)
        second = server.repository.commit({"requirements.txt": REQUIREMENTS.replace("left==1.0", "left==2.0")})
        assert server.build(second, "2-2")["dependencies"] == "installed"
        assert len(server.virtualenvs()) == 2

    def test_depends_on_included_files(self, server: Server) -> None:
        files = {
            "requirements.txt": "-r more/base.txt\nleft\n",
            "more/base.txt": "-c pins.txt\ngunicorn\nuvicorn-worker\n",
            "more/pins.txt": "left<2\n",
        }
        server.build(server.repository.commit(files), "1-1")
        assert "left==1.0" in (server.release("1-1") / "requirements.lock").read_text()
        server.build(server.repository.commit({"more/pins.txt": "left<3\n"}), "2-2")
        assert "left==2.0" in (server.release("2-2") / "requirements.lock").read_text()

    def test_stays_the_same_when_something_newer_is_published(self, server: Server) -> None:
        wheels = server.directory / "wheels"
        wheels.mkdir()
        assert server.wheels is not None
        for file in server.wheels.iterdir():
            (wheels / file.name).write_bytes(file.read_bytes())
        server.wheels = wheels
        files = {**CODE, "requirements.txt": "gunicorn\nuvicorn-worker\n"}
        server.build(server.repository.commit(files), "1-1")
        wheel(wheels, "left", "3.0", {"left.py": ""})
        assert server.build(server.repository.commit({"x": ""}), "2-2")["dependencies"] == "unchanged"

    def test_installs_what_a_lock_file_in_the_repository_says(self, server: Server) -> None:
        lock = "gunicorn==20.1.0\nuvicorn-worker==0.4.0\nleft==2.0\n"
        server.build(server.repository.commit({**CODE, "requirements.lock": lock}))
        assert (server.release() / "requirements.lock").read_text() == lock
        python = [str(server.release() / ".venv/bin/python"), "-c", "import gunicorn; print(gunicorn.__version__)"]
        assert subprocess.run(python, capture_output=True, text=True, check=True).stdout == "20.1.0\n"

    def test_installs_a_project_with_uv_lock(self, server: Server) -> None:
        project = '[project]\nname = "app"\nversion = "1"\nrequires-python = ">=3.9"\n'
        project += 'dependencies = ["gunicorn", "uvicorn-worker", "left<2"]\n[dependency-groups]\ndev = ["nowhere"]\n'
        # Where uv found the wheels when it locked, which is where it looks again.
        project += f'[tool.uv]\nno-index = true\nfind-links = ["{server.wheels}"]\n'
        server.repository.write({"pyproject.toml": project.replace('["nowhere"]', "[]")})
        lock = [str(server.uv), "lock", "--quiet", "--python", sys.executable]
        subprocess.run(lock, cwd=server.repository.path, check=True)
        server.build(server.repository.commit({**CODE, "requirements.txt": "nowhere\n"}))
        assert "left==1.0" in (server.release() / "requirements.lock").read_text()

    def test_is_made_by_pip_as_well(self, server: Server, commit: str) -> None:
        # The control node's own Python, which has pip and may lie where no other account may go.
        changes = {"installer": "pip", "python": sys.executable, "build_user": "root"}
        result = server.build(commit, **changes)
        assert result["dependencies"] == "installed", result
        assert "left==1.0\n" in (server.release() / "requirements.lock").read_text()
        second = server.repository.commit({"service.py": "app = 2\n"})
        assert server.build(second, "2-2", **changes)["dependencies"] == "unchanged"


def dependencies_of(requirements: str) -> str:
    """Return a full set, as another server has decided on it."""
    return f"gunicorn==27.0.1\nuvicorn-worker==0.4.0\n{requirements}\n"


class TestDependenciesOfAFleet:
    """One host decides on the full set, and all have it, whatever an index says meanwhile."""

    def test_are_asked_for_by_a_host_that_may_not_decide(self, server: Server) -> None:
        commit = server.repository.commit({**CODE, "requirements.txt": "gunicorn\nuvicorn-worker\n"})
        result = server.build(commit, may_resolve=False)
        assert (result["changed"], result["missing_dependencies"], result["missing_commit"]) == (False, True, False)
        assert "dependency_set" not in result
        assert "resolved" not in result
        assert not result.get("failed")
        assert (server.releases(), server.virtualenvs(), server.records()) == ([], [], [])
        assert not (server.root / "venvs" / ".locks").exists()

    def test_are_installed_as_given_and_kept_for_the_next_build(self, server: Server) -> None:
        commit = server.repository.commit({**CODE, "requirements.txt": "gunicorn\nuvicorn-worker\n"})
        given = dependencies_of("left==1.0")
        first = server.build(commit, "1-1", may_resolve=False, dependencies=given)
        assert (first["changed"], first["resolved"], first["missing_dependencies"]) == (True, False, False)
        assert (server.release("1-1") / "requirements.lock").read_text() == given
        # Its own choice would have been the newest, left 2.0.
        second = server.build(server.repository.commit({"service.py": "app = 2\n"}), "2-2", may_resolve=False)
        assert (second["dependencies"], second["resolved"]) == ("unchanged", False)
        assert second["dependency_set"] == first["dependency_set"]
        assert (server.release("2-2") / "requirements.lock").read_text() == given
        assert len(server.virtualenvs()) == 1

    def test_replace_those_that_the_host_had_kept(self, server: Server) -> None:
        commit = server.repository.commit({**CODE, "requirements.txt": "gunicorn\nuvicorn-worker\nleft\n"})
        first = server.build(commit, "1-1")
        assert first["resolved"]
        given = dependencies_of("left==1.0")
        assert server.build(commit, "2-2", dependencies=given)["dependency_set"] != first["dependency_set"]
        third = server.build(commit, "3-3")
        assert not third["resolved"]
        assert (server.release("3-3") / "requirements.lock").read_text() == given

    def test_are_named_alike_on_every_host(self, server: Server, commit: str) -> None:
        built = server.build(commit)
        assert built["resolved"]
        again = server.build(commit, may_resolve=False)
        assert (again["changed"], again["resolved"]) == (False, False)
        assert again["dependency_set"] == built["dependency_set"]
        lock = (server.release() / "requirements.lock").read_text()
        other = server.build(commit, "2-2", dependencies=lock)
        assert other["dependency_set"] == built["dependency_set"]

    def test_that_the_repository_fixes_are_the_same_anyway(self, server: Server) -> None:
        """No host decides on a lock file, so none waits to be told."""
        commit = server.repository.commit({**CODE, "requirements.lock": dependencies_of("left==1.0")})
        result = server.build(commit, may_resolve=False)
        assert (result["changed"], result["resolved"], result["missing_dependencies"]) == (True, False, False)

    def rebuilt(self, server: Server, commit: str) -> bool:
        """Give other dependencies than the release was built with; returns whether it has them now."""
        given = dependencies_of("left==2.0")
        result = server.build(commit, dependencies=given)
        built = (server.release() / "requirements.lock").read_text() == given
        assert result["changed"] == built
        (lock,) = server.release().glob("requirements.lock")
        assert "left==" in lock.read_text(), "the release is whole in any case"
        return built

    def test_make_a_release_anew_that_was_built_with_others(self, server: Server, commit: str) -> None:
        """A deploy that built it and went no further had decided on another set."""
        server.build(commit)
        assert self.rebuilt(server, commit)
        assert server.releases() == [RELEASE_ID]

    @pytest.mark.parametrize("use", ["live", "to", "from"])
    def test_do_not_touch_a_release_that_is_in_use(self, server: Server, commit: str, use: str) -> None:
        server.build(commit)
        if use == "live":
            (server.root / "current").symlink_to(f"releases/{RELEASE_ID}")
        else:
            pending = {"to": "9-9", "from": "8-8", "deploy": {}, use: RELEASE_ID}
            (server.root / ".deploy.json").write_text(json.dumps(pending))
        assert not self.rebuilt(server, commit)

    def test_given_for_a_release_that_has_them_change_nothing(self, server: Server, commit: str) -> None:
        server.build(commit)
        lock = (server.release() / "requirements.lock").read_text()
        assert not server.build(commit, dependencies=lock)["changed"]

    @pytest.mark.parametrize(
        ("builds", "host"),
        [
            # The first host decides where nobody has a set yet.
            ({"app1": ("a", True), "app2": None, "app3": None}, "app1"),
            # A set that was there before wins, so that no host has to change.
            ({"app1": ("a", True), "app2": ("b", False), "app3": None}, "app2"),
            ({"app1": ("a", False), "app2": ("b", False), "app3": None}, "app1"),
            ({"app1": ("a", True), "app2": None, "app3": ("b", False)}, "app3"),
        ],
    )
    def test_are_those_of_one_host(self, builds: dict[str, tuple[str, bool] | None], host: str) -> None:
        results = {
            name: {"dependency_set": said[0], "resolved": said[1]} if said else {"missing_dependencies": True}
            for name, said in builds.items()
        }
        variables = {
            "ansible_play_hosts": list(builds),
            "hostvars": {name: {"__release_build": result} for name, result in results.items()},
        }
        assert evaluate("release", "_release_dependencies_host", **variables) == host
        sets = [said[0] if said else "" for said in builds.values()]
        assert evaluate("release", "_release_dependency_sets", **variables) == sets


class TestPlacesOfTheApplication:
    def test_a_subdirectory(self, server: Server) -> None:
        commit = server.repository.commit({f"services/blog/{name}": text for name, text in CODE.items()})
        server.build(commit, subdirectory="services/blog")
        application = server.release() / "services/blog"
        assert (application / ".env").read_text() == 'KEY="value"\n'
        assert owner(server.release() / ".env") == ("root", group_of(SERVICE), 0o640)

    @pytest.mark.parametrize("directory", ["nowhere", "../..", "outside"])
    def test_a_subdirectory_that_the_commit_lacks(self, server: Server, directory: str) -> None:
        (server.repository.path / "outside").symlink_to("/etc")
        commit = server.repository.commit(CODE)
        result = server.build(commit, subdirectory=directory)
        assert f"Commit {commit[:12]} has no directory {directory}; set release_subdirectory" in result["msg"]
        assert server.releases() == []

    def test_a_src_layout(self, server: Server) -> None:
        worker = {"src/package/workers.py": "class Mine:\n    pass\n", "src/package/__init__.py": ""}
        commit = server.repository.commit({**CODE, **worker})
        result = server.build(commit, worker_class="package.workers.Mine", python_path=["src"])
        assert result["changed"], result


class TestRefusals:
    """Each names what is wrong, and leaves nothing behind."""

    def refused(self, server: Server, commit: str, **changes: Any) -> str:
        result = server.build(commit, **changes)
        assert result.get("failed"), result
        assert server.releases() == []
        assert server.virtualenvs() == []
        assert result["msg"].endswith("The release that was live still serves.")
        (record,) = server.records()
        assert record["outcome"] == "failed: build"
        assert record["reason"] == result["msg"].splitlines()[0]
        return str(result["msg"])

    @pytest.mark.parametrize(
        ("requirements", "message"),
        [
            (None, "There is no requirements.txt, and no pyproject.toml with uv.lock, in the repository's root"),
            ("gunicorn\nuvicorn-worker\nno-such-thing==1.0\n", "no-such-thing was not found"),
            ("left\n", "The application's dependencies lack gunicorn: add it to its requirements."),
            (
                "gunicorn==27.0.1\n",
                (
                    "lack worker class uvicorn_worker.UvicornWorker (No module named 'uvicorn_worker'): add it to its "
                    "requirements, or set release_worker_class."
                ),
            ),
            ("gunicorn==20.0.4\nuvicorn-worker\n", "have gunicorn 20.0.4; 20.1 is the oldest that is served."),
        ],
    )
    def test_dependencies_that_cannot_serve(self, server: Server, requirements: str | None, message: str) -> None:
        files = {**CODE, "requirements.txt": requirements} if requirements else {"service.py": ""}
        assert message in self.refused(server, server.repository.commit(files))

    def test_a_failure_of_the_installer(self, server: Server) -> None:
        commit = server.repository.commit({**CODE, "requirements.lock": "gunicorn==27.0.1\nleft==9.9\n"})
        message = self.refused(server, commit)
        assert message.startswith("The dependencies cannot be installed.\n")
        assert "left==9.9" in message

    def test_shows_no_secret_of_the_environment_of_the_build(self, server: Server) -> None:
        commit = server.repository.commit(
            {**CODE, "requirements.txt": "--index-url https://u:p4ssw0rd@127.0.0.1:9/\nx"}
        )
        build_env = 'INDEX="https://u:p4ssw0rd@127.0.0.1:9/"\nUV_HTTP_RETRIES="0"\n'
        assert "p4ssw0rd" not in self.refused(server, commit, build_env=build_env, wheel_directory="")

    def test_a_missing_python(self, server: Server, commit: str) -> None:
        message = self.refused(server, commit, python="/opt/pyenv/versions/9/bin/python")
        assert "There is no Python at /opt/pyenv/versions/9/bin/python; role python installs it" in message

    def test_an_installation_that_takes_too_long(self, server: Server, commit: str) -> None:
        uv = server.directory / "slow-uv"
        uv.write_text("#!/bin/sh\necho waiting for the index >&2\nsleep 30 & wait\n")
        uv.chmod(0o755)
        message = self.refused(server, commit, uv=str(uv), build_timeout=1)
        assert message.startswith("slow-uv was stopped after 1 s.\nwaiting for the index")

    def test_a_missing_account(self, server: Server, commit: str) -> None:
        result = server.build(commit, user="no-such-account")
        assert "There is no account no-such-account here; role base makes it" in result["msg"]

    def test_a_worker_class_that_only_the_other_release_had(self, server: Server, commit: str) -> None:
        server.build(commit)
        assert "worker class x.Y (No module named 'x')" in server.build(commit, "2-2", worker_class="x.Y")["msg"]
        assert server.releases() == [RELEASE_ID]
        assert len(server.virtualenvs()) == 1


class TestInterrupted:
    @pytest.mark.parametrize("stage", ["pip compile", "venv", "pip install"])
    def test_a_killed_build_leaves_nothing_that_counts(self, server: Server, commit: str, stage: str) -> None:
        uv = server.directory / "stopping-uv"
        reached = server.directory / "reached"
        uv.write_text(
            f'#!/bin/sh\ncase "$1 $2" in "{stage}"*) echo $$ >{reached}; exec sleep 60;; esac\nexec {server.uv} "$@"\n'
        )
        uv.chmod(0o755)
        reached.touch()
        reached.chmod(0o666)
        process = start_module("release_build", server.arguments(commit, uv=str(uv)))
        eventually(lambda: reached.read_text().strip() or process.poll() is not None, f"the build reaches {stage}")
        pid = int(reached.read_text())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not server.release().exists()
        eventually(lambda: not alive(pid), "the installer ends with the module")

        assert server.build(commit)["dependencies"] == "installed"
        assert server.releases() == [RELEASE_ID]
        assert len(server.virtualenvs()) == 1


class TestMirror:
    """How a commit gets to the server."""

    def test_asks_for_what_is_missing(self, server: Server, commit: str) -> None:
        answer = server.build(commit, pack="")
        assert (answer["missing_commit"], answer["have"], answer["changed"]) == (True, [], False)
        assert not answer.get("failed")
        server.build(commit)
        second = server.repository.commit({"service.py": "app = 2\n"})
        assert server.build(second, "2-2", pack="")["have"] == [commit]

    def test_takes_a_pack_that_builds_upon_what_it_has(self, server: Server) -> None:
        blob = os.urandom(200_000)
        first = server.repository.commit({**CODE, "big": blob})
        second = server.repository.commit({"big": blob + b"more"})
        thin = server.repository.pack(second, [first])
        assert len(thin) < 2_000
        assert len(server.repository.pack(second)) > 200_000

        answer = server.build(second, pack=thin)
        assert answer["missing_commit"], "what the pack builds upon is not here"
        server.build(first, "1-1")
        assert server.build(second, "2-2", pack=thin)["changed"]
        assert (server.release("2-2") / "big").read_bytes() == blob + b"more"

    def test_reports_a_pack_that_it_cannot_take(self, server: Server, commit: str) -> None:
        result = server.build(commit, pack="bm90IGEgcGFjaw==", pack_fits=True)
        assert "git index-pack failed" in result["msg"]

    def test_reads_a_large_pack_from_a_file(self, server: Server, commit: str) -> None:
        file = server.directory / "pack"
        file.write_bytes(base64.b64decode(server.repository.pack(commit)))
        assert server.build(commit, pack="", pack_file=str(file))["changed"]

    def test_takes_a_shallow_clone(self, server: Server) -> None:
        """CI jobs have one."""
        server.repository.commit(CODE)
        server.repository.commit({"service.py": "app = 2\n"})
        clone = Repository(server.directory / "shallow")
        clone.git("fetch", "--quiet", "--depth=1", f"file://{server.repository.path}", "main")
        head = clone.git("rev-parse", "FETCH_HEAD")
        assert server.build(head, pack=clone.pack(head))["changed"]

    def test_fetches_from_a_url(self, server: Server, commit: str) -> None:
        bare = server.directory / "blog.git"
        server.repository.git("clone", "--quiet", "--bare", ".", str(bare))
        for path in (bare, *bare.rglob("*")):
            shutil.chown(path, BUILDER)  # git reads nobody else's repository
        url = f"file://{bare}"
        assert server.build(commit, url=url)["changed"]
        missing = "f" * 40
        result = server.build(missing, "2-2", url=url)
        assert f"{url} has no commit {missing}." in result["msg"]

    def test_says_which_url_it_cannot_fetch_and_not_its_password(self, server: Server, commit: str) -> None:
        result = server.build(commit, url="http://deploy:hunter22@127.0.0.1:9/blog.git")
        assert "Cannot fetch http://deploy:********@127.0.0.1:9/blog.git; check release_repository" in result["msg"]
        assert "hunter22" not in result["msg"]


def ssh_key(directory: Path, name: str) -> tuple[Path, str]:
    """Make a key to sign with; returns its file, and the line that lets it sign."""
    file = directory / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", file], check=True)
    return file, f"{name}@example.org {file.with_suffix('.pub').read_text()}"


def openpgp_key(directory: Path, name: str) -> tuple[Path, str]:
    """Make an OpenPGP key; returns its home directory, and the public key."""
    home = directory / f"{name}.gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet"]
    make = [*gpg, "--passphrase", "", "--quick-generate-key", f"{name}@example.org", "ed25519", "sign", "never"]
    subprocess.run(make, check=True, capture_output=True)
    public = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True, text=True).stdout
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"], check=True)
    return home, public


class TestSignatures:
    """Commits that are only taken when somebody who may has signed them."""

    @pytest.fixture
    def keys(self) -> Iterator[Path]:
        """A directory with a path short enough for gpg-agent's socket."""
        with tempfile.TemporaryDirectory(prefix="hs-") as name:
            yield Path(name)

    def signed(self, server: Server, *options: str) -> str:
        """Commit with a signature; returns the sha."""
        server.repository.commit(CODE)
        configuration = [argument for option in options for argument in ("-c", option)]
        server.repository.git(*configuration, "commit", "--quiet", "--allow-empty", "-S", "-m", "Signed")
        return server.repository.git("rev-parse", "HEAD")

    def test_of_ssh(self, server: Server, keys: Path) -> None:
        ada, bob = ssh_key(keys, "ada"), ssh_key(keys, "bob")
        commit = self.signed(server, "gpg.format=ssh", f"user.signingKey={ada[0]}")
        result = server.build(commit, signers=[bob[1]])
        assert f"Commit {commit[:12]} is not signed by anyone in release_signers." in result["msg"]
        assert not server.release(RELEASE_ID).exists()
        assert server.build(commit, signers=[bob[1], ada[1]])["changed"]
        again = server.build(commit, signers=[bob[1]])
        assert "is not signed by anyone" in again["msg"], "that it was built before is no reason to take it"

    def test_of_openpgp(self, server: Server, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (home, ada), (_, bob) = openpgp_key(keys, "ada"), openpgp_key(keys, "bob")
        monkeypatch.setenv("GNUPGHOME", str(home))
        commit = self.signed(server, "gpg.format=openpgp", "user.signingKey=ada@example.org")
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"], check=True)
        assert "is not signed by anyone" in server.build(commit, signers=[bob])["msg"]
        assert server.build(commit, signers=[bob, ada])["changed"]

    def test_that_are_missing(self, server: Server, commit: str, keys: Path) -> None:
        result = server.build(commit, signers=[ssh_key(keys, "ada")[1]])
        assert "is not signed by anyone in release_signers" in result["msg"]
        assert "It has no signature." in result["msg"]
