"""Action plugin: say what a release would migrate, and refuse what would break or block the release that serves.

Runs the module of the same name, which documents what happens on the server. Its own part, on the control node:

- hands the secrets of the migration over in the one argument that no output shows;
- judges the SQL of what is pending: see plugin_utils/release_gate.py;
- in check mode, where the release is not built yet, looks into the repository for the migrations that it brings.

Returns what the module does, and for step `look` `lines`: what is pending, for people.
"""

from __future__ import annotations

import ast
import re
import runpy
import textwrap
import typing as t
from pathlib import Path
from types import SimpleNamespace

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

HERE = Path(__file__).resolve().parent
# An action plugin has no other way to import another one, or what several share.
PLAN = SimpleNamespace(**runpy.run_path(str(HERE / "release_plan.py")))
BUILD = SimpleNamespace(**runpy.run_path(str(HERE / "release_build.py")))
GATE = SimpleNamespace(**runpy.run_path(str(HERE.parent / "plugin_utils" / "release_gate.py")))

# Lines of one statement to show.
_STATEMENT_LINES = 6

Revision = dict[str, str]


def describe(pending: t.Sequence[Revision]) -> list[str]:
    """Return a line for each pending migration."""
    width = max((len(each["revision"]) for each in pending), default=0)
    return [f"{each['revision']:<{width}}  {each['message']}".rstrip() for each in pending]


def new_migrations(path: str, commit: str, live: str, subdirectory: str) -> list[Revision]:
    """Return the migrations that a commit has and the live one has not, from their files' text.

    Args:
        path: repository on the control node.
        commit: what is deployed.
        live: what serves; empty when nothing does.
        subdirectory: the application's directory in the repository.

    Raises:
        AnsibleActionFail: git does not say, for example because it has not got the live commit.
    """
    where = f"{subdirectory.strip('/')}/" if subdirectory.strip("/") else ""
    specs = [f":(glob){where}**/{name}/*.py" for name in ("versions", "migrations")]
    changed = ["ls-tree", "-r", "--name-only", "--full-tree", commit]
    if live:
        changed = ["diff", "--name-only", "--no-renames", "--diff-filter=A", live, commit, "--", *specs]
    listed = PLAN.git("-c", "core.quotePath=false", *changed, path=path)
    found: list[Revision] = []
    follows: dict[str, set[str]] = {}
    for name in listed.splitlines():
        if not re.match(rf"{re.escape(where)}(?:.*/)?(?:versions|migrations)/[^/]+\.py$", name):
            continue
        about = read_migration(PLAN.git("show", f"{commit}:{name}", path=path))
        if about is not None:
            revision, message, parents = about
            found.append({"revision": revision, "message": f"{message} ({name})".strip()})
            follows[revision] = parents
    return in_order(found, follows)


