"""An application that is not ours, on a server that has one already: every path, name and habit is another."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.system.servers import Server

# Nothing but ASGI, from a factory, in a src layout, in a sub-directory; reads os.environ and knows no .env.
CODE = """
import json
import os


def make_app():
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                event = (await receive())["type"]
                await send({"type": event + ".complete"})
                if event == "lifespan.shutdown":
                    return
        seen = {
            "client": scope["client"],
            "scheme": scope["scheme"],
            "headers": {k.decode(): v.decode() for k, v in scope["headers"]},
            "greeting": os.environ["GREETING"],
            "token": os.environ["TOKEN"],
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})

    return app
"""

# The oldest gunicorn that is served; it still needs what setuptools has dropped since.
REQUIREMENTS = "gunicorn==20.1.0\nsetuptools==75.8.0\nuvicorn==0.34.0\nuvicorn-worker==0.2.0\n"

GREETING = "\"quoted\" \\back #hash $HOME ${HOME} 100% 'single' é\nsecond line"
TOKEN = 't0ken$with%odd"characters#'


def settings(path: Path) -> dict[str, Any]:
    """Make the repository and return the settings that deploy it."""
    source = path / "backend" / "src" / "shop"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "web.py").write_text(CODE)
    (path / "backend" / "requirements.txt").write_text(REQUIREMENTS)
    git = ["git", "-C", str(path), "-c", "user.name=Tester", "-c", "user.email=tester@localhost"]
    for command in (["init", "--quiet", "-b", "trunk"], ["add", "--all"], ["commit", "--quiet", "-m", "Shop"]):
        subprocess.run([*git, *command], check=True)
    return {
        "app_name": "shop",
        "app_domains": ["shop.test"],
        "release_repository": str(path),
        "release_version": "trunk",
        "release_subdirectory": "backend",
        "release_module": "shop.web:make_app()",
        "release_python_path": ["src"],
        "release_health_path": "/anything",
        "release_migrate_command": "",
        "release_static_directory": "",
        "release_workers": "1",
        "release_env": {"GREETING": GREETING},
        "release_secrets": {"TOKEN": TOKEN},
        "release_export_env": True,
    }


@pytest.mark.once
def test_it_is_served_beside_the_first(server: Server, tmp_path: Path) -> None:
    release, masters = server.release(), server.gunicorns()
    wanted = settings(tmp_path / "shop")
    server.deploy(**wanted)

    forged = {
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=203.0.113.7;proto=http",
        "X-Real-IP": "203.0.113.7",
    }
    seen = server.request("GET", "/", headers=forged, domain="shop.test").json()
    assert seen["greeting"] == GREETING
    assert seen["token"] == TOKEN
    assert seen["scheme"] == "https"
    assert seen["headers"]["host"] == "shop.test"
    assert "203.0.113.7" not in str(seen)
    assert "evil.example" not in str(seen)

    assert server.release() == release
    assert masters <= server.gunicorns(), "the first application was restarted"
    assert server.deploy("--tags", "release", **wanted).changed == 0
    assert server.deploy().changed == 0, "the two applications undo each other's configuration"
