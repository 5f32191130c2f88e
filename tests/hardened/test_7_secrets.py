"""Secrets are in the application's .env and nowhere else, whatever a deploy is asked to print and however it fails."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hardened.site import Server, Site
from tests.harness import APP, PROJECT, ROOT, Deploy, Repeated, Repository, add_routes
from tests.test_release_dotenv import PIECES

# What fails, each in its way, with the settings at hand: they are what it prints.
FAILURES: dict[str, dict[str, Any]] = {
    "migration": {"release_migrate_command": "sh -c 'cat .env; env; cat .env >&2; exit 3'"},
    "start": {"release_export_env": True, "release_module": "app.crash:app"},
    "installer": {
        "release_build_env": {
            "PIP_INDEX_URL": "https://ada:{build}@127.0.0.1:9/",
            "UV_INDEX_URL": "https://ada:{build}@127.0.0.1:9/",
        }
    },
}

CRASH = """import os, sys
from app.settings import Settings

print(dict(os.environ), open(".env").read(), file=sys.stderr, flush=True)
print(open(".env").read(), flush=True)
raise RuntimeError(f"cannot go on with {Settings(_env_file='.env').secret_key.get_secret_value()} and {os.environ}")
"""

STRINGS = '''@router.get("/strings")
async def strings() -> dict[str, str]:
    """Say what the settings are, as the application reads them."""
    from pydantic import create_model

    from app.settings import ENV_FILE, Settings

    fields = {f"v{number:04}": (str, ...) for number in range(1000)}
    return create_model("Strings", __base__=Settings, **fields)(_env_file=ENV_FILE).model_dump(include=set(fields))


'''


class Watch(Repeated):
    """All command lines of this machine, its servers' included, for as long as something takes."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(threads=1)
        self._words = [word.encode() for word in words]
        self.found: set[str] = set()

    def once(self) -> None:
        time.sleep(0.02)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if any(word in line for word in self._words):
                self.found.add(line.replace(b"\0", b" ").decode(errors="replace")[:200])


