"""The README's worked example: a column is renamed in three deploys, and no release notices another's."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx

from tests.app.support import SECRET_KEY, PostgreSQL, alembic, server
from tests.app.test_migrations import fork

EXAMPLE = Path(__file__).parent / "rename"
UVICORN = ("uvicorn", "app.asgi:app", "--uds", "SOCKET")
OLD, NEW = (
    "title: Mapped[str] = mapped_column(String(200))",
    'title: Mapped[str] = mapped_column("heading", String(200))',
)


def release(project: Path, directory: Path, *migrations: str, renamed: bool) -> Path:
    """The code of one of the deploys."""
    code = fork(project, directory)
    for name in migrations:
        shutil.copy(EXAMPLE / name, code / "app/migrations/versions")
    models = code / "app/models.py"
    text = models.read_text()
    assert OLD in text
    models.write_text(text.replace(OLD, NEW) if renamed else text)
    return code


def use(client: httpx.Client, others: Callable[[], list[str]], title: str) -> None:
    """Write, change and read posts; also those of whoever else serves."""
    first = client.post("/api/posts", json={"title": title, "body": ""})
    assert first.status_code == 201, first.text
    changed = client.put(first.headers["Location"], json={"title": f"{title}, changed", "body": ""})
    assert changed.json()["title"] == f"{title}, changed"
    assert f"{title}, changed" in others()


def test_rename_in_three_deploys(project: Path, tmp_path: Path, postgresql: PostgreSQL, postgresql_url: str) -> None:
    expand, fill, contract = sorted(path.name for path in EXAMPLE.glob("0*.py"))
    releases = {
        "before": release(project, tmp_path / "before", renamed=False),
        "expand": release(project, tmp_path / "1", expand, fill, renamed=False),
        "move": release(project, tmp_path / "2", expand, fill, renamed=True),
        "contract": release(project, tmp_path / "3", expand, fill, contract, renamed=True),
    }
    name = postgresql_url.partition("@/")[2].partition("?")[0]
    postgresql.execute(
        name,
        "INSERT INTO posts (title, body, created_at, updated_at) "
        "SELECT 'old ' || n, '', now(), now() FROM generate_series(1, 2500) n",
    )
    for old, new in itertools.pairwise(releases):
        with ExitStack() as stack:
            clients = {}
            for each in (old, new):
                if each == new:
                    result = alembic(releases[new], postgresql_url, "upgrade", "head")
                    assert result.returncode == 0, result.stderr
                directory = tmp_path / f"{old}-{new}-{each}"
                directory.mkdir()
                env = {"DATABASE_URL": postgresql_url, "SECRET_KEY": SECRET_KEY}
                running = stack.enter_context(server(releases[each], directory, *UVICORN, **env))
                running.wait()
                clients[each] = running.client
                assert running.client.get("/health/ready").status_code == 200

            def seen(client: httpx.Client) -> Callable[[], list[str]]:
                return lambda: [post["title"] for post in client.get("/api/posts").json()["items"]]

            for one, other in ((old, new), (new, old)):
                use(clients[one], seen(clients[other]), f"{one} beside {other}")
    assert postgresql.fetch(name, "SELECT count(*), count(heading) FROM posts") == [(2506, 2506)]


def test_the_readme_shows_these_migrations() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = dict(re.findall(r"```python\n# app/migrations/versions/(\S+)\n(.*?)```", readme, re.DOTALL))
    assert sorted(shown) == sorted(path.name for path in EXAMPLE.glob("*.py"))
    for name, text in shown.items():
        assert text in (EXAMPLE / name).read_text(), name
