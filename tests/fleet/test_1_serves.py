"""A freshly deployed fleet, as clients see it through the load balancer, and as nobody may see it."""

from __future__ import annotations

import json
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fleet.fleet import LB_LOG, Fleet
from tests.harness import APP, DOMAIN, Client, Repository, Server, wait_for

# What an application server is called in its certificate for load balancers.
MEMBER = f"{APP}.internal"

# Makes one request over TLS from a server, which has Python and little else, and prints the answer.
_FETCH = """
import http.client, json, socket, ssl, sys
address, port, name, path, headers = json.loads(sys.argv[1])
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
try:
    connection = http.client.HTTPSConnection(name, timeout=10)
    connection.sock = context.wrap_socket(socket.create_connection((address, port), 10), server_hostname=name)
    connection.request("GET", path, headers=headers)
    print(connection.getresponse().read().decode())
except (OSError, http.client.HTTPException) as error:
    print("no answer:", type(error).__name__)
"""


def fetch(server: Server, address: str, port: int, path: str, name: str = DOMAIN, **headers: str) -> str:
    """Make a request from one of the servers, to what goes by a name at an address."""
    wanted = json.dumps([address, port, name, path, {"Host": DOMAIN, **headers}])
    return server.sh(f"python3 -c '{_FETCH}' '{wanted}'")


@pytest.mark.exhaustive
def test_nothing_new_changes_nothing(fleet: Fleet) -> None:
    before = fleet.state()
    again = fleet.expect("deploy.yml")
    assert again.changed == 0, again.output
    assert fleet.state() == before


@pytest.mark.exhaustive
def test_check_mode_changes_nothing(fleet: Fleet, repository: Repository) -> None:
    before = fleet.state()
    run = fleet.expect("deploy.yml", "--check", "--diff", release_repository=str(repository.path))
    assert run.changed > 0
    assert fleet.state() == before
    assert fleet.locked() == []


def test_https_is_verified_and_serves_the_page(fleet: Fleet) -> None:
    page = fleet.lb.request("GET", "/")
    assert page.status == 200
    assert b"<title>" in page.body
    with pytest.raises(ssl.SSLCertVerificationError):
        Client(replace(fleet.lb, ca=Path("/etc/ssl/certs/ca-certificates.crt"))).request("GET", "/")


def test_http_leads_to_https(fleet: Fleet) -> None:
    response = fleet.lb.plain("/api/info?x=1")
    assert response.status in (301, 308)
    assert response.headers["Location"] == f"https://{DOMAIN}/api/info?x=1"


def test_all_application_servers_share_the_requests(fleet: Fleet) -> None:
    release = fleet.release()
    seen = fleet.who_answers()
    assert seen.kinds() == []
    counts = {host: sum(releases.values()) for host, releases in seen.served["start"].items()}
    assert set(counts) == set(fleet.apps)
    assert min(counts.values()) > max(counts.values()) / 3, counts
    assert seen.releases() == {release}


def test_a_post_is_written_on_one_server_and_read_on_all(fleet: Fleet) -> None:
    made = fleet.lb.request("POST", "/api/posts", {"title": "shared", "body": "hello"})
    assert made.status == 201
    assert made.headers["Location"].startswith("/")
    titles = {fleet.lb.request("GET", made.headers["Location"]).json()["title"] for _ in range(9)}
    assert titles == {"shared"}


def test_application_servers_answer_load_balancers_alone(fleet: Fleet) -> None:
    for name in fleet.apps:
        address = fleet.addresses[name]
        listening = fleet.apps[name].sh("ss --no-header --listening --tcp --numeric").splitlines()
        ports = {
            int(line.split()[3].rpartition(":")[2]) for line in listening if not line.split()[3].startswith("127.")
        }
        assert 443 not in ports
        assert 80 not in ports
        for port in ports - {22}:
            assert "release" in fetch(fleet.lb, address, port, "/api/info", MEMBER), (
                f"{name} does not serve the load balancer"
            )
            for outsider in (fleet.database, *(fleet.apps[other] for other in fleet.apps if other != name)):
                answer = fetch(outsider, address, port, "/api/info", MEMBER)
                assert answer.startswith("no answer"), f"{name}:{port} answers {outsider.name}"


def test_what_a_client_claims_does_not_reach_the_application(fleet: Fleet, repository: Repository) -> None:
    fleet.deploy(repository)
    claims = {
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Port": "81",
        "Forwarded": "for=203.0.113.7;proto=http;host=evil.example",
        "X-Real-IP": "203.0.113.7",
        "X-Request-ID": "203.0.113.7",
    }
    told = fetch(fleet.database, fleet.addresses[fleet.lb.name], 443, "/api/posts/seen", **claims)
    seen = json.loads(told)
    assert seen["client"] == fleet.addresses[fleet.database.name]
    assert seen["scheme"] == "https"
    assert seen["headers"]["host"] == DOMAIN
    assert "203.0.113.7" not in told
    assert "evil.example" not in told


def test_another_name_is_refused(fleet: Fleet) -> None:
    answer = fetch(fleet.database, fleet.addresses[fleet.lb.name], 443, "/api/info", Host="evil.example")
    assert "release" not in answer


def test_one_request_id_from_client_to_application(fleet: Fleet, repository: Repository) -> None:
    fleet.deploy(repository)
    reply = fleet.lb.request("GET", "/api/posts/seen")
    request_id = reply.headers["X-Request-ID"]
    assert len(reply.headers.get_all("X-Request-ID") or []) == 1
    assert len(reply.headers.get_all("Strict-Transport-Security") or []) == 1
    assert reply.json()["headers"]["x-request-id"] == request_id

    def logged() -> bool:
        places = [(fleet.lb, LB_LOG), *((app, f"/var/log/nginx/{APP}.access.log") for app in fleet.apps.values())]
        return sum(server.sh(f"grep -c {request_id} {log}", check=False) == "1" for server, log in places) == 2

    wait_for(logged, 5, "the request in the load balancer's log and in one application server's")


def test_the_load_balancer_adds_nothing_to_an_error_of_the_application(fleet: Fleet) -> None:
    reply = fleet.lb.request("GET", f"/api/posts/{2**40}")
    assert reply.status == 404
    assert reply.json()["detail"] == "There is no such post."
