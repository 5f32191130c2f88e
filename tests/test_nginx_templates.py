"""The rules that nginx's configuration must keep, read from the rendered templates.

Whether nginx does what its configuration says is for the system tests; these find a broken rule without a server.
"""

from __future__ import annotations

import html
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
BALANCER: dict[str, Any] = {
    "nginx_upstream_socket": "",
    "nginx_upstream_servers": ["10.0.0.1:8443", "[fd00::2]:8443"],
    "nginx_upstream_name": "blog.internal",
    "nginx_upstream_ca_file": "/etc/ssl/fleet-ca.crt",
    "nginx_static_directory": "",
}
MEMBER: dict[str, Any] = {
    "nginx_peers": ["10.0.0.8", "fd00::9"],
    "nginx_peer_name": "blog.internal",
    "nginx_client_ports": False,
    # For a site that faces clients: addresses in front of the load balancers.
    "nginx_trusted_proxies": ["192.0.2.0/24"],
}
each_place = pytest.mark.parametrize("place", [{}, BALANCER, MEMBER], ids=["alone", "balancer", "member"])
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
    found: list[str] = evaluate("nginx", "_nginx_problems", **({"ansible_check_mode": False} | REQUIRED | settings))
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


@each_place
@pytest.mark.parametrize("facts", [DEBIAN_12, DEBIAN_13])
def test_braces_match_and_nothing_is_left_unrendered(facts: dict[str, str], place: dict[str, Any]) -> None:
    for path, text in render(facts, **place).items():
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
    assert "ssl_ecdh_curve ?X25519MLKEM768:X25519:prime256v1:secp384r1;" in files[SHARED]


HEADERS = "/etc/nginx/snippets/hardstand-headers-blog.conf"


def sent_headers(**settings: Any) -> dict[str, str]:
    """Return the headers that clients get when the application sends none of its own."""
    files = render(**settings)
    maps = {
        name: re.sub(r"\\(.)", r"\1", value)
        for name, value in re.findall(
            r'^map \$upstream_http_\w+ (\$\w+) {\s+default "";\s+"" "(.*)";\s+}$', files[SITE], re.MULTILINE
        )
    }
    return {
        name: maps.get(value, value) for name, value in re.findall(r"add_header (\S+) (.*) always;", files[HEADERS])
    }


@pytest.mark.parametrize("place", [{}, BALANCER], ids=["alone", "balancer"])
def test_every_block_with_headers_of_its_own_has_the_common_ones(place: dict[str, Any]) -> None:
    """A nested add_header silently drops those of the block around it."""
    (server,) = [block for block in blocks(render(**place)[SITE], "server") if " ssl" in block]
    with_headers = [block for block in blocks(server, "location") if "add_header" in block]
    assert len(with_headers) >= 2
    for block in [server, *with_headers]:
        assert "include snippets/hardstand-headers-blog.conf;" in block


def test_headers_ask_of_browsers_what_no_page_misses() -> None:
    headers = sent_headers()
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    assert headers["Referrer-Policy"] == "strict-origin-when-cross-origin"
    assert headers["Content-Security-Policy"] == "object-src 'none'; base-uri 'self'"
    # An application that forbids frames with X-Frame-Options alone would be overruled by frame-ancestors.
    assert "frame-ancestors" not in headers["Content-Security-Policy"]
    assert {"Permissions-Policy", "Cross-Origin-Opener-Policy", "Cross-Origin-Resource-Policy"} <= headers.keys()


def test_each_header_can_be_another_or_none() -> None:
    ours = {"X-Frame-Options": "", "X-New": 'a "quoted" \\ value', "Referrer-Policy": "no-referrer"}
    headers = sent_headers(nginx_response_headers=ours, nginx_content_security_policy="")
    assert "X-Frame-Options" not in headers
    assert "Content-Security-Policy" not in headers
    assert headers["X-New"] == ours["X-New"]
    assert headers["Referrer-Policy"] == "no-referrer"