class Canaries:
    """Secrets that are looked for afterwards, in a file that is encrypted like the vault."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.all: list[str] = []

    def draw(self, **more: Any) -> tuple[str, str]:
        """Return the option that gives a deploy new secrets, and the one that the application gets."""
        names = [f"canary-{random.SystemRandom().getrandbits(200):x}" for _ in range(2)]
        self.all += names
        settings = {"vault_secret_key": names[0], **json.loads(json.dumps(more).replace("{build}", names[1]))}
        file = self._directory / f"canaries-{len(self.all)}.yml"
        # Encrypted before there is a file: whatever is found on the disk, it is not from here.
        subprocess.run(
            ["ansible-vault", "encrypt", "--output", str(file)],
            input=yaml.safe_dump(settings).encode(),
            check=True,
            capture_output=True,
            cwd=PROJECT,
        )
        return f"@{file}", names[0]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = Repository(tmp_path_factory.mktemp("developer") / "repository")
    add_routes(made)
    made.edit("Add a route", "app/posts.py", '@router.get("/{post_id}"', STRINGS + '@router.get("/{post_id}"')
    made.commit("Fail, and tell everything", {"app/crash.py": CRASH})
    return made


@contextmanager
def words_on(server: Server, words: list[str]) -> Iterator[str]:
    """Put what is looked for into a file on a server: on a command line a search would find itself."""
    path = "/run/hardstand-test-words"
    subprocess.run(
        ["podman", "exec", "-i", server.name, "sh", "-c", f"umask 077; cat >{path}"],
        input="\n".join(words).encode() + b"\n",
        check=True,
    )
    try:
        yield path
    finally:
        server.sh(f"rm {path}")


def places_on(server: Server, words: list[str]) -> list[str]:
    """Return where on a server any of the words is.

    But for the releases' own .env, and for the application's log: what it prints of itself is in there, for root.
    """
    with words_on(server, words) as file:
        found = server.sh(
            f"grep -rlaFf {file} --devices=skip --exclude-dir=proc --exclude-dir=sys / 2>/dev/null", check=False
        ).split("\n")
        places = [path for path in found if path and path != file]
        log = re.compile(rf"/var/log/supervisor/{APP}-[a-z]+\.log")
        env = re.compile(rf"{ROOT}/releases/[^/]+/\.env")
        allowed = [path for path in places if log.fullmatch(path) or env.fullmatch(path)]
        for path in allowed:
            assert server.sh(f"stat -c '%a %U' {path}") == "640 root"
        said = server.sh(f"journalctl --no-pager --output cat | grep -caFf {file}", check=False)
        processes = server.sh(f"grep -laFf {file} /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null", check=False)
    assert said in ("", "0"), "the journal has it"
    assert processes == ""
    return sorted(set(places) - set(allowed))


def places_here(words: list[str], *directories: Path) -> list[str]:
    """Return the files of the control node that any of the words is in."""
    command = ["grep", "-rlaF", "--devices=skip", "-f", "-", *(str(path) for path in directories if path.exists())]
    found = subprocess.run(command, input="\n".join(words), capture_output=True, text=True, check=False)
    return found.stdout.splitlines()


@pytest.mark.once
def test_nothing_shows_a_secret(site: Site, repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> None:
    canaries, outputs = Canaries(tmp_path_factory.mktemp("vault")), []
    loud = ("-vvv", "--diff")

    def play(*arguments: str, **settings: Any) -> Deploy:
        with Watch(canaries.all) as watch:
            done = site.play("deploy.yml", *arguments, *loud, release_repository=str(repository.path), **settings)
        assert watch.found == set()
        outputs.append(done.output)
        return done

    option, first = canaries.draw()
    done = play("-e", option)
    assert done.code == 0, done.output[-3000:]
    app = site.app
    assert first in app.sh(f"cat {ROOT}/current/.env")
    for what, settings in FAILURES.items():
        # Other dependencies, so that they are installed.
        requirements = (repository.path / "requirements.txt").read_text()
        repository.commit(f"Fail in {what}", {"requirements.txt": f"{requirements}\n"})
        option, _ = canaries.draw(**settings)
        done = play("--tags", "release", "-e", option)
        assert done.code != 0, what
        assert "The release that was live still serves" in done.output or "****" in done.output, done.output[-3000:]
    # Rotated in one deploy.
    option, last = canaries.draw()
    done = play("--tags", "release", "-e", option)
    assert done.code == 0, done.output[-3000:]
    assert last in app.sh(f"cat {ROOT}/current/.env")
    assert first not in app.sh(f"cat {ROOT}/current/.env")

    assert [word for word in canaries.all if any(word in output for output in outputs)] == []
    for server in site.servers.values():
        assert places_on(server, canaries.all) == []
    here = [Path.home() / ".cache" / "hardstand", Path.home() / ".ansible", PROJECT, repository.path]
    here += [Path(path) for path in site.inventories]
    assert places_here(canaries.all, *here) == []
    # The release that goes on is not that of the canaries.
    site.expect("deploy.yml", "--tags", "release")


@pytest.mark.once(on="debian12")
def test_a_thousand_strings_reach_the_application_unchanged(site: Site, repository: Repository, tmp_path: Path) -> None:
    chosen = random.Random(5)  # noqa: S311 - to be the same in every run
    strings = {f"V{number:04}": "".join(chosen.choices(PIECES, k=chosen.randint(1, 12))) for number in range(1000)}
    file = tmp_path / "strings.json"
    # What looks like a template is one, in any file of settings; these are strings.
    unsafe = {name: {"__ansible_unsafe": value} for name, value in strings.items()}
    file.write_text(json.dumps({"release_env": {"ENVIRONMENT": "test", **unsafe}}))
    site.deploy(repository, "-e", f"@{file}")
    try:
        reply = site.public.request("GET", "/api/posts/strings")
        assert reply.status == 200
        assert reply.json() == {name.lower(): value for name, value in strings.items()}
    finally:
        site.expect("deploy.yml", "--tags", "release")