def read_migration(text: str) -> tuple[str, str, set[str]] | None:
    """Return the revision, the message and the parents of an Alembic migration; None for another file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    values: dict[str, t.Any] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            try:
                values[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    if not isinstance(values.get("revision"), str):
        return None
    parents = values.get("down_revision") or ()
    message = (ast.get_docstring(tree) or "").partition("\n")[0]
    return values["revision"], message, {parents} if isinstance(parents, str) else set(parents)


def in_order(found: list[Revision], follows: t.Mapping[str, set[str]]) -> list[Revision]:
    """Return migrations with each after those that it follows."""
    ordered: list[Revision] = []
    waiting = list(found)
    while waiting:
        left = {each["revision"] for each in waiting}
        ready = [each for each in waiting if not follows[each["revision"]] & left] or waiting
        ordered += ready
        waiting = [each for each in waiting if each not in ready]
    return ordered


def findings_of(found: t.Mapping[str, t.Any], accepted: t.Container[str]) -> list[t.Any]:
    """Return what the gate holds against pending migrations that nobody has accepted.

    Args:
        found: what the module said, with the pieces of SQL.
        accepted: revisions.
    """
    findings = []
    for piece in found["scripts"]:
        findings += GATE.judge(piece["text"], found["server"])
        if piece.get("revision"):
            findings.append(GATE.Finding(piece["revision"], "", piece["error"]))
    return [finding for finding in findings if finding.revision not in accepted]


def shorten(statement: str) -> str:
    """Return the beginning of a statement, indented."""
    lines = textwrap.dedent(statement).splitlines()
    shown = lines[:_STATEMENT_LINES] + (["…"] if len(lines) > _STATEMENT_LINES else [])
    return textwrap.indent("\n".join(shown), "  ")


def explain(findings: t.Sequence[t.Any], pending: t.Sequence[Revision], settings: str) -> str:
    """Return what the gate has found, for people.

    Args:
        findings: of the gate.
        pending: what is pending, for the messages.
        settings: the file that the setting to accept it belongs into.
    """
    messages = {each["revision"]: each["message"] for each in pending}
    lines = []
    last = None
    for revision, statement, rule in findings:
        if (revision, statement) != last:
            lines += ["", f"{revision} {messages.get(revision, '')}".rstrip(), shorten(statement)]
            last = (revision, statement)
        if statement:
            wrong, instead = GATE.RULES[rule]
            lines.append(f"    {rule}: {wrong}.\n    Instead: {instead}.")
        else:
            lines[-1] = (
                f"    Alembic cannot make SQL of it ({rule}), so nobody has judged what it does. Read it yourself."
            )
    names = list(dict.fromkeys(finding.revision for finding in findings))
    revisions = ", ".join(f'"{name}"' for name in names)
    return "\n".join(
        [
            f"They would break or block the release that serves ({', '.join(names)}):",
            *lines,
            "",
            "README.md, section Migrations, shows how to expand now and contract later. Where the release that serves",
            "no longer uses what this changes, and the table is small or quiet enough, accept it in",
            f"{settings}:  release_migration_accept: [{revisions}]",
        ]
    )


class ActionModule(ActionBase):
    """See the module's docstring."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the module's result; `tmp` is deprecated, `task_vars` are the host's variables."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        args = dict(self._task.args)
        plan, subdirectory = args.pop("plan", {}), args.pop("subdirectory", "")
        lint, accepted = args.pop("lint", "off"), {str(each) for each in args.pop("accept", None) or ()}
        # YAML takes an unquoted off for false.
        lint = "off" if lint is False else lint
        settings = args.pop("settings_file", "")
        args["secrets"] = BUILD.encode_dotenv(args.pop("secrets", None) or {})
        args["sql"] = lint != "off"
        result.update(self._execute_module(module_args=args, task_vars=variables))
        if args["step"] != "look" or result.get("failed") or result.get("unreachable"):
            return result
        scripts = result.pop("scripts", [])
        result["lines"] = []
        if not result["built"]:
            self._look_into_repository(result, plan, subdirectory)
        elif result.get("unseen"):
            result["lines"] = ["The pending migrations cannot be seen yet.", *result["unseen"].splitlines()]
        elif result["pending"]:
            result["lines"] = ["Pending migrations, in this order:", *describe(result["pending"])]
        # Where nothing serves, and nothing has been migrated, there is nothing to break.
        if scripts and (result["live_commit"] or result["current"]):
            self._judge({**result, "scripts": scripts}, accepted, lint, settings, args, result, variables)
        return result

    def _look_into_repository(self, result: dict[str, t.Any], plan: t.Mapping[str, t.Any], subdirectory: str) -> None:
        """Say what can be said of a release that is not built: which migrations its commit brings."""
        commit, live = plan.get("commit", ""), result["live_commit"]
        if live == commit:
            result["changes"] = False
            return
        if not plan.get("path"):
            result["lines"] = [f"Which migrations commit {commit[:12]} brings is seen when a server has fetched it."]
            return
        try:
            found = new_migrations(plan["path"], commit, live, subdirectory)
        except AnsibleActionFail as error:
            result["lines"] = [f"Which migrations commit {commit[:12]} brings cannot be seen: {error}"]
            return
        result["changes"] = bool(found)
        if found:
            since = f"that the live one, {live[:12]}, has not" if live else "for a database that has none"
            result["lines"] = [f"Commit {commit[:12]} brings migrations {since}:", *describe(found)]

    def _judge(
        self,
        found: t.Mapping[str, t.Any],
        accepted: set[str],
        lint: str,
        settings: str,
        args: t.Mapping[str, t.Any],
        result: dict[str, t.Any],
        variables: dict[str, t.Any],
    ) -> None:
        """Let the gate judge the SQL, and fail the task or warn."""
        if all(each["revision"] in accepted for each in found["pending"]):
            return
        try:
            findings = findings_of(found, accepted)
            text = explain(findings, found["pending"], settings) if findings else ""
        except GATE.GateError as error:
            text = str(error)
        if not text:
            return
        if lint == "warn":
            result.setdefault("warnings", []).append(text)
            return
        record = {**args, "step": "refuse", "reason": "migrations: " + text.splitlines()[0].rstrip(":")}
        self._execute_module(module_args=record, task_vars=variables)
        end = "The database is as it was, and the release that was live still serves."
        msg = "\n".join([*result["lines"], "", text, end])
        result.clear()
        result.update(failed=True, msg=msg)