def test_hsts_is_never_sent_over_plain_http_and_can_be_left_out() -> None:
    (plain,) = [block for block in blocks(render()[SITE], "server") if " ssl" not in block]
    assert "hardstand-headers" not in plain
    assert sent_headers()["Strict-Transport-Security"] == "max-age=63072000"
    assert "Strict-Transport-Security" not in sent_headers(nginx_hsts_max_age=0)
    settings = {"nginx_hsts_include_subdomains": True, "nginx_hsts_preload": True}
    assert sent_headers(**settings)["Strict-Transport-Security"] == "max-age=63072000; includeSubDomains; preload"


@pytest.mark.parametrize(("policy", "protocols"), [("intermediate", "TLSv1.2 TLSv1.3"), ("modern", "TLSv1.3")])
def test_tls_follows_the_policy(policy: str, protocols: str) -> None:
    shared = render(nginx_tls_policy=policy)[SHARED]
    assert f"ssl_protocols {protocols};" in shared
    assert ("ssl_ciphers" in shared) == (policy == "intermediate")


def test_http3_is_offered_where_nginx_has_it() -> None:
    assert "quic" not in render()[SITE] + render()[SHARED]
    assert "Alt-Svc" not in sent_headers()
    on: dict[str, Any] = {"nginx_http3": True, "nginx_public_https_port": 8443}
    files = render(**on)
    assert "listen 443 quic;" in files[SITE]
    assert "listen [::]:443 quic reuseport default_server;" in files[SHARED]
    assert sent_headers(**on)["Alt-Svc"] == """'h3=":8443"; ma=86400'"""
    older = render(DEBIAN_12, nginx_http3=True)
    assert "quic" not in older[SITE] + older[SHARED]
    assert "quic" not in render(**MEMBER, nginx_http3=True)[SITE]


def test_limits_are_settings_and_off() -> None:
    assert "limit_" not in render()[SITE]
    site = render(nginx_rate_limit=5, nginx_rate_burst=7, nginx_connection_limit=3)[SITE]
    assert "zone=hardstand-blog-requests:10m rate=5r/s;" in site
    assert "limit_req zone=hardstand-blog-requests burst=7 nodelay;" in site
    assert "limit_conn hardstand-blog-connections 3;" in site
    assert "error_page 429 /.hardstand/limited.$hardstand_page_type;" in site
    assert "limit_req zone=hardstand-blog-requests;" in render(nginx_rate_limit=5, nginx_rate_burst=0)[SITE]
    # A load balancer has counted already, and all requests come from it.
    assert "limit_" not in render(**MEMBER, nginx_rate_limit=5, nginx_connection_limit=3)[SITE]


def test_networks_are_counted_together() -> None:
    (client,) = [block for block in blocks(render(nginx_rate_limit=5)[SITE], "map") if "_client" in block]
    (pattern,) = re.findall(r'"~(.*?)" ', client)
    network = re.compile(pattern.replace("?<", "?P<"))
    found = network.match("2001:db8:1:2:3:4:5:6")
    assert found
    assert found[1] == "2001:db8:1:2"
    assert not network.match("192.0.2.1")
    assert not network.match("2001:db8::1")
    assert '127.0.0.1 "";' in client


def test_answers_are_compressed_only_when_told_to() -> None:
    def proxied(**settings: Any) -> str:
        (block,) = [block for block in blocks(render(**settings)[SITE], "location") if "proxy_pass" in block]
        return block

    assert "gzip off;" in proxied()
    assert "gzip off;" not in proxied(nginx_compress_answers=True)
    assert "gzip on;" in render()[SHARED]


def test_an_acme_authority_is_answered_by_plain_http() -> None:
    def plain(**settings: Any) -> str:
        (block,) = [block for block in blocks(render(**settings)[SITE], "server") if " ssl" not in block]
        return block

    assert "acme" not in plain()
    answers = "/var/lib/hardstand/acme-challenge"
    (location,) = [
        block for block in blocks(plain(nginx_acme_webroot=answers), "location") if "^~ /.well-known/" in block
    ]
    assert f"root {answers};" in location
    assert "error_page" not in location


