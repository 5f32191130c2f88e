"""The rules that nginx's configuration must keep, read from the rendered templates.

Whether nginx does what its configuration says is for the system tests; these find a broken rule without a server.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.role_templates import ROLES, evaluate, read_yaml

REQUIRED = {
    "nginx_site": "blog",
    "nginx_server_names": ["blog.example.org", "www.example.org"],
    "nginx_upstream_socket": "/srv/blog/run/live.sock",
    "nginx_certificate_file": "/etc/ssl/blog.crt",
    "nginx_certificate_key_file": "/etc/ssl/blog.key",
    "nginx_static_directory": "/srv/blog/current/static",
}
DEBIAN_12 = {"distribution": "Debian", "distribution_major_version": "12"}
DEBIAN_13 = {"distribution": "Debian", "distribution_major_version": "13"}
SITE = "/etc/nginx/sites-available/blog.conf"
SHARED = "/etc/nginx/conf.d/hardstand.conf"
PROXY = "/etc/nginx/snippets/hardstand-proxy.conf"


def render(facts: dict[str, str] = DEBIAN_13, **settings: Any) -> dict[str, str]:
    """Return what the role would write: path to text."""
    (task,) = read_yaml(ROLES / "nginx/tasks/configure.yml")
    files = evaluate("nginx", "__nginx_rendered", ansible_facts=facts, **task["vars"], **(REQUIRED | settings))
    return {file["path"]: str(file["content"]) for file in files}


def problems(**settings: Any) -> list[str]:
    """Return what the role says about these settings before it changes anything."""
    found: list[str] = evaluate("nginx", "_nginx_problems", **(REQUIRED | settings))
    return found


def blocks(text: str, kind: str) -> list[str]:
    """Return the blocks that begin with `kind`, such as "location", each with the blocks inside it."""
    found = []
    for start in re.finditer(rf"^\s*{kind}\b[^{{;]*{{", text, re.MULTILINE):
        depth, end = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append(text[start.start() : end])
    return found


@pytest.mark.parametrize("facts", [DEBIAN_12, DEBIAN_13])
def test_braces_match_and_nothing_is_left_unrendered(facts: dict[str, str]) -> None:
    for path, text in render(facts).items():
        assert text.count("{") == text.count("}"), path
        assert "{{" not in text.replace("{{}}", ""), path
        assert "{%" not in text, path


def test_each_file_says_who_manages_it() -> None:
    for path, text in render().items():
        assert path.endswith(".json") or "Ansible managed" in text, path


def test_debian_12_gets_what_its_nginx_and_openssl_know() -> None:
    files = render(DEBIAN_12)
    assert "listen 443 ssl http2;" in files[SITE]
    assert "listen 443 ssl http2 default_server;" in files[SHARED]
    assert "http2 on" not in files[SITE] + files[SHARED]
    assert "ssl_ecdh_curve X25519:prime256v1:secp384r1;" in files[SHARED]


def test_debian_13_gets_http2_and_the_post_quantum_key_exchange() -> None:
    files = render(DEBIAN_13)
    assert "listen 443 ssl;" in files[SITE]
    assert "http2 on;" in files[SITE]
    assert "http2 on;" in files[SHARED]
    assert "ssl_ecdh_curve X25519MLKEM768:X25519:prime256v1:secp384r1;" in files[SHARED]


def test_every_block_with_headers_of_its_own_repeats_hsts() -> None:
    """A nested add_header silently drops those of the block around it."""
    (server,) = [block for block in blocks(render()[SITE], "server") if " ssl" in block]
    with_headers = [block for block in blocks(server, "location") if "add_header" in block]
    assert len(with_headers) >= 2
    for block in [server, *with_headers]:
        assert 'add_header Strict-Transport-Security "max-age=63072000" always;' in block


def test_hsts_is_never_sent_over_plain_http_and_can_be_left_out() -> None:
    (plain,) = [block for block in blocks(render()[SITE], "server") if " ssl" not in block]
    assert "Strict-Transport-Security" not in plain
    assert "Strict-Transport-Security" not in render(nginx_hsts_max_age=0)[SITE]
    assert '"max-age=63072000; includeSubDomains"' in render(nginx_hsts_include_subdomains=True)[SITE]


def test_a_client_cannot_say_where_its_request_comes_from() -> None:
    files = render()
    sent = dict(re.findall(r"proxy_set_header (\S+) (.*);", files[PROXY] + files[SITE]))
    assert sent["Host"] == "$host"
    assert sent["X-Forwarded-For"] == sent["X-Real-IP"] == "$remote_addr"
    assert sent["X-Forwarded-Proto"] == "https"
    assert sent["X-Request-ID"] == "$request_id"
    for header in ("Forwarded", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Ssl", "X-Forwarded-Protocol"):
        assert sent[header] == '""'
    assert "$http_host" not in files[PROXY] + files[SITE]


def test_no_location_drops_the_proxy_headers_with_one_of_its_own() -> None:
    for block in blocks(render()[SITE], "location"):
        assert "proxy_set_header" not in block


def test_forwarded_addresses_are_believed_from_trusted_proxies_alone() -> None:
    assert "real_ip" not in render()[SITE]
    site = render(nginx_trusted_proxies=["10.0.0.0/8", "fd00::/8"])[SITE]
    assert "set_real_ip_from 10.0.0.0/8;" in site
    assert "set_real_ip_from fd00::/8;" in site
    assert "real_ip_header X-Forwarded-For;" in site


def test_connections_to_the_upstream_end_within_two_seconds() -> None:
    """The cut-over depends on it: nginx must let go of the old slot by itself."""
    (upstream,) = blocks(render()[SITE], "upstream")
    assert "server unix:/srv/blog/run/live.sock;" in upstream
    assert "keepalive 64;" in upstream
    assert "keepalive_time 2s;" in upstream
    assert "keepalive_timeout 2s;" in upstream
    assert "proxy_next_upstream off;" in render()[PROXY]


def test_unknown_names_reach_no_application() -> None:
    defaults = [block for block in blocks(render()[SHARED], "server") if "default_server" in block]
    assert len(defaults) == 2
    assert all("return 444;" in block for block in defaults)
    assert ["ssl_reject_handshake on;" in block for block in defaults] == [" ssl " in block for block in defaults]
    assert "default_server" not in render()[SITE]


@pytest.mark.parametrize(
    ("settings", "suffix"),
    [({}, ""), ({"nginx_https_port": 8443}, ":8443"), ({"nginx_public_https_port": 9443}, ":9443")],
)
def test_redirects_and_host_name_the_port_that_clients_see(settings: dict[str, Any], suffix: str) -> None:
    site = render(**settings)[SITE]
    assert f"return 301 https://$host{suffix}$request_uri;" in site
    assert f"proxy_set_header Host $host{suffix};" in site


def test_without_a_static_directory_the_application_serves_its_own() -> None:
    assert "alias /srv/blog/current/static/;" in render()[SITE]
    assert "/static/" not in render(nginx_static_directory="")[SITE]


def test_static_files_hide_dotfiles_and_survive_a_cut_over() -> None:
    (static,) = [block for block in blocks(render()[SITE], "location") if "^~ /static/" in block]
    assert re.search(r"location ~ /\\\. {\s+return 404;", static)
    assert "open_file_cache off;" in static
    assert 'add_header Cache-Control "public, max-age=300";' in static


def test_two_sites_share_a_server_without_sharing_a_name() -> None:
    one, two = render(), render(nginx_site="shop", nginx_server_names=["shop.example.org"])
    shared = one.keys() & two.keys()
    assert {path: one[path] for path in shared} == {path: two[path] for path in shared}
    assert "upstream hardstand-shop" in two["/etc/nginx/sites-available/shop.conf"]


def test_a_line_of_the_access_log_is_json() -> None:
    (text,) = re.findall(r"log_format hardstand escape=json\s+(.*?);", render()[SHARED], re.DOTALL)
    numbers = {"$msec": "1.5", "$hardstand_status": "200", "$body_bytes_sent": "5", "$request_time": "0.001"}
    line = "".join(re.findall(r"'(.*)'", text))
    line = re.sub(r"\$\w+", lambda variable: numbers.get(variable[0], "text"), line)
    assert {"time", "request_id", "remote_addr", "method", "uri", "status", "upstream_time"} <= json.loads(line).keys()


def test_the_page_for_programs_is_json() -> None:
    (page,) = [text for path, text in render().items() if path.endswith("unavailable.json")]
    assert json.loads(page)["detail"]


def test_the_main_file_includes_by_relative_paths_alone() -> None:
    """Or nginx_configuration would test the files that are there instead of the new ones."""
    for text in render().values():
        assert not re.search(r"^\s*include\s+/", text, re.MULTILINE)


def test_extra_lines_land_in_their_place() -> None:
    site = render(
        nginx_extra_server_config="location /x {\n    return 204;\n}\n", nginx_extra_http_config="map a $b {}"
    )
    (server,) = [block for block in blocks(site[SITE], "server") if " ssl" in block]
    assert "    location /x {\n        return 204;\n    }\n" in server
    assert re.search(r"^map a \$b {}$", site[SITE], re.MULTILINE)


def test_sound_settings_are_no_problem() -> None:
    assert problems() == []
    assert problems(nginx_static_directory="", nginx_trusted_proxies=["10.0.0.1", "fd00::/8"]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nginx_site", "Blog"),
        ("nginx_server_names", []),
        ("nginx_server_names", ["good.example.org", "bad name"]),
        ("nginx_server_names", ["_"]),
        ("nginx_upstream_socket", "unix:/srv/blog/run/live.sock"),
        ("nginx_upstream_socket", "/srv/x; include /etc/passwd"),
        ("nginx_static_url", "static"),
        ("nginx_static_url", "/"),
        ("nginx_static_directory", "static"),
        ("nginx_static_cache_control", 'public"; add_header X y'),
        ("nginx_client_max_body_size", "10 MB"),
        ("nginx_trusted_proxies", ["lb.example.org"]),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: Any) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(name)
