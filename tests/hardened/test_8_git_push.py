"""git push to a hardened fleet, with a server of it as control host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.hardened.site import ACCESS, Site
from tests.harness import Repository
from tests.pusher import Pusher

WHO = "kim"


@pytest.mark.once
def test_who_pushes_deploys_and_gets_no_further(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("pusher")
    server = site.app
    control = directory / "control.yml"
    control.write_text(f"control: {{hosts: {{{server.name}: }}}}\n")
    repository = Repository(directory / "repository")
    pusher = Pusher(WHO, repository, directory, server.address, 22, ACCESS / "known_hosts")
    # Settings of its own: the site is every test's.
    host = replace(site, inventories=[*site.inventories, str(control)], settings={**site.settings, **pusher.settings})

    host.expect("playbooks/git_push.yml")
    again = host.play("playbooks/git_push.yml")
    assert (again.code, again.changed) == (0, 0), again.output

    commit = repository.commit("By push")
    push = pusher.push()
    assert push.wait() == 0, push.output
    assert pusher.branch() == commit
    record = server.records()[-1]
    assert (record["who"], record["release"][:8]) == (WHO, commit[:8])

    repository.edit("Break it", "app/main.py", "import logging\n", "import logging\nimport no_such_module\n")
    push = pusher.push()
    assert push.wait() != 0
    assert "No module named 'no_such_module'" in push.output, push.output
    assert pusher.branch() == commit

    # The key pushes, and opens nothing else; administrators still get in, and root does not.
    assert "uid=" not in pusher.run("id").stdout
    assert server.ssh("sudo -n id -un").stdout == "root\n"
    assert server.ssh("true", user="root").returncode == 255
