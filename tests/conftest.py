"""Shared by the tests of the playbooks, modules and templates."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The app's tests load this file as well, in a virtualenv without Ansible: fixtures import what they need.
if TYPE_CHECKING:
    from tests.app_host import Host
    from tests.release_support import Server

# These change accounts, as on a server. Without root they run in a user namespace: tests/test_release_as_root.py.
NEEDS_ROOT = [f"test_release_{name}.py" for name in ("build", "cutover", "finish", "migrate", "recover", "ship")]
collect_ignore = [] if os.geteuid() == 0 else NEEDS_ROOT

# `bin/test --exhaustive` runs all there is. Without it, what repeats a test for another phase, another release of
# Debian or many more times is left out, so that every change can be tested in well under an hour.
EXHAUSTIVE = os.environ.get("HARDSTAND_TESTS") == "exhaustive"

_LOAD_CLASS = """
import importlib, traceback

def load_class(uri):
    try:
        module, name = uri.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)
    except Exception:
        raise RuntimeError("class uri %r invalid or not found: \\n\\n[%s]" % (uri, traceback.format_exc()))
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: only run by `bin/test --exhaustive`")
    config.addinivalue_line("markers", "once(on): does not depend on Debian's release, so one server will do")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only an exhaustive run is to do; pytest says how many that are."""
    if EXHAUSTIVE:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive") or _is_repeated(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_repeated(item: pytest.Item) -> bool:
    """Return whether a test that one server is enough for is for another than that one: the newest, unless it says."""
    if not (once := item.get_closest_marker("once")):
        return False
    other = {"debian13": "debian12", "debian12": "debian13"}[once.kwargs.get("on", "debian13")]
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    return any(str(value).endswith(other) for value in parameters)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, let the tests of one release of Debian follow one another, beside those of the other.

    They have no server in common. (xdist's own groups are by a mark that it does not find with this pytest.)
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByRelease(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            name, _, parameters = nodeid.partition("[")
            release = re.search(r"debian\d+", parameters)
            return release[0] if release else name.partition("::")[0]

    return ByRelease(config, log)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A temporary directory that other accounts may enter; pytest's own are closed to them."""
    path = Path(tempfile.mkdtemp(prefix="hardstand-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def wheels() -> Iterator[Path]:
    """A directory of wheels that stand in for an application's dependencies."""
    from tests.release_support import wheel

    path = Path(tempfile.mkdtemp(prefix="hardstand-wheels-"))
    path.chmod(0o755)
    for version in ("27.0.1", "20.1.0"):
        files = {"gunicorn/__init__.py": f"__version__ = '{version}'\n", "gunicorn/util.py": _LOAD_CLASS}
        wheel(path, "gunicorn", version, files)
    # As the real one: it needs what setuptools no longer has.
    old = {"gunicorn/__init__.py": "__version__ = '20.0.4'\n", "gunicorn/util.py": "import pkg_resources_not_there\n"}
    wheel(path, "gunicorn", "20.0.4", old)
    worker = {"uvicorn_worker/__init__.py": "class UvicornWorker:\n    pass\n"}
    wheel(path, "uvicorn-worker", "0.4.0", worker, ["left"])
    wheel(path, "left", "1.0", {"left.py": ""})
    wheel(path, "left", "2.0", {"left.py": ""})
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(open_directory: Path, wheels: Path) -> Server:
    """A server that installs from those wheels."""
    from tests.release_support import Server

    return Server(open_directory, wheels)


@pytest.fixture(scope="session")
def shared_host() -> Iterator[Host]:
    """A server with a supervisord; its first build, which installs from the index, is for all tests."""
    from tests.app_host import Host
    from tests.release_support import eventually

    directory = Path(tempfile.mkdtemp(prefix="hardstand-"))
    directory.chmod(0o755)
    made = Host(directory)
    eventually(made.socket.exists, "supervisord listens")
    yield made
    made.stop()
    assert made.gunicorns() == set(), "supervisord's end leaves no gunicorn"
    shutil.rmtree(directory)


@pytest.fixture
def app_host(shared_host: Host) -> Iterator[Host]:
    """That server, without a release."""
    yield shared_host
    shared_host.reset()
