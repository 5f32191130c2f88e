"""A value reaches the application as it was written, whichever way the application reads its `.env`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.errors import AnsibleActionFail
from dotenv import dotenv_values
from pydantic import create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from tests.release_support import build_action, load, start_settings

host = load("module_utils/release_host.py")
encode = build_action.encode_dotenv

PIECES = [
    *"abz019 \t'\"`%$#\\{}()[]=:;,.!?&|<>~^*@/-_+\n\r",
    *(
        "${",
        "${HOME}",
        "${__:-$}{",
        "$(id)",
        "\\n",
        "\\\\",
        "\r\n",
        "export ",
        "# no comment",
        "%(ENV_HOME)s",
        "\\$",
        "\\",
    ),
    *("é", "ß", "漢字", "🚀", "\u2028", "\u0085", "\x0b", "\x0c", "\x1b[0m", "\x7f", "\ufeff"),
]


@pytest.fixture(scope="module")
def values() -> dict[str, str]:
    """3,000 strings, the same in every run, made of what has a meaning to somebody on the way."""
    chosen = random.Random(2)  # noqa: S311 - to be the same in every run
    strings = ["", " ", " a ", "'", '"', "\\", "\n", "\r\n", "$", "${", "${__:-$}{", "${x:-y}", "a=b", "#", "\\n"]
    while len(strings) < 3000:
        strings.append("".join(chosen.choices(PIECES, k=chosen.randint(0, 12))))
    return {f"V{number:04}": value for number, value in enumerate(strings)}


@pytest.fixture(scope="module")
def file(values: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dotenv") / ".env"
    path.write_text(encode(values), encoding="utf-8")
    return path


def test_python_dotenv_reads_them_back(values: dict[str, str], file: Path) -> None:
    assert dotenv_values(file) == values


def test_pydantic_settings_reads_them_back(values: dict[str, str], file: Path) -> None:
    class Base(BaseSettings):
        model_config = SettingsConfigDict(env_file=file, case_sensitive=True)

    fields = dict.fromkeys(values, (str, ...))
    settings = create_model("Settings", __base__=Base, **fields)()  # type: ignore[call-overload]
    assert settings.model_dump() == values


def test_the_modules_read_them_back(values: dict[str, str], file: Path) -> None:
    assert host.parse_dotenv(file.read_text(encoding="utf-8")) == values


def test_gunicorn_exports_them(values: dict[str, str], file: Path, tmp_path: Path) -> None:
    """With release_export_env, from the start settings that the role renders."""
    settings = start_settings(tmp_path, "1-1", release_export_env=True)["gunicorn.conf.py"]
    (tmp_path / "releases/1-1").mkdir(parents=True)
    (tmp_path / "releases/1-1/.env").write_bytes(file.read_bytes())
    script = settings + "\nimport json\nprint(json.dumps(dict(os.environ)))\n"
    env = {"PATH": os.environ["PATH"], "V0001": "set already"}
    said = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    seen = json.loads(said)
    assert {name: seen[name] for name in values} == {**values, "V0001": "set already"}, "what Supervisor sets wins"


def test_what_yaml_makes_of_plain_words_is_written_as_an_environment_has_it() -> None:
    assert encode({"B": True, "A": False, "N": None, "I": 7}) == 'A="false"\nB="true"\nI="7"\nN=""\n'


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A\nB", "Ä"])
def test_a_name_that_no_environment_can_have(name: str) -> None:
    with pytest.raises(AnsibleActionFail, match="in release_env or release_secrets is not a name"):
        encode({name: "x"})


def test_a_value_that_no_environment_can_carry() -> None:
    with pytest.raises(AnsibleActionFail, match="The value of KEY contains a NUL character"):
        encode({"KEY": "s3cret\0"})


class TestMask:
    """What a failed step shows of the application's own words."""

    @pytest.mark.parametrize(
        "text",
        [
            "key is hunter'2\\two\nits-second-line",
            '{"key": "hunter\'2\\\\two\\nits-second-line"}',
            "{'key': \"hunter'2\\\\two\\nits-second-line\"}",
            "only its-second-line",
        ],
    )
    def test_removes_a_secret_however_it_is_quoted(self, text: str) -> None:
        masked = host.Mask(["hunter'2\\two\nits-second-line"])(text)
        assert "********" in masked
        assert "hunter" not in masked
        assert "its-second-line" not in masked

    def test_removes_the_password_of_a_url_also_where_it_stands_alone(self) -> None:
        mask = host.Mask(["postgresql://blog:p%40ssw0rd@db/blog"])
        assert mask("authentication with p@ssw0rd failed, p%40ssw0rd") == (
            "authentication with ******** failed, ********"
        )

    def test_keeps_a_url_readable_whose_password_it_removes(self) -> None:
        mask = host.Mask([], ["https://ghp_token123@example.org/blog.git"])
        assert mask("https://ghp_token123@example.org/blog.git") == "https://********@example.org/blog.git"

    def test_leaves_short_words_alone(self) -> None:
        assert host.Mask(["true"])("it is true") == "it is true"
