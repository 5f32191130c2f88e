"""A freshly deployed server, from outside and from inside."""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.servers import APP, DOMAIN, ROOT, Client, Server, curl, wait_for


def test_https_is_verified_and_serves_the_page(server: Server) -> None:
    page = server.request("GET", "/")
    assert page.status == 200
    assert b"<title>" in page.body
    with pytest.raises(ssl.SSLCertVerificationError):
        Client(replace(server, ca=Path("/etc/ssl/certs/ca-certificates.crt"))).request("GET", "/")


def test_a_post_is_written_and_read(server: Server) -> None:
    made = server.request("POST", "/api/posts", {"title": "first", "body": "hello"})
    assert made.status == 201
    read = server.request("GET", made.headers["Location"])
    assert read.json()["title"] == "first"


def test_http_leads_to_https(server: Server) -> None:
    response = server.plain("/api/info?x=1")
    assert response.status in (301, 308)
    assert response.headers["Location"] == f"https://{DOMAIN}/api/info?x=1"


def test_http2_is_spoken(server: Server) -> None:
    wanted = "%{http_version} %{response_code}"
    result = curl(server, "--http2", "--output", "/dev/null", "--write-out", wanted, f"https://{DOMAIN}/api/info")
    assert result.stdout == "2 200", result.stderr


def test_another_name_is_refused(server: Server) -> None:
    context = ssl.create_default_context(cafile=str(server.ca))
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", server.https_port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="somebody-else.example").recv(1)


def test_old_tls_is_refused(server: Server) -> None:
    context = ssl.create_default_context(cafile=str(server.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES256-SHA")
    with socket.create_connection(("127.0.0.1", server.https_port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=DOMAIN)


def test_static_files_come_from_nginx(server: Server) -> None:
    name = server.sh(f"cd {ROOT}/current/app/static && ls | grep -v index.html | head -1")
    reply = server.request("GET", f"/static/{name}")
    assert reply.status == 200
    assert reply.headers["ETag"]
    line = log_line(server, f"/static/{name}")
    assert not line["upstream_time"], "the application answered"


def test_the_access_log_is_json(server: Server) -> None:
    server.request("GET", "/api/info?logged=1")
    line = log_line(server, "/api/info?logged=1")
    assert str(line["status"]) == "200"


def test_nothing_runs_as_root_that_need_not(server: Server) -> None:
    users = {server.sh(f"stat -c %U /proc/{pid}") for pid in server.gunicorns()}
    assert users == {APP}
    assert server.sh(f"stat -c '%a %U %G' {ROOT}/current/.env") == f"640 root {APP}"
    # The service owns nothing that it executes.
    writable = server.sh(
        f"setpriv --reuid={APP} --regid={APP} --clear-groups find {ROOT}/releases {ROOT}/venvs /opt/pyenv -writable "
        "-not -type l 2>/dev/null | head -3"
    )
    assert writable == ""


def test_only_nginx_reaches_the_socket(server: Server) -> None:
    attempt = server.sh(
        'setpriv --reuid=nobody --regid=nogroup --clear-groups python3 -c "import socket; '
        f"s = socket.socket(socket.AF_UNIX); s.connect('{ROOT}/run/live.sock')\" 2>&1",
        check=False,
    )
    assert "PermissionError" in attempt


def test_no_secret_is_anywhere_but_in_env(server: Server) -> None:
    pattern = "/run/hardstand-test-pattern"
    # In a file: on a command line the search would find itself.
    server.sh(f"umask 077; sed -n 's/^SECRET_KEY=\"\\(.*\\)\"$/\\1/p' {ROOT}/current/.env > {pattern}")
    try:
        assert int(server.sh(f"wc -c < {pattern}")) > 32
        places = "/srv /etc /opt/uv /run /tmp /root /home /var/log /var/lib /var/spool"
        found = server.sh(f"grep -rlFf {pattern} {places} 2>/dev/null", check=False).split()
        assert {path.rpartition("/")[2] for path in found} - {pattern.rpartition("/")[2]} == {".env"}
        assert all(server.sh(f"stat -c %a {path}") == "640" for path in found if path.endswith(".env"))
        running = server.sh(f"grep -lFf {pattern} /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null", check=False)
        assert running == ""
        assert server.sh(f"journalctl --no-pager | grep -cFf {pattern}", check=False) == "0"
    finally:
        server.sh(f"rm {pattern}")


def log_line(server: Server, uri: str) -> dict[str, object]:
    """Return the newest line of the access log for a URI."""

    def find() -> dict[str, object] | None:
        text = server.sh(f"tail -n 50 /var/log/nginx/{APP}.access.log")
        lines = [json.loads(line) for line in text.splitlines()]
        return next((line for line in reversed(lines) if line["uri"] == uri), None)

    found: dict[str, object] = wait_for(find, 5, f"a line for {uri} in the access log")
    return found
