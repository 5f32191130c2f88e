"""What Alembic would do, as JSON: run with the Python of a release, in place of its `alembic upgrade …`.

Module release_migrate hands this file's text to that Python, so it uses nothing of Ansible and little of Alembic: what
every version since 1.0 has. The command line is Alembic's own parser's to read, so `-c`, `-n` and `-x` mean what they
always mean.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import typing as t

# What stands before the line of JSON: whatever else env.py prints is not ours.
MARK = "\x1eHARDSTAND "


def main(arguments: list[str]) -> None:
    """Print what is pending.

    Args:
        arguments: `sql` or `-`, whether to make the SQL of what is pending; `run` or `-`, whether to run the command
            when nothing is; and then the arguments of `alembic`.
    """
    from alembic import command, util  # type: ignore[import-not-found]
    from alembic.config import CommandLine  # type: ignore[import-not-found]

    sql, run, *rest = arguments

    class Look(CommandLine):
        def run_cmd(self, config: t.Any, options: t.Any) -> None:
            if options.cmd[0] is not command.upgrade or options.sql:
                say({"pending": None})
                return
            try:
                found = look(config, options)
            except util.CommandError as error:
                sys.exit(f"FAILED: {error}")
            if sql == "sql" and found["dialect"] == "postgresql":
                found["scripts"] = scripts(config, options, found)
            say(found)
            if run == "run" and not found["pending"]:
                super().run_cmd(config, options)

    Look(prog="alembic").main(argv=rest)


def say(found: t.Mapping[str, t.Any]) -> None:
    """Print the result."""
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


def look(config: t.Any, options: t.Any) -> dict[str, t.Any]:
    """Ask the database for its revisions, and Alembic for what leads from there to where the command goes.

    Returns:
        `current`, the database's revisions; `unknown`, those of them that this code does not have; `pending`, the
        revisions to come, in order; `dialect` and `server`, what kind of database it is, and its version.
    """
    from alembic.runtime.environment import EnvironmentContext  # type: ignore[import-not-found]
    from alembic.script import ScriptDirectory  # type: ignore[import-not-found]

    script = ScriptDirectory.from_config(config)
    known = {each.revision for each in script.walk_revisions()}
    found: dict[str, t.Any] = {"current": [], "unknown": [], "pending": [], "dialect": "", "server": []}

    def note(heads: t.Any, context: t.Any) -> list[t.Any]:
        heads = [heads] if isinstance(heads, str) else list(heads or ())
        found["current"] += heads
        found["unknown"] += [head for head in heads if head not in known]
        found["dialect"] = context.dialect.name
        found["server"] = list(getattr(context.dialect, "server_version_info", None) or ())
        if not found["unknown"]:
            for step in script._upgrade_revs(options.revision, tuple(heads)):
                revision = step.revision
                about = {"revision": revision.revision, "message": (revision.doc or "").partition("\n")[0]}
                if about not in found["pending"]:
                    found["pending"].append(about)
        return []

    with EnvironmentContext(config, script, fn=note, dont_mutate=True):
        script.run_env()
    return found


def scripts(config: t.Any, options: t.Any, found: t.Mapping[str, t.Any]) -> list[dict[str, str]]:
    """Make the SQL of what is pending, without a database.

    Returns:
        Pieces in order: `text`, and for one that ends where a migration cannot be made into SQL, because it reads from
        the database for example, `revision`, which that is, and `error`.
    """
    from alembic import command

    pending = [each["revision"] for each in found["pending"]]
    pieces: list[dict[str, str]] = []
    start = ",".join(found["current"]) or "base"
    end = pending[-1] if options.revision[:1] in "+-" or "+" in options.revision else options.revision
    while pending:
        buffer, printed, error = io.StringIO(), io.StringIO(), ""
        config.output_buffer = buffer
        try:
            with contextlib.redirect_stdout(printed):
                command.upgrade(config, f"{start}:{end}", sql=True, tag=getattr(options, "tag", None))
        except (Exception, SystemExit) as caught:
            error = f"{type(caught).__name__}: {caught}".partition("\n")[0]
        text = buffer.getvalue()
        if not error:
            pieces.append({"text": text})
            break
        # Alembic announces each migration before it runs it: the last one announced is the one that failed.
        begun = [line.split()[-1].rstrip(",") for line in text.splitlines() if line.startswith("-- Running upgrade ")]
        failed = begun[-1] if begun and begun[-1] in pending else pending[0]
        pieces.append({"text": text, "revision": failed, "error": error})
        pending = pending[pending.index(failed) + 1 :]
        start = failed
    config.output_buffer = None
    return pieces


if __name__ == "__main__":
    # `alembic` is a script, which Python does not give the working directory to import from; `python -c` does.
    if sys.argv[1] == "script":
        sys.path[:] = [path for path in sys.path if path]
    main(sys.argv[2:])
