"""Backups that are made, checked and restored, and those that are not."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time

import pytest

from tests.data.site import ARCHIVE_TIMEOUT, BACKUP, CHECK_UNIT, RESTORE, RESTORE_CHECK, STATUS, Site, Writers
from tests.harness import APP, PROJECT, wait_for


@pytest.fixture(scope="module")
def backed_up(site: Site) -> Site:
    """An environment of which there is a backup."""
    run = site.expect(BACKUP)
    state = site.backup_state()
    assert state["last"]["ok"], state
    assert state["last"]["label"] in run.output
    assert site.repository() in run.output
    return site


def test_a_backup_is_encrypted(backed_up: Site) -> None:
    backed_up.post("A title that nobody is to find")
    backed_up.expect(BACKUP)
    path = backed_up.repository()
    assert backed_up.backups.sh(f"find {path} -type f | head -1") != ""
    found = backed_up.backups.sh(f"grep -rl 'nobody is to find' {path} || true")
    assert found == ""
    # What is encrypted begins with how it was salted, as OpenSSL has it.
    heads = backed_up.backups.sh(f"find {path} -name '*.zst' -type f -exec sh -c 'head -c 8 {{}}; echo' \\; | sort -u")
    assert heads == "Salted__"


def test_status_tells_of_it(backed_up: Site) -> None:
    # The last deploy was one that had to fail.
    backed_up.expect("deploy.yml", "--tags", "release", release_env={"ENVIRONMENT": "test", "AFTER": "a failure"})
    run = backed_up.expect(STATUS)
    assert "backup" in run.output.lower()
    assert "WAL archived" in run.output


def test_to_between_two_writes(backed_up: Site) -> None:
    site = backed_up
    site.post("The first")
    moment = site.psql("SELECT clock_timestamp()")
    time.sleep(1)  # the moment has to lie between the two
    site.post("The second")
    kept = site.db.sh("ls /var/lib/postgresql/*")
    run = site.expect(RESTORE, restore_to=moment, restore_confirm=APP)
    site.wait_until_ready(30)
    titles = site.titles()
    assert "The first" in titles
    assert "The second" not in titles
    assert site.app.request("GET", "/api/posts?limit=5").status == 200
    # What there was is kept until told otherwise.
    now = site.db.sh("ls /var/lib/postgresql/*")
    assert len(now.split()) == len(kept.split()) + 1, now
    assert "main.before-" in run.output
    # Writing and archiving go on.
    site.post("After the restore")
    site.expect(BACKUP)
    kept_data = re.findall(r"main\.before-[0-9TZ-]+", run.output)[0]
    site.expect(RESTORE, restore_discard=kept_data, restore_confirm=APP)
    assert site.db.sh("ls /var/lib/postgresql/*").split() == kept.split()


def test_beside_the_service(backed_up: Site) -> None:
    site = backed_up
    site.post("In both")
    run = site.expect(RESTORE, restore_to="latest", restore_into="beside", restore_confirm=APP)
    site.post("In the service alone")
    # Ansible breaks long lines.
    command = re.search(r"psql -h \S+\s+-p \d+ \w+", run.output)
    assert command, run.output
    said = site.db.sh(f"cd / && runuser -u postgres -- {' '.join(command[0].split())} -XAtc 'SELECT title FROM posts'")
    assert "In both" in said
    assert "In the service alone" not in said
    site.expect(RESTORE, restore_discard="beside", restore_confirm=APP)
    assert site.db.pids(r"postgres.* -D") == site.db.pids(r"postgres.* -D /var/lib/postgresql/\d+/main")


def test_the_newest_backup_is_restored_on_trial(backed_up: Site) -> None:
    run = backed_up.expect(RESTORE_CHECK)
    assert "posts" in run.output
    assert backed_up.psql("SELECT version_num FROM alembic_version") in run.output
    assert backed_up.backup_state(backed_up.db)["restore_check"]["ok"]


@pytest.mark.once
def test_nothing_is_restored_without_a_confirmation(backed_up: Site) -> None:
    before = backed_up.titles()
    for confirmation in ({}, {"restore_confirm": "another"}):
        run = backed_up.refuse(RESTORE, restore_to="latest", **confirmation)
        assert "restore_confirm" in run.output
    assert backed_up.titles() == before


def test_a_time_that_no_backup_reaches_is_refused_and_harms_nothing(backed_up: Site) -> None:
    before = backed_up.titles()
    run = backed_up.refuse(RESTORE, restore_to="2001-01-01 00:00:00+00", restore_confirm=APP)
    assert "2001-01-01" in run.output
    backed_up.wait_until_ready(30)
    assert backed_up.titles() == before


def test_a_broken_repository_is_noticed_shown_and_mends_itself(backed_up: Site) -> None:
    site = backed_up
    path = site.repository()
    site.backups.sh(f"mv {path} {path}.gone")
    try:
        assert site.refuse(BACKUP).output
        assert not site.backup_state()["last"]["ok"]
        site.backups.sh(f"systemctl start {CHECK_UNIT}", check=False)
        assert site.backups.sh("systemctl is-system-running", check=False) == "degraded"
        run = site.refuse(STATUS)
        assert "backup" in run.output
    finally:
        site.backups.sh(f"rm -rf {path}; mv {path}.gone {path}")
    site.expect(BACKUP)
    site.backups.sh(f"systemctl start {CHECK_UNIT}")
    wait_for(lambda: site.expect(STATUS), 30, "all is well")


@pytest.mark.once
def test_wal_that_cannot_be_read_is_not_the_end_of_the_archive(backed_up: Site) -> None:
    site = backed_up
    site.post("Long before the damage")
    before = archived_until(site)
    site.post("Before the damage")
    segment = archived_until(site)
    titles = site.titles()
    file = site.backups.sh(f"find {site.repository()}/archive -name '{segment}-*'")
    site.post("After the damage")
    archived_until(site)
    kept = f"{site.repository()}.kept"
    site.backups.sh(f"mv {file} {kept}")
    try:
        # One that is not there is to PostgreSQL as if it were the last.
        run = site.refuse(RESTORE, restore_to="latest", restore_confirm=APP)
        assert f"lacks WAL between {before}" in run.output
        site.backups.sh(f"head -c 100 {kept} > {file}; chown postgres: {file}")
        run = site.refuse(RESTORE, restore_to="latest", restore_confirm=APP)
        assert segment in run.output
        # What pgBackRest has against it.
        assert "[" in run.output.partition(segment)[2]
        site.wait_until_ready(30)
        assert site.titles() == titles | {"After the damage"}
        # It is not an answer to whether the backups are good, either.
        assert segment in site.refuse(RESTORE_CHECK).output
    finally:
        site.backups.sh(f"mv {kept} {file}")
    site.expect(RESTORE_CHECK)


@pytest.mark.once
def test_a_destroyed_server_comes_back_from_the_repository(backed_up: Site, pytestconfig: pytest.Config) -> None:
    site = backed_up
    assert site.backups.name != site.db.name, "this needs the backups elsewhere"
    with Writers(site, "lost") as writers:
        wait_for(lambda: writers.written() > 100, 30, "posts are written")
        archived = archived_now(site)
        # Some more, of which some are archived and some are not.
        time.sleep(2 * ARCHIVE_TIMEOUT)
        lost_at = time.monotonic()
        destroy_and_replace(site)
    assert len(archived) > 100

    # The deploy does not begin anew with an empty database.
    refused = site.refuse("deploy.yml")
    assert "restore.yml" in refused.output
    run = site.expect(RESTORE, restore_to="latest", restore_confirm=APP)
    site.wait_until_ready(60)
    titles = site.titles()
    assert archived <= titles, "every row acknowledged before the last archived WAL is there"
    lost = {title: at for title, at in writers.acknowledged.items() if title not in titles}
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(
            f"\n{len(lost)} of {len(writers.acknowledged)} acknowledged rows are lost, all written in the last seconds"
        )
    # Archiving takes a moment as well.
    assert max((lost_at - at for at in lost.values()), default=0) < ARCHIVE_TIMEOUT + 5
    assert "last transaction" in run.output

    site.post("After the disaster")
    site.expect("deploy.yml")
    assert site.expect("deploy.yml").changed == 0
    for kept in set(re.findall(r"main\.before-[0-9TZ-]+", run.output)):
        site.expect(RESTORE, restore_discard=kept, restore_confirm=APP)
    site.expect(STATUS)


def archived_now(site: Site) -> set[str]:
    """Return what the database has, when all of that has been archived."""
    titles = site.titles()
    archived_until(site)
    return titles


def archived_until(site: Site) -> str:
    """Return the segment of WAL that was last written to, when it has been archived."""
    segment = site.psql("SELECT pg_walfile_name(pg_switch_wal())", database="postgres")
    site.wait_until_archived(segment)
    return segment


def destroy_and_replace(site: Site) -> None:
    """Take a server away with all that is on it, and put an empty one in its place."""
    name = site.db.name
    inspected = subprocess.run(["podman", "inspect", name], check=True, capture_output=True, text=True).stdout
    found = json.loads(inspected)[0]
    network, settings = next(iter(found["NetworkSettings"]["Networks"].items()))
    subprocess.run(["podman", "rm", "--force", "--time", "0", name], check=True, capture_output=True)
    command = ["podman", "run", "--detach", "--name", name, "--hostname", name, "--systemd=always"]
    command += [f"--cap-add={capability}" for capability in found["HostConfig"]["CapAdd"]]
    command += ["--network", network, "--ip", settings["IPAddress"]]
    command += ["--mac-address", settings["MacAddress"], found["ImageName"]]
    subprocess.run(command, check=True, capture_output=True)
    states = ("running", "degraded")
    wait_for(lambda: site.db.sh("systemctl is-system-running", check=False) in states, 90, f"{name} boots")
    # Its host key is another one.
    subprocess.run(shlex.split(f"{PROJECT}/molecule/shared/reach data"), check=True, capture_output=True)