def test_the_list_of_revoked_certificates_is_there_by_plain_http() -> None:
    assert "hardstand-ca.crl" not in render()[SITE]
    site = render(nginx_crl_file="/etc/ssl/hardstand/blog.crl")[SITE]
    (plain,) = [block for block in blocks(site, "server") if " ssl" not in block]
    assert "location = /.well-known/hardstand-ca.crl {" in plain
    assert "alias /etc/ssl/hardstand/blog.crl;" in plain


def test_what_a_load_balancer_cannot_answer_is_asked_of_the_others_once() -> None:
    settings = BALANCER | {"nginx_acme_webroot": "/acme", "nginx_acme_peers": ["10.0.0.8", "fd00::9"]}
    site = render(**settings)[SITE]
    (others,) = [block for block in blocks(site, "upstream") if "-acme" in block]
    assert re.findall(r"server (.*) max_fails=0;", others) == ["10.0.0.8:80", "[fd00::9]:80"]
    (peers,) = [block for block in blocks(site, "location") if "location @hardstand-acme-peers" in block]
    assert re.search(r"if \(\$http_x_hardstand_forwarded\) {\s+return 404;", peers)
    assert "proxy_set_header X-Hardstand-Forwarded 1;" in peers
    assert "acme" not in render(**MEMBER | {"nginx_acme_webroot": "/acme", "nginx_acme_peers": ["10.0.0.8"]})[SITE]


