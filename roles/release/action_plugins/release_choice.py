"""Action plugin: choose the release that a rollback goes to, one and the same for all hosts.

Works on the control node, on what module release_survey has found on each host. Returns, to be registered for every
host:

`release_id` (the choice), `commit`, and `deploy`: what goes into deploys.jsonl, as action plugin release_plan has it.
With `list: true` it chooses nothing and returns `lines`: what there is, for people to read.

Fails when no release will do, or the one that is named will not, and says which would.
"""

from __future__ import annotations

import runpy
import typing as t
from pathlib import Path
from types import SimpleNamespace

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# An action plugin has no other way to import another one.
PLAN = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().with_name("release_plan.py"))))

Release = dict[str, t.Any]


def common_releases(surveys: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[Release]:
    """Return the releases that every host has, in the first host's order; each says what holds on all of them."""
    by_host = {host: {r["release"]: r for r in survey["releases"]} for host, survey in surveys.items()}
    first = next(iter(surveys.values()))["releases"]
    live = {host: survey["live"] for host, survey in surveys.items()}
    common = []
    for release in first:
        name = release["release"]
        if all(name in releases for releases in by_host.values()):
            common.append(
                {
                    **release,
                    "served": all(releases[name]["served"] for releases in by_host.values()),
                    "good": all(releases[name]["good"] for releases in by_host.values()),
                    "live": [host for host in live if live[host] == name],
                }
            )
    return common


def describe(releases: t.Iterable[Release], hosts: int) -> list[str]:
    """Return a line for each release: its id, when it went live, what it is, what it can be used for."""
    lines = []
    for release in releases:
        if len(release["live"]) == hosts:
            state = "live"
        elif release["live"]:
            state = f"live on {', '.join(release['live'])}"
        elif release["good"]:
            state = "can be gone back to"
        elif release["served"]:
            state = "was left by a rollback; only when named"
        else:
            state = "has never served"
        subject = release["subject"] if len(release["subject"]) <= 40 else release["subject"][:39] + "…"
        lines.append(f"{release['release']:<17}  {release['when'] or '-':<20}  {subject:<40}  {state}")
    return lines


def choose(surveys: t.Mapping[str, t.Mapping[str, t.Any]], wanted: str) -> Release:
    """Return the release to go back to.

    Args:
        surveys: what module release_survey said, by host.
        wanted: id or beginning of one; empty for the last one before the live one that served well.

    Raises:
        AnsibleActionFail: there is none; with those that there are.
    """
    releases = common_releases(surveys)
    known = "\n".join(f"  {line}" for line in describe(releases, len(surveys))) or "  (none)"
    if wanted:
        found = [release for release in releases if release["release"].startswith(wanted)]
        if len(found) > 1:
            raise AnsibleActionFail(f"rollback_to={wanted} is the beginning of {len(found)} releases:\n{known}")
        if not found:
            raise AnsibleActionFail(f"There is no release {wanted} on every app host. All of them have:\n{known}")
        if not found[0]["served"]:
            raise AnsibleActionFail(
                f"Release {found[0]['release']} has never served on every app host, so it is nothing to go back to; "
                f"deploy its commit instead. All of them have:\n{known}"
            )
        return found[0]
    live = {survey["live"] for survey in surveys.values()}
    for release in releases:
        if release["good"] and release["release"] not in live:
            return release
    raise AnsibleActionFail(f"No earlier release has served well on every app host. All of them have:\n{known}")


class ActionModule(ActionBase):
    """See the module's docstring."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the choice; `tmp` is deprecated, `task_vars` are the host's variables."""
        _, args = self.validate_argument_spec(
            argument_spec={
                "surveys": {"type": "dict", "required": True},
                "wanted": {"type": "str", "default": ""},
                "list": {"type": "bool", "default": False},
            }
        )
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        surveys = args["surveys"]
        if args["list"]:
            result["lines"] = describe(common_releases(surveys), len(surveys)) or ["There is no release yet."]
            return result
        release = choose(surveys, args["wanted"])
        result.update(
            release_id=release["release"],
            commit=release["commit"],
            msg=f"Going back to {release['release']}: {release['subject']}",
            deploy={**PLAN.deploy_of(release["commit"]), "rollback": True},
        )
        return result
