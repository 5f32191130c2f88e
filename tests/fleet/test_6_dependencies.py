"""One set of dependencies on all servers, whatever is published while a deploy runs."""

from __future__ import annotations

import pytest

from tests.fleet.fleet import Fleet
from tests.harness import ROOT, Repository


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_new_requirements_are_the_same_everywhere(fleet: Fleet, repository: Repository) -> None:
    def lock_files() -> set[str]:
        return {server.sh(f"cat {ROOT}/current/requirements.lock") for server in fleet.apps.values()}

    def virtualenvs() -> set[str]:
        # Named by what is in it and by the Python that it is for, which differs between releases of Debian at most.
        return {server.sh(f"readlink {ROOT}/current/.venv") for server in fleet.apps.values()}

    old_lock, old_venvs = lock_files(), virtualenvs()
    assert len(old_lock) == 1
    path = repository.path / "requirements.txt"
    path.write_text(path.read_text() + "sniffio==1.3.1\n")
    repository.commit("Depend on more")
    fleet.deploy(repository)
    new_lock = lock_files()
    assert len(new_lock) == 1
    assert "sniffio==1.3.1" in next(iter(new_lock))
    assert virtualenvs().isdisjoint(old_venvs)
    fleet.check_whole()

    # Code alone: nothing is resolved, nothing installed.
    venvs = virtualenvs()
    repository.commit("Change code only")
    fleet.deploy(repository)
    assert (lock_files(), virtualenvs()) == (new_lock, venvs)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("release")
def test_a_new_server_gets_the_set_that_the_others_have(fleet: Fleet, repository: Repository) -> None:
    *others, last = fleet.apps.values()
    # The others' set is from a time when something that nobody pins had another version, and the last one came later.
    for server in others:
        # Without the hashes, which are another version's.
        edit = r"sed -i -e '/--hash=/d' -e 's/ \\$//' -e 's/^click==.*/click==8.1.7/'"
        server.sh(f"grep -l '^click==' {ROOT}/venvs/.locks/* | xargs {edit}")
    last.sh(f"rm -rf {ROOT}/venvs/.locks")
    repository.commit("With a server that is new")
    fleet.deploy(repository)
    locks = {server.sh(f"grep '^click==' {ROOT}/current/requirements.lock") for server in fleet.apps.values()}
    assert locks == {"click==8.1.7"}
    for server in fleet.apps.values():
        assert server.sh(f"{ROOT}/current/.venv/bin/python -c 'import click; print(click.__version__)'") == "8.1.7"
    fleet.check_whole()
    # Leave what is resolved today.
    for server in fleet.apps.values():
        server.sh(f"rm -rf {ROOT}/venvs/.locks")
    repository.commit("Resolve anew")
    fleet.deploy(repository)
    assert len({server.sh(f"cat {ROOT}/current/requirements.lock") for server in fleet.apps.values()}) == 1
