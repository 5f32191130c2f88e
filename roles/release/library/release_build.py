#!/usr/bin/python
"""Ansible module: build a release on this host, ready to run, without touching what runs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import tempfile
import time
import typing as t
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.host_files import write_file
from ansible.module_utils.release_host import (
    Account,
    Layout,
    Mask,
    ReleaseError,
    account,
    busy,
    give_to_root,
    group_id,
    last_lines,
    parse_dotenv,
    read_pending,
    record_failure,
    remove_tree,
    run,
)

DOCUMENTATION = r"""
module: release_build
short_description: Build a release of an application on this host
description:
  - Brings a commit into the host's mirror, checks it out, installs its dependencies into a virtualenv that releases
    with the same dependencies share, compiles bytecode, and writes C(.env) and the start settings.
  - A release appears under its name in one rename(2), complete, or not at all. What runs is not touched.
  - Called by the action plugin of the same name, which renders the files and ships the commit.
options:
  app: {description: Name of the application., type: str, required: true}
  root: {description: Directory of the application on this host., type: path, required: true}
  release_id: {description: "C(<short sha>-<config digest>).", type: str, required: true}
  commit: {description: Full sha of the commit., type: str, required: true}
  url: {description: Git URL to fetch the commit from; empty when the control node ships it., type: str, default: ""}
  pack: {description: "What is new of the repository: a git pack, base64.", type: str, default: ""}
  pack_file: {description: The same in a file on this host, for large ones., type: path}
  pack_fits: {description: "The pack answers O(have): one that does not fit is an error.", type: bool, default: false}
  deploy_key: {description: Private ssh key for O(url)., type: str, default: ""}
  known_hosts: {description: known_hosts lines for O(url)., type: list, elements: str, default: []}
  signers:
    description: Who may sign commits, as lines of ssh's allowed_signers or as OpenPGP public keys. Empty asks for none.
    type: list
    elements: str
    default: []
  subdirectory: {description: Directory of the application inside the repository., type: str, default: ""}
  python: {description: Interpreter that makes the virtualenv., type: path, required: true}
  python_path: {description: Directories of the application on Python's path., type: list, elements: str, default: []}
  installer: {description: What installs., type: str, choices: [uv, pip], default: uv}
  uv: {description: uv's executable., type: path, default: /opt/uv/bin/uv}
  wheel_directory: {description: Directory of wheels to install from instead of an index., type: str, default: ""}
  build_env: {description: "Environment of git and the installer, encoded like O(dotenv).", type: str, default: ""}
  build_timeout: {description: Seconds for an installation., type: int, default: 900}
  may_resolve:
    description: Whether this host decides on the full set of dependencies where the repository does not.
    type: bool
    default: true
  dependencies:
    description: The full set of dependencies that the fleet has decided on, as lines of a requirements file.
    type: str
    default: ""
  worker_class: {description: gunicorn worker class., type: str, required: true}
  dotenv: {description: Content of .env., type: str, required: true}
  secret_names: {description: Names in .env whose values are never shown., type: list, elements: str, default: []}
  files: {description: "Start settings: name to content.", type: dict, required: true}
  settings: {description: What later phases need to know of this release., type: dict, required: true}
  build_user: {description: Account that runs git and the installer., type: str, required: true}
  user: {description: Account that runs the application., type: str, required: true}
  proxy_group: {description: Group of the reverse proxy., type: str, required: true}
  deploy: {description: Who deploys; for deploys.jsonl., type: dict, required: true}
"""

RETURN = r"""
release_id: {description: The release., type: str, returned: always}
live: {description: Whether it serves already., type: bool, returned: always}
missing_commit: {description: The commit is neither here nor shipped., type: bool, returned: always}
have: {description: Commits that a pack may build upon., type: list, returned: when missing_commit}
dependencies: {description: "C(installed) or C(unchanged).", type: str, returned: success}
missing_dependencies: {description: "The set is for another host to decide on.", type: bool, returned: always}
dependency_set: {description: What tells one full set of dependencies from another., type: str, returned: success}
resolved: {description: Whether the set was decided on just now., type: bool, returned: success}
subject: {description: First line of the commit's message., type: str, returned: success}
"""

_OLDEST_GUNICORN = (20, 1)

# Run with the virtualenv's Python: prints gunicorn's version, and last, when something is missing, what and why.
_CHECK_SERVER = """
import sys
try:
    import gunicorn
except ImportError:
    sys.exit("gunicorn")
print(gunicorn.__version__, flush=True)
try:
    from gunicorn.util import load_class
except ImportError as error:
    sys.exit(f"something that this gunicorn needs ({error})")
try:
    load_class(sys.argv[1])
except Exception as error:
    # gunicorn puts a traceback into its message; the cause in one line is what helps.
    cause = " ".join(str(error.__context__ or error).split())
    sys.exit(f"worker class {sys.argv[1]} ({cause})")
"""


class NoDependenciesError(Exception):
    """The set of dependencies is for another host to decide on."""


def set_name(lock: str) -> str:
    """Return what tells one full set of dependencies from another."""
    return hashlib.sha256(lock.encode()).hexdigest()[:16]


class Build:
    """One build of one release."""

    resolved = False

    def __init__(self, module: AnsibleModule) -> None:
        self.p: dict[str, t.Any] = module.params
        self.layout = Layout(self.p["root"], self.p["app"])
        self.directory = self.layout.releases / self.p["release_id"]
        self.work = self.layout.releases / f".{self.p['release_id']}.new"
        self.source = self.work / self.p["subdirectory"]
        secrets = [parse_dotenv(self.p["dotenv"]).get(name, "") for name in self.p["secret_names"]]
        self.build_env = parse_dotenv(self.p["build_env"])
        self.mask = Mask([*secrets, *self.build_env.values()], [self.p["url"]])

    @cached_property
    def builder(self) -> Account:
        """Return the account that runs git and the installer.

        Raises:
            ReleaseError: there is none of that name.
        """
        return account(self.p["build_user"])

    # Directories and the commit

    def make_directories(self) -> None:
        """Make what all releases share, with the owners that keep the accounts apart."""
        self.user = account(self.p["user"])
        proxy = group_id(self.p["proxy_group"])
        root = self.layout
        for path, mode, uid, gid in (
            (root.root, 0o755, 0, 0),
            (root.releases, 0o755, 0, 0),
            (root.venvs, 0o755, 0, 0),
            (root.cache, 0o750, self.builder.uid, self.builder.gid),
            (root.repository, 0o750, self.builder.uid, self.builder.gid),
            (root.shared, 0o750, self.user.uid, self.user.gid),
            # gunicorn's sockets are open to all; this directory is what keeps everyone else out.
            (root.run, 0o750, self.user.uid, proxy),
        ):
            path.mkdir(exist_ok=True)
            stat = path.stat()
            if (stat.st_uid, stat.st_gid) != (uid, gid):
                os.chown(path, uid, gid)
            if stat.st_mode & 0o7777 != mode:
                path.chmod(mode)

    def git(self, *arguments: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> str:
        """Run git in the mirror, as the build account; returns its standard output.

        Raises:
            ReleaseError: git failed; with what it said.
        """
        result = run(
            ["git", f"--git-dir={self.layout.repository}", *arguments],
            user=self.builder,
            cwd=self.layout.cache,
            stdin=stdin,
            env={"HOME": str(self.layout.cache), "GIT_TERMINAL_PROMPT": "0", **self.build_env, **(env or {})},
            timeout=self.p["build_timeout"],
        )
        if result.returncode:
            verb = next(argument for argument in arguments if argument[0].isalpha())
            raise ReleaseError(f"git {verb} failed.\n{self.tail(result.stderr, 15)}")
        return str(result.stdout)

    def tail(self, text: str, count: int) -> str:
        """Return the last `count` lines of a program's output, with the secrets masked."""
        return str(last_lines(self.mask(text), count))

    def has_commit(self) -> bool:
        """Return whether the commit is here with all it needs; a pack is taken whole or not at all."""
        try:
            self.git("cat-file", "-e", f"{self.p['commit']}^{{tree}}")
        except ReleaseError:
            return False
        return True

    def bring_commit(self) -> bool:
        """Get the commit into the mirror; returns False when the control node has to ship (more of) it."""
        if not (self.layout.repository / "HEAD").exists():
            self.git("init", "--quiet", "--bare", str(self.layout.repository))
        elif self.has_commit():
            return True
        if self.p["url"]:
            self.fetch()
            if not self.has_commit():
                raise ReleaseError(f"{self.mask(self.p['url'])} has no commit {self.p['commit']}.")
            return True
        if self.p["pack_file"]:
            data = Path(self.p["pack_file"]).read_bytes()
        elif self.p["pack"]:
            data = base64.b64decode(self.p["pack"])
        else:
            return False
        try:
            self.git("index-pack", "--stdin", "--fix-thin", stdin=data)
        except ReleaseError:
            if self.p["pack_fits"]:
                raise
            return False  # It builds upon something that is no longer here.
        if not self.has_commit():
            return False
        # A ref keeps the commit from git's garbage collection, and tells the next deploy what is here.
        self.git("update-ref", f"refs/releases/{self.p['commit']}", self.p["commit"])
        # Each deploy adds a pack. Whatever git finds wrong with tidying up, the commit is here.
        with suppress(ReleaseError):
            self.git("gc", "--auto", "--quiet")
        return True

    def fetch(self) -> None:
        """Fetch branches and tags from the repository's URL, with the deploy key in an agent and on no disk."""
        known = self.layout.cache / "known_hosts"
        trust = "accept-new"
        if self.p["known_hosts"]:
            write_file(known, "\n".join(self.p["known_hosts"]) + "\n", 0o640, self.builder.uid, self.builder.gid)
            trust = "yes"
        ssh = f"ssh -o BatchMode=yes -o StrictHostKeyChecking={trust} -o UserKnownHostsFile={shlex.quote(str(known))}"
        fetch = [
            "git",
            f"--git-dir={self.layout.repository}",
            "fetch",
            "--quiet",
            "--prune",
            self.p["url"],
            "+refs/heads/*:refs/heads/*",
            "+refs/tags/*:refs/tags/*",
        ]
        key = None
        if self.p["deploy_key"]:
            key = (self.p["deploy_key"].rstrip("\n") + "\n").encode()
            fetch = ["ssh-agent", "sh", "-c", 'ssh-add -q - && exec "$@" </dev/null', "sh", *fetch]
        result = run(
            fetch,
            user=self.builder,
            cwd=self.layout.cache,
            stdin=key,
            env={
                "HOME": str(self.layout.cache),
                "GIT_TERMINAL_PROMPT": "0",
                "GIT_SSH_COMMAND": ssh,
                **self.build_env,
            },
            timeout=self.p["build_timeout"],
        )
        if result.returncode:
            raise ReleaseError(
                f"Cannot fetch {self.mask(self.p['url'])}; check release_repository and release_deploy_key.\n"
                f"{self.tail(result.stderr, 15)}"
            )

    def have(self) -> list[str]:
        """Return commits that a pack may build upon."""
        return str(self.git("for-each-ref", "--format=%(objectname)", "refs/releases")).split()

    def verify(self) -> None:
        """Refuse a commit that none of the signers has signed. It vouches for its files and for its ancestors.

        Raises:
            ReleaseError: there is no signature, or it is nobody's who may sign.
        """
        if not self.p["signers"]:
            return
        openpgp = [key for key in self.p["signers"] if "BEGIN PGP PUBLIC KEY BLOCK" in key]
        lines = [line for line in self.p["signers"] if line not in openpgp]
        with tempfile.TemporaryDirectory(prefix="hardstand-signers-") as name:
            # Only what is in here counts: no key that the account, or an earlier deploy, has come by.
            os.chown(name, self.builder.uid, self.builder.gid)
            allowed = Path(name) / "allowed_signers"
            write_file(allowed, "".join(f"{line.strip()}\n" for line in lines), 0o644)
            env = {"GNUPGHOME": name}
            if openpgp:
                self.take_keys(openpgp, env)
            try:
                # For OpenPGP git is content with any key of the key ring; for ssh it wants a principal of that file.
                self.git("-c", f"gpg.ssh.allowedSignersFile={allowed}", "verify-commit", self.p["commit"], env=env)
            except ReleaseError as error:
                said = str(error).partition("\n")[2] or "It has no signature."
                raise ReleaseError(
                    f"Commit {self.p['commit'][:12]} is not signed by anyone in release_signers.\n{said}"
                ) from error

    def take_keys(self, keys: list[str], env: dict[str, str]) -> None:
        """Put OpenPGP keys into a key ring of this check's own."""
        try:
            result = run(
                ["gpg", "--batch", "--quiet", "--no-autostart", "--import"],
                user=self.builder, cwd=self.layout.cache, stdin="\n".join(keys).encode(), env=env, timeout=60,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ReleaseError(
                "release_signers has OpenPGP keys, and the server has no gpg: add gpg to base_packages."
            ) from error
        if result.returncode:
            raise ReleaseError(f"gpg does not take the keys in release_signers.\n{self.tail(result.stderr, 5)}")

    def check_out(self) -> str:
        """Write the commit's files into the work directory; returns the commit's subject."""
        remove_tree(self.work)
        self.work.mkdir(mode=0o755)
        os.chown(self.work, self.builder.uid, self.builder.gid)
        # In the work directory, so that of a run that is cut off neither the index nor git's lock on it is in the way.
        file = self.work / ".hardstand-index"
        index = {"GIT_INDEX_FILE": str(file)}
        self.git("read-tree", self.p["commit"], env=index)
        self.git("-C", str(self.work), f"--work-tree={self.work}", "checkout-index", "--all", env=index)
        file.unlink()
        if not self.source.is_dir() or not self.is_inside(self.source):
            raise ReleaseError(
                f"Commit {self.p['commit'][:12]} has no directory {self.p['subdirectory']}; "
                "set release_subdirectory to one that it has."
            )
        # Not "-1": that looks at the parents, which the shallow clone of a CI job has not got.
        said = self.git("log", "--no-walk", "--format=%ct %s", self.p["commit"])
        when, _, subject = said.strip().partition(" ")
        # The commit's time on every file: nginx makes ETags of it, and all hosts must give the same.
        for directory, _, names in os.walk(self.work):
            for name in names:
                os.utime(Path(directory) / name, (int(when), int(when)), follow_symlinks=False)
        return subject

    def is_inside(self, path: Path) -> bool:
        """Return whether a path stays in the checkout. We read as root: a commit's links must not lead elsewhere."""
        return bool(path.resolve().is_relative_to(self.work.resolve()))

    def has_file(self, path: Path) -> bool:
        """Return whether the commit has this file."""
        return path.is_file() and self.is_inside(path)

    # Dependencies

    def installer_env(self) -> dict[str, str]:
        """Return the environment of uv and pip: the system's certificates, caches of their own, no other Python."""
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        env = {
            "HOME": str(self.layout.cache),
            "UV_CACHE_DIR": str(self.layout.cache / "uv"),
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_PROGRESS": "1",
            "PIP_CACHE_DIR": str(self.layout.cache / "pip"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
        }
        if Path(bundle).exists():
            env |= {"SSL_CERT_FILE": bundle, "PIP_CERT": bundle}
        env |= self.build_env
        return env

    def install(self, *command: str, what: str) -> str:
        """Run a step of the installer in the application's directory, as the build account; returns its output."""
        result = run(
            command, user=self.builder, cwd=self.source, env=self.installer_env(), timeout=self.p["build_timeout"]
        )
        if result.returncode:
            raise ReleaseError(f"{what}\n{self.tail(result.stderr or result.stdout, 20)}")
        return str(result.stdout)

    def index_options(self) -> list[str]:
        """Return the installer's options for where packages come from."""
        wheels = self.p["wheel_directory"]
        return ["--no-index", "--find-links", wheels] if wheels else []

    def requirements(self, path: Path, seen: set[Path]) -> t.Iterator[bytes]:
        """Yield the content of a requirements file and of all that it includes."""
        path = path.resolve()
        if path in seen or not self.has_file(path):
            return
        seen.add(path)
        content = path.read_bytes()
        yield content
        for name in re.findall(rb"(?m)^\s*(?:-r|-c|--requirement|--constraint)[ =]*(\S+)", content):
            yield from self.requirements(path.parent / os.fsdecode(name), seen)

    def resolve(self, version: str) -> str:
        """Return the full set of dependencies, as lines of a requirements file.

        The same declared dependencies give the same set for ever after: it is kept, and so a deploy that changes only
        code installs nothing, whatever was published meanwhile. In a fleet one host decides, and all have its set.

        Raises:
            NoDependenciesError: that is not us, and we have not been told.
            ReleaseError: nothing says what the application needs, or it cannot be had.
        """
        uv_lock, project = self.source / "uv.lock", self.source / "pyproject.toml"
        frozen, declared = self.source / "requirements.lock", self.source / "requirements.txt"
        if self.has_file(frozen):
            return str(frozen.read_text(encoding="utf-8"))
        exported = self.has_file(uv_lock) and self.has_file(project)
        if exported:
            inputs = [uv_lock.read_bytes(), project.read_bytes()]
        elif self.has_file(declared):
            inputs = list(self.requirements(declared, set()))
        else:
            where = self.p["subdirectory"] or "the repository's root"
            raise ReleaseError(
                f"There is no requirements.txt, and no pyproject.toml with uv.lock, in {where} "
                f"of commit {self.p['commit'][:12]}; add one, or set release_subdirectory."
            )
        key = hashlib.sha256(b"\0".join([version.encode(), self.p["installer"].encode(), *inputs])).hexdigest()[:16]
        # Beside the virtualenvs, which are root's: in the cache a package's build step could plant a link.
        kept = self.layout.venvs / ".locks" / f"{key}.txt"
        text: str = self.p["dependencies"]
        if not text:
            if kept.is_file():
                return str(kept.read_text(encoding="utf-8"))
            if not self.p["may_resolve"]:
                raise NoDependenciesError
            text = self.resolve_anew(exported)
            self.resolved = True
        kept.parent.mkdir(exist_ok=True)
        write_file(kept, text, 0o644)
        return text

    def resolve_anew(self, exported: bool) -> str:
        """Ask the installer for the full set."""
        what = "The dependencies cannot be resolved."
        if exported:
            return self.install(
                self.p["uv"], "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-header",
                "--python", self.p["python"], what=what,
            )  # fmt: skip
        if self.p["installer"] == "uv":
            return self.install(
                self.p["uv"], "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes",
                "--python", self.p["python"], *self.index_options(), "requirements.txt", what=what,
            )  # fmt: skip
        report = self.install(
            self.p["python"], "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-",
            *self.index_options(), "-r", "requirements.txt", what=what,
        )  # fmt: skip
        pinned = {}
        for item in json.loads(report)["install"]:
            archive = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
            pinned[f"{item['metadata']['name']}=={item['metadata']['version']}"] = archive
        # pip wants hashes for all or for none, and tells none for a wheel in a directory.
        if not all(pinned.values()):
            return "".join(f"{line}\n" for line in sorted(pinned))
        return "".join(f"{line} --hash=sha256:{archive}\n" for line, archive in sorted(pinned.items()))

    def virtualenv(self) -> tuple[Path, str, str]:
        """Return the virtualenv for this commit's dependencies, what was done for it, and the resolved set."""
        if not os.access(self.p["python"], os.X_OK):
            raise ReleaseError(
                f"There is no Python at {self.p['python']}; role python installs it: run without --tags."
            )
        # The directory behind pyenv's link: an application stays on the very build that it was made with.
        python = Path(self.p["python"])
        self.p["python"] = str(python.parent.resolve() / python.name)
        version = self.p["python"] + "\n" + run([self.p["python"], "-VV"], user=self.builder).stdout
        lock = self.resolve(version)
        directory = self.layout.venvs / hashlib.sha256(f"{version}\n{lock}".encode()).hexdigest()[:16]
        mark = directory / ".complete"
        if mark.exists():
            self.check_server(directory, mark)
            return directory, "unchanged", lock
        remove_tree(directory)
        directory.mkdir(mode=0o755)
        os.chown(directory, self.builder.uid, self.builder.gid)
        try:
            self.fill(directory, lock)
            give_to_root(directory)
            write_file(mark, "{}", 0o644)
            self.check_server(directory, mark)
        except BaseException:
            remove_tree(directory)
            raise
        return directory, "installed", lock

    def fill(self, directory: Path, lock: str) -> None:
        """Make the virtualenv and install the resolved set into it."""
        file = self.work / ".requirements.lock"
        write_file(file, lock, 0o644)
        what = "The dependencies cannot be installed."
        if self.p["installer"] == "uv":
            self.install(
                self.p["uv"], "venv", "--quiet", "--allow-existing", "--python", self.p["python"], str(directory),
                what=what,
            )  # fmt: skip
            # Copies, not links into the cache: the cache belongs to the build account, the virtualenv must not.
            self.install(
                self.p["uv"], "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--link-mode", "copy",
                "--python", f"{directory}/bin/python", *self.index_options(), "-r", str(file), what=what,
            )  # fmt: skip
        else:
            self.install(self.p["python"], "-m", "venv", str(directory), what=what)
            self.install(
                f"{directory}/bin/python", "-m", "pip", "install", "--quiet", "--no-deps",
                *self.index_options(), "-r", str(file), what=what,
            )  # fmt: skip
        file.unlink()

    def check_server(self, directory: Path, mark: Path) -> None:
        """Refuse, by name, dependencies that cannot serve; once for each virtualenv and worker class."""
        checked = json.loads(mark.read_text(encoding="utf-8"))
        worker_class = self.p["worker_class"]
        if worker_class in checked.get("worker_classes", []):
            return
        paths = [str(self.source), *(str(self.source / name) for name in self.p["python_path"])]
        result = run(
            [f"{directory}/bin/python", "-c", _CHECK_SERVER, worker_class],
            user=self.builder,
            cwd=self.source,
            env={"PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
            timeout=60,
        )
        version = result.stdout.partition("\n")[0]
        if version and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST_GUNICORN:
            raise ReleaseError(
                f"The application's dependencies have gunicorn {version}; 20.1 is the oldest that is served."
            )
        if result.returncode:
            missing = self.tail(result.stderr, 1)
            raise ReleaseError(
                f"The application's dependencies lack {missing}: add it to its requirements"
                + ("." if missing == "gunicorn" else ", or set release_worker_class.")
            )
        checked["worker_classes"] = [*checked.get("worker_classes", []), worker_class]
        write_file(mark, json.dumps(checked), 0o644)

    # The release

    def present_set(self) -> str | None:
        """Return which dependencies the release has; None when it is to be built."""
        if self.layout.release(self.p["release_id"]) is None:
            return None
        present = set_name((self.directory / "requirements.lock").read_text(encoding="utf-8"))
        pending = read_pending(self.layout) or {}
        in_use = self.p["release_id"] in (self.layout.live_release(), pending.get("to"), pending.get("from"))
        # Built with another set than the fleet's, by a deploy that went no further.
        if self.p["dependencies"] and present != set_name(self.p["dependencies"]) and not in_use:
            return None
        return present

    def build(self) -> dict[str, t.Any]:
        """Build the release; returns what the module returns.

        Raises:
            ReleaseError: it cannot be built; nothing of it is left.
        """
        self.make_directories()
        if not self.bring_commit():
            return {"missing_commit": True, "have": self.have()}
        self.verify()
        started = time.monotonic()
        try:
            subject = self.check_out()
            venv, dependencies, lock = self.virtualenv()
            # A file that does not compile may be a template of one; what the application imports fails at its start.
            run(
                [
                    f"{venv}/bin/python", "-m", "compileall", "-q", "-x", r"/(\.venv|node_modules)/",
                    "-s", str(self.work), "-p", str(self.directory), str(self.source),
                ],
                user=self.builder,
            )  # fmt: skip
            self.seal(venv, lock, subject)
            remove_tree(self.directory)
            self.work.rename(self.directory)
        except NoDependenciesError:
            return {"missing_commit": False, "missing_dependencies": True}
        finally:
            remove_tree(self.work)
        return {
            "missing_commit": False,
            "missing_dependencies": False,
            "dependency_set": set_name(lock),
            "resolved": self.resolved,
            "subject": subject,
            "dependencies": dependencies,
            "seconds": round(time.monotonic() - started, 2),
        }

    def seal(self, venv: Path, lock: str, subject: str) -> None:
        """Give the files to root and add what makes a checkout a release."""
        give_to_root(self.work)
        start = self.work / ".hardstand"
        # The names are ours; whatever the commit has there, directories and links among it, goes.
        ours = [self.work / name for name in (".venv", ".env", "requirements.lock", "release.json")]
        for path in (*ours, start, self.source / ".env"):
            remove_tree(path)
        (self.work / ".venv").symlink_to(f"../../venvs/{venv.name}")
        write_file(self.work / ".env", self.p["dotenv"], 0o640, 0, self.user.gid)
        if self.source != self.work:
            # Up as many levels as it lies deep; the place has another name while it is built.
            depth = len(self.source.resolve().relative_to(self.work.resolve()).parts)
            (self.source / ".env").symlink_to("../" * depth + ".env")
        write_file(self.work / "requirements.lock", lock, 0o644)
        start.mkdir()
        for name, content in self.p["files"].items():
            write_file(start / name, content, 0o644)
        release = {
            "release": self.p["release_id"],
            "commit": self.p["commit"],
            "subject": subject,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "venv": venv.name,
            "secret_names": self.p["secret_names"],
            **self.p["settings"],
        }
        write_file(self.work / "release.json", json.dumps(release, indent=1) + "\n", 0o644)

    def diff(self) -> dict[str, str]:
        """Return what changes for `--diff`: the release, and the names of the settings that differ, no values."""
        old_id = self.layout.live_release()
        before, after = [f"release {old_id}"] if old_id else [], [f"release {self.p['release_id']}"]
        old: dict[str, str] = {}
        if old_id:
            with suppress(FileNotFoundError):
                old = parse_dotenv((self.layout.releases / old_id / ".env").read_text(encoding="utf-8"))
        new = parse_dotenv(self.p["dotenv"])
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                before += [f"{name} (old value)"] if name in old else []
                after += [f"{name} (new value)"] if name in new else []
        return {
            "before": "\n".join(before) + "\n" if before else "",
            "after": "\n".join(after) + "\n",
            "before_header": str(self.layout.current),
            "after_header": str(self.directory),
        }


def main() -> None:
    """Run the module."""
    os.umask(0o022)  # whatever the session has
    module = AnsibleModule(
        argument_spec={
            "app": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "release_id": {"type": "str", "required": True},
            "commit": {"type": "str", "required": True},
            "url": {"type": "str", "default": ""},
            "pack": {"type": "str", "default": "", "no_log": True},
            "pack_file": {"type": "path"},
            "pack_fits": {"type": "bool", "default": False},
            "deploy_key": {"type": "str", "default": "", "no_log": True},
            "known_hosts": {"type": "list", "elements": "str", "default": []},
            "signers": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "subdirectory": {"type": "str", "default": ""},
            "python": {"type": "path", "required": True},
            "python_path": {"type": "list", "elements": "str", "default": []},
            "installer": {"type": "str", "choices": ["uv", "pip"], "default": "uv"},
            "uv": {"type": "path", "default": "/opt/uv/bin/uv"},
            "wheel_directory": {"type": "str", "default": ""},
            "build_env": {"type": "str", "default": "", "no_log": True},
            "build_timeout": {"type": "int", "default": 900},
            "may_resolve": {"type": "bool", "default": True},
            "dependencies": {"type": "str", "default": ""},
            "worker_class": {"type": "str", "required": True},
            "dotenv": {"type": "str", "required": True, "no_log": True},
            "secret_names": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "files": {"type": "dict", "required": True},
            "settings": {"type": "dict", "required": True},
            "build_user": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "proxy_group": {"type": "str", "required": True},
            "deploy": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    build = Build(module)
    release_id = build.p["release_id"]
    live = build.layout.live_release() == release_id
    result: dict[str, t.Any] = {"release_id": release_id, "live": live, "missing_commit": False}
    result["missing_dependencies"] = False
    try:
        if (present := build.present_set()) is not None:
            build.verify()  # Who may sign may have changed since it was built.
            module.exit_json(changed=False, dependencies="unchanged", dependency_set=present, resolved=False, **result)
        result["diff"] = build.diff()
        if module.check_mode:
            module.exit_json(changed=True, **result)
        with busy(build.layout):
            result |= build.build()
    except (ReleaseError, OSError) as error:
        record_failure(build.layout, build.p["deploy"], release_id, "build", str(error))
        module.fail_json(msg=f"{error}\nThe release that was live still serves.", **result)
    module.exit_json(changed=not (result["missing_commit"] or result["missing_dependencies"]), **result)


if __name__ == "__main__":
    main()