@each_place
def test_a_client_cannot_say_where_its_request_comes_from(place: dict[str, Any]) -> None:
    files = render(**place)
    found = re.findall(r"proxy_set_header (\S+) (.*);", files[PROXY] + files[SITE])
    sent = dict(found)
    assert len(sent) == len(found), "a header that is set twice is sent twice"
    assert sent["Host"] == "$host"
    assert sent["X-Forwarded-For"] == sent["X-Real-IP"] == "$remote_addr"
    assert sent["X-Forwarded-Proto"] == "https"
    # Only a load balancer can reach a member, and it sends its own.
    assert sent["X-Request-ID"] == ("$http_x_request_id" if place is MEMBER else "$request_id")
    for header in ("Forwarded", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Ssl", "X-Forwarded-Protocol"):
        assert sent[header] == '""'
    assert "$http_host" not in files[PROXY] + files[SITE]


@each_place
def test_no_location_drops_the_proxy_headers_with_one_of_its_own(place: dict[str, Any]) -> None:
    for block in blocks(render(**place)[SITE], "location"):
        assert "proxy_set_header" not in block


def test_forwarded_addresses_are_believed_from_trusted_proxies_alone() -> None:
    assert "real_ip" not in render()[SITE]
    site = render(nginx_trusted_proxies=["10.0.0.0/8", "fd00::/8"])[SITE]
    assert "set_real_ip_from 10.0.0.0/8;" in site
    assert "set_real_ip_from fd00::/8;" in site
    assert "real_ip_header X-Forwarded-For;" in site


@each_place
def test_connections_to_the_upstream_end_within_two_seconds(place: dict[str, Any]) -> None:
    """Cut-over and draining depend on it: nginx must let go of the old slot, and of a drained member, by itself."""
    (upstream,) = blocks(render(**place)[SITE], "upstream")
    assert ("server unix:/srv/blog/run/live.sock;" in upstream) == (place is not BALANCER)
    assert upstream.index("keepalive 64;") > upstream.find("least_conn;")
    assert "keepalive_time 2s;" in upstream
    assert "keepalive_timeout 2s;" in upstream
    assert "proxy_next_upstream off;" in render()[PROXY]


def test_unknown_names_reach_no_application() -> None:
    defaults = [block for block in blocks(render()[SHARED], "server") if "default_server" in block]
    assert len(defaults) == 2
    assert ["return 444;" in block for block in defaults] == [True, False]
    assert ["return 421;" in block for block in defaults] == [False, True]
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


def test_a_balancer_knows_every_member_and_never_runs_out_of_them() -> None:
    (upstream,) = blocks(render(**BALANCER)[SITE], "upstream")
    servers = re.findall(r"server (.*);", upstream)
    assert servers[:2] == [f"{server} max_fails=1 fail_timeout=3s" for server in BALANCER["nginx_upstream_servers"]]
    assert servers[2:] == [f"{server} max_fails=0 backup" for server in BALANCER["nginx_upstream_servers"]]
    assert "zone hardstand-blog" in upstream


def test_a_single_member_is_never_left_out() -> None:
    """nginx ignores max_fails where a group has one server, and it would have two with a backup."""
    (upstream,) = blocks(render(**BALANCER | {"nginx_upstream_servers": ["10.0.0.1:8443"]})[SITE], "upstream")
    assert len(re.findall(r"server ", upstream)) == 1
    (upstream,) = blocks(render(**BALANCER | {"nginx_upstream_servers": []})[SITE], "upstream")
    assert "server 127.0.0.1:1 down;" in upstream


def test_a_balancer_sends_again_what_is_safe_to_send_again() -> None:
    (location,) = [block for block in blocks(render(**BALANCER)[SITE], "location") if "proxy_pass" in block]
    assert "proxy_pass https://hardstand-blog;" in location
    assert "proxy_next_upstream error timeout;" in location
    assert "proxy_connect_timeout 2s;" in location
    for setting in ("verify on", "name blog.internal", "server_name on", "trusted_certificate /etc/ssl/fleet-ca.crt"):
        assert f"proxy_ssl_{setting};" in location
    # The member's own answer to a slow request comes first.
    assert "proxy_read_timeout 65s;" in render(**BALANCER)[SITE]
    assert "proxy_read_timeout 60s;" in render(**MEMBER)[SITE]


def test_a_member_answers_load_balancers_alone() -> None:
    files = render(**MEMBER)
    listens = set(re.findall(r"listen (.*);", files[SITE] + files[SHARED]))
    assert listens == {"8443 ssl", "[::]:8443 ssl", "8443 ssl default_server", "[::]:8443 ssl default_server"}
    (peers,) = blocks(files[SITE], "geo")
    assert "geo $realip_remote_addr $hardstand_blog_peer" in peers
    allowed = dict(re.findall(r"^\s+(\S+) (\S+);", peers, re.MULTILINE))
    assert allowed == {"default": '""', "127.0.0.1": "local", "::1": "local", "10.0.0.8": "lb", "fd00::9": "lb"}
    strangers, server = blocks(files[SITE], "server")
    assert "ssl_reject_handshake on;" in strangers
    assert re.search(r'if \(\$hardstand_blog_peer = ""\) {\s+return 444;', server)
    assert "server_name blog.internal blog.example.org www.example.org;" in server


def test_a_member_believes_load_balancers_alone() -> None:
    site = render(**MEMBER)[SITE]
    assert re.findall(r"set_real_ip_from (.*);", site) == ["10.0.0.8", "fd00::9"]


def test_headers_for_clients_come_from_the_load_balancer_alone() -> None:
    added = re.findall(r"add_header (\S+)", render(**MEMBER)[SITE])
    assert set(added) == {"Cache-Control", "Retry-After"}
    assert "add_header X-Request-ID" in render(**BALANCER)[HEADERS]
    # Not to be without it whoever it answers; the load balancer passes it on.
    assert sent_headers(**MEMBER) == {"Strict-Transport-Security": "max-age=63072000"}
    assert "hardstand_peer buffer" in render(**MEMBER)[SITE]


def test_a_member_without_an_application_leaves_the_answer_to_others() -> None:
    site = render(**MEMBER)[SITE]
    (unsent,) = [block for block in blocks(site, "map") if "_unsent" in block]
    assert '"lb:-" 1;' in unsent
    (page,) = [block for block in blocks(site, "location") if "^~ /.hardstand/" in block]
    assert re.search(r"if \(\$hardstand_blog_unsent\) {\s+return 444;", page)


def test_a_server_can_be_both() -> None:
    """Both sites write the shared files, so they have to agree on them."""
    both = {"nginx_client_ports": True}
    member = render(**MEMBER | both)
    balancer = render(**BALANCER | both | {"nginx_site": "blog-lb"})
    shared = member.keys() & balancer.keys()
    assert len(shared) >= 5
    assert {path: member[path] for path in shared} == {path: balancer[path] for path in shared}
    assert "443 ssl default_server" in member[SHARED]


@pytest.mark.parametrize("place", [{}, BALANCER], ids=["alone", "balancer"])
def test_maintenance_begins_with_a_file(place: dict[str, Any]) -> None:
    site = render(**place, nginx_maintenance_allow=["192.0.2.0/24"], nginx_maintenance_paths=["/health/", "/a.b"])[SITE]
    (server,) = [block for block in blocks(site, "server") if " ssl" in block]
    assert "if (-f /etc/hardstand/maintenance/blog/on)" in server
    assert "error_page 599 =503 /.hardstand/maintenance/page.$hardstand_page_type;" in server
    (closed,) = [block for block in blocks(site, "map") if "_closed" in block]
    open_at = [re.compile(pattern) for pattern in re.findall(r'^\s+"?~(.*?)"? "";', closed, re.MULTILINE)]
    assert "volatile;" in closed
    for path, is_open in {"/health/live": True, "/a.b/c": True, "/axb": False, "/x/health/": False}.items():
        assert any(pattern.search(path) for pattern in open_at) == is_open, path
    # The page itself has to be reachable, or nginx would go round in a circle.
    assert any(pattern.search("/.hardstand/maintenance/page.html") for pattern in open_at)
    (page,) = [block for block in blocks(server, "location") if "/maintenance/" in block]
    assert "internal;" in page
    assert "add_header Retry-After 120 always;" in page


def test_maintenance_is_the_business_of_the_site_that_faces_clients() -> None:
    assert "maintenance" not in render(**MEMBER)[SITE]


@pytest.mark.parametrize(("message", "text"), [("", "The application is down"), ('<b> & "', '<b> & "')])
def test_the_maintenance_pages_say_what_they_are_told(message: str, text: str) -> None:
    def page(kind: str) -> str:
        lookup = f"lookup('ansible.builtin.template', 'maintenance.{kind}.j2')"
        return str(evaluate("nginx", lookup, nginx_maintenance_message=message, **REQUIRED))

    assert text in json.loads(page("json"))["detail"]
    assert html.escape(text).replace("&quot;", "&#34;") in page("html")


@pytest.mark.parametrize(
    ("said", "meant"), [("on", True), ("off", False), ("true", True), ("false", False), ("yes", True), ("no", False)]
)
def test_maintenance_has_the_names_that_yaml_has(said: str, meant: bool) -> None:
    begins = evaluate("nginx", "_nginx_maintenance_begins", nginx_maintenance_state=said, **REQUIRED)
    assert begins is meant


def test_sound_settings_are_no_problem() -> None:
    assert problems() == []
    assert problems(**BALANCER) == []
    assert problems(**MEMBER) == []
    assert problems(**MEMBER | {"nginx_peers": [""]}, ansible_check_mode=True) == []
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
        ("nginx_upstream_socket", ""),
        ("nginx_upstream_servers", ["app1:8443"]),
        ("nginx_maintenance_paths", ["health"]),
        ("nginx_maintenance_allow", ["office"]),
        ("nginx_content_security_policy", "script-src 'nonce-$x'"),
        ("nginx_response_headers", {"X Y": "z"}),
        ("nginx_response_headers", {"X-Y": "a\nb"}),
        ("nginx_hsts_preload", True),
        ("nginx_acme_webroot", "acme"),
        ("nginx_acme_peers", ["lb2"]),
        ("nginx_crl_file", "ca.crl"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: Any) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(name)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (BALANCER, "nginx_upstream_ca_file", ""),
        (BALANCER, "nginx_upstream_name", ""),
        (MEMBER, "nginx_peers", ["10.0.0.8", ""]),
        (MEMBER, "nginx_peers", ["lb.example.org"]),
        (MEMBER, "nginx_peer_port", 443),
    ],
)
def test_a_wrong_setting_of_a_fleet_is_named(place: dict[str, Any], name: str, value: Any) -> None:
    (problem,) = problems(**place | {name: value})
    if name == "nginx_upstream_name":  # then it is a site of its own, and lacks the socket
        name = "nginx_upstream_socket"
    assert problem.startswith(name)
