"""The servers that bench/hardening measures: default installs and hardened ones, and one for the judges.

They are containers, or virtual machines for what a container cannot have: a kernel that is its own to set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
from tests.virtual_machine import VirtualMachine  # noqa: E402

CACHE = Path.home() / ".cache" / "hardstand" / "bench-hardening"
VENV = CACHE / "venv"
OBSERVATORY = CACHE / "observatory"

RELEASES = ("12", "13")
PREFIX = "hardstand-bench-hardening"
JUDGE = f"{PREFIX}-judge"
SUBNET, SUBNET6 = "10.213.83", "fd00:213:83:"
# Virtual machines are at addresses of this machine's own, and this machine has this one for them.
LOOPBACK, QEMU_HOST = "127.0.83", "10.0.2.2"
ADMIN = "ada"

# Judges from PyPI and npm. The others are those of Debian 13, on whatever the servers run.
REQUIREMENTS = "sslyze==6.3.1\ngixy-ng==0.2.59\nssh-audit==3.9.0\n"
OBSERVATORY_PACKAGE = "@mdn/mdn-http-observatory@1.4.8"
JUDGE_PACKAGES = "testssl.sh slowhttptest nodejs bsdextrautils procps xxd bind9-dnsutils ca-certificates"

# The application's answer to /api/posts/bench/seen: what has reached it of a request.
ROUTE = '''

@router.get("/bench/seen")
async def seen(request: Request) -> dict[str, object]:
    """Say what has reached the application of a request."""
    client = request.client.host if request.client else ""
    return {"client": client, "scheme": request.url.scheme, "headers": list(request.headers.items())}
'''

# The same of an application behind a default nginx.
ECHO = """import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        headers = [(name.lower(), value) for name, value in self.headers.items()]
        scheme = self.headers.get("X-Forwarded-Proto", "http")
        said = {"client": self.headers.get("X-Forwarded-For", ""), "scheme": scheme, "headers": headers}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
ECHO_PROGRAM = """[program:echo]
command=/usr/bin/python3 /opt/echo.py
user=www-data
"""

# A site as most are written: Debian's files, and nothing of TLS but the certificate.
SITE = """server {
    listen 443 ssl;
    listen [::]:443 ssl;
    server_name DOMAIN;
    ssl_certificate /etc/ssl/bench.crt;
    ssl_certificate_key /etc/ssl/bench.key;
    root /var/www/html;
    index index.nginx-debian.html;
    location /api/ {
        include proxy_params;
        proxy_pass http://127.0.0.1:8000;
    }
}
"""
HOPS = """server {
    listen 8443 ssl;
    ssl_certificate /etc/ssl/bench.crt;
    ssl_certificate_key /etc/ssl/bench.key;
    location / {
        include proxy_params;
        proxy_pass https://127.0.0.1:8444;
    }
}
server {
    listen 127.0.0.1:8444 ssl;
    ssl_certificate /etc/ssl/bench.crt;
    ssl_certificate_key /etc/ssl/bench.key;
    location / {
        include proxy_params;
        proxy_pass http://127.0.0.1:8000;
    }
}
"""

OPENSSL = """[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectAltName = ${ENV::NAMES}
"""


def note(message: str) -> None:
    """Say how far this is, where it is in nobody's way."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr, flush=True)


def run(
    command: list[str], codes: Container[int] = (0,), stdin: str | None = None, seconds: float = 900, **environment: str
) -> str:
    """Run a command from the project's directory and return its output; raise RuntimeError when it fails."""
    result = subprocess.run(
        command,
        cwd=PROJECT,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **environment},
    )
    if result.returncode not in codes:
        raise RuntimeError(
            f"{' '.join(command)[:200]} ended with {result.returncode}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
        )
    return result.stdout


def judge(command: str, codes: Container[int] = (0,)) -> str:
    """Run a shell command where the judges are that have to be new."""
    return run(["podman", "exec", JUDGE, "sh", "-c", command], codes)


@dataclass(frozen=True)
class Server:
    """A server to be judged, a container; `kind` is default, single, lb or app."""

    kind: str
    release: str
    number: int
    exchange: Path

    declared = frozenset({22, 80, 443})

    @property
    def name(self) -> str:
        """A name that no other server has."""
        return f"{self.kind}{self.release}"

    @property
    def container(self) -> str:
        """The container's name."""
        return f"{PREFIX}-{self.name}"

    @property
    def address(self) -> str:
        """The IPv4 address."""
        return f"{SUBNET}.{self.number}"

    @property
    def address6(self) -> str:
        """The IPv6 address."""
        return f"{SUBNET6}:{self.number}"

    @property
    def is_default(self) -> bool:
        """Whether nothing is hardened on it."""
        return self.kind in ("default", "bare")

    @property
    def environment(self) -> str:
        """The environment that it belongs to."""
        return "fleet" if self.kind in ("lb", "app") else self.name

    @property
    def domain(self) -> str:
        """The name by which clients know it."""
        return f"{self.environment}.hardstand.test"

    @property
    def ca(self) -> Path:
        """The certificate of the authority that has signed the server's."""
        return self.exchange / f"{self.name}.crt"

    @property
    def path(self) -> str:
        """Something that the application answers without work."""
        return "/api/live" if self.is_default else "/health/live"

    def start(self) -> None:
        """Boot the server, and wait until it is up."""
        image = os.environ.get(f"HARDSTAND_IMAGE_DEBIAN{self.release}") or f"localhost/hardstand/debian{self.release}"
        # NET_ADMIN: the firewall is the server's own kernel's. AUDIT_WRITE: sshd ends a session that it may not tell
        # the audit log about. SYS_ADMIN: systemd gives a sandbox mounts of its own.
        capabilities = [f"--cap-add={name}" for name in ("NET_ADMIN", "AUDIT_WRITE", "SYS_ADMIN")]
        addresses = ["--network", PREFIX, "--ip", self.address, "--ip6", self.address6]
        name = ["--name", self.container, "--hostname", self.container]
        run(["podman", "run", "--detach", "--systemd=always", *name, *addresses, *capabilities, image])
        for _ in range(240):
            state = subprocess.run(
                ["podman", "exec", self.container, "systemctl", "is-system-running"], capture_output=True, text=True
            ).stdout.strip()
            # "degraded" is up as well: a unit that a container cannot run is not the point.
            if state in ("running", "degraded"):
                return
            time.sleep(0.5)
        raise RuntimeError(f"{self.container} has not booted; systemd says: {state or 'nothing'}")

    def stop(self) -> None:
        """End the server. Containers are removed together."""

    def administered_by(self, name: str) -> None:
        """Take note that root no longer logs in, and who does."""

    def sh(self, command: str) -> str:
        """Run a shell command as root on the server, and return what it printed."""
        return run(["podman", "exec", self.container, "sh", "-c", command]).strip()

    def write(self, path: str, content: str) -> None:
        """Write a file on the server."""
        run(["podman", "exec", "--interactive", self.container, "sh", "-c", f"cat >{path}"], stdin=content)

    def put(self, file: Path, path: str) -> None:
        """Copy a file to the server."""
        run(["podman", "cp", str(file), f"{self.container}:{path}"])

    def give_access(self, key: Path) -> str:
        """Let root log in with a key, which is made unless it is there; returns the server's own public key."""
        give = 'source bin/lib.sh; give_access "$1" "$2"'
        return run(["bash", "-c", give, "bash", self.container, str(key)]).strip()

    @contextmanager
    def two_hops(self) -> Iterator[int]:
        """Put a second default nginx before the first, as long as this lasts; yields its port."""
        self.write("/etc/nginx/sites-enabled/hops", HOPS)
        self.sh("nginx -t -q && systemctl reload nginx")
        try:
            time.sleep(1)
            yield 8443
        finally:
            self.sh("rm /etc/nginx/sites-enabled/hops && systemctl reload nginx")


@dataclass(frozen=True)
class VirtualServer(Server):
    """A server to be judged, a virtual machine; `kind` is bare or machine, which are what default and single are."""

    machine: VirtualMachine

    @property
    def address(self) -> str:
        """The IPv4 address, one of this machine's own."""
        return self.machine.address

    def start(self) -> None:
        """Boot the server, and wait until it is up."""
        self.machine.start()

    def stop(self) -> None:
        """End the server."""
        self.machine.stop()

    def administered_by(self, name: str) -> None:
        """Take note that root no longer logs in, and who does."""
        self.machine.user = name

    def sh(self, command: str) -> str:
        """Run a shell command as root on the server, and return what it printed."""
        return self.machine.sh(command)

    def write(self, path: str, content: str) -> None:
        """Write a file on the server."""
        self.machine.write(path, content.encode())

    def put(self, file: Path, path: str) -> None:
        """Copy a file to the server."""
        self.machine.write(path, file.read_bytes())

    def give_access(self, _: Path) -> str:
        """Return the server's own public key. Root logs in with the key that the machine was made with."""
        return self.machine.known_hosts.read_text().partition(" ")[2].strip()


class Servers(dict[str, Server]):
    """All servers, by name. `directory` is for files that live as long as they do."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.exchange = directory / "exchange"
        self.exchange.mkdir()
        self.key = directory / "key"
        self.environments = directory / "inventories"
        os.environ["CONTAINERS_CONF"] = run(["molecule/shared/containers-conf"]).strip()
        # ansible.cfg's script asks for it before the playbook could make one.
        password = directory / "vault-password"
        password.write_text(os.urandom(32).hex())
        password.chmod(0o600)
        os.environ["HARDSTAND_VAULT_PASSWORD_FILE"] = str(password)

    def make(self, kinds: Set[str], judges: Set[str]) -> None:
        """Make servers of these kinds and what these judges need; hardened servers are deployed to."""
        self.remove()
        note("Making the images, unless they are there")
        run(["molecule/shared/images"], seconds=1800)
        numbers = {"default": 10, "single": 20, "lb": 30}
        wanted = [(kind, release, numbers[kind] + int(release)) for kind in numbers for release in RELEASES]
        wanted += [("app", "13", 53)]
        for kind, release, number in wanted:
            if kind in kinds or (kind == "app" and "lb" in kinds):
                server = Server(kind, release, number, self.exchange)
                self[server.name] = server
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", ADMIN, "-f", str(self.key)])
        for kind, first in {"bare": 60, "machine": 80}.items():
            for release in RELEASES if kind in kinds else ():
                number = first + int(release)
                machine = VirtualMachine(release, f"{LOOPBACK}.{number}", self.key, self.directory)
                virtual = VirtualServer(kind, release, number, self.exchange, machine)
                self[virtual.name] = virtual
        networks = [part for net, size in ((f"{SUBNET}.", 24), (f"{SUBNET6}:", 64)) for part in _subnet(net, size)]
        run(["podman", "network", "create", "--disable-dns", "--ipv6", *networks, PREFIX])
        self._repository()
        for server in self.values():
            server.start()
        environments = sorted({server.environment for server in self.values() if not server.is_default})
        note(f"Making {', '.join(self)}, and what the judges need")
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(self._install_default, server) for server in self.values() if server.is_default]
            jobs += [pool.submit(self._deploy, environment) for environment in environments]
            jobs += [pool.submit(self._make_judge, judges)]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:  # interrupted, or one has failed: the others are not to be waited for
                self.remove()
                raise

    def remove(self) -> None:
        """Remove the servers and the network, containers that an earlier run has left as well."""
        for server in self.values():
            server.stop()
        found = run(["podman", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^{PREFIX}-"]).split()
        if found:
            run(["podman", "rm", "--force", "--volumes", "--time", "0", *found])
        # 1: there is none.
        run(["podman", "network", "rm", "--force", PREFIX], codes=(0, 1))

    # Default installs

    def _install_default(self, server: Server) -> None:
        openssl = self.directory / "openssl.cnf"
        openssl.write_text(OPENSSL)
        own = self.directory / server.name
        common = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "365", "-config", str(openssl)]
        names = f"DNS:{server.domain}"
        run(
            [
                *common,
                "-extensions",
                "authority",
                "-subj",
                "/CN=Bench",
                "-keyout",
                f"{own}-ca.key",
                "-out",
                str(server.ca),
            ],
            NAMES=names,
        )
        signer = ["-CA", str(server.ca), "-CAkey", f"{own}-ca.key", "-extensions", "server"]
        run(
            [*common, *signer, "-subj", f"/CN={server.domain}", "-keyout", f"{own}.key", "-out", f"{own}.pem"],
            NAMES=names,
        )
        server.sh(
            "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update &&"
            " apt-get -qq install openssh-server nginx supervisor >/dev/null 2>&1"
        )
        server.write("/etc/ssl/bench.crt", Path(f"{own}.pem").read_text())
        server.write("/etc/ssl/bench.key", Path(f"{own}.key").read_text())
        server.write("/etc/nginx/sites-enabled/site", SITE.replace("DOMAIN", server.domain))
        server.write("/opt/echo.py", ECHO)
        server.write("/etc/supervisor/conf.d/echo.conf", ECHO_PROGRAM)
        server.sh("chmod 0600 /etc/ssl/bench.key; supervisorctl update && nginx -t -q && systemctl restart nginx")

    # Hardened servers

    def _repository(self) -> None:
        """Clone this project, with a route that tells what reaches the application."""
        repository = self.directory / "repository"
        run(["git", "clone", "--quiet", str(PROJECT), str(repository)])
        with (repository / "app" / "posts.py").open("a") as file:
            file.write(ROUTE)
        identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        run(["git", "-C", str(repository), *identity, "commit", "--quiet", "--all", "--message", "Tell what comes"])

    def _deploy(self, environment: str) -> None:
        """Make an environment as its operator would, and deploy to it."""
        servers = [server for server in self.values() if server.environment == environment]
        known_hosts = [f"{server.address} {server.give_access(self.key)}" for server in servers]
        settings: dict[str, object] = {
            "release_repository": str(self.directory / "repository"),
            "release_workers": 2,
            # This machine, from which judges log in more often than people do.
            "ssh_trusted_sources": [f"{SUBNET}.1", f"{SUBNET6}:1", QEMU_HOST],
            # No optimised build: it takes many minutes, and what it builds behaves the same.
            "python_configure_options": [],
            "python_source_directory": run(["molecule/shared/python-sources"]).strip().splitlines()[-1],
            # The authorities this machine was told to trust, because what it downloads comes through them.
            "base_extra_ca_files": sorted(map(str, Path("/usr/local/share/ca-certificates").glob("*.crt"))),
        }
        if servers[0].kind == "machine":
            settings["release_health_timeout"] = 600  # emulation is slow
        if environment == "fleet":
            # As Mozilla's guideline wants it with "modern".
            settings |= {"nginx_tls_policy": "modern", "certificate_days": 90, "certificate_renew_days": 30}
        variables = {
            "env": environment,
            "environment_inventories": str(self.environments),
            "environment_host": ",".join(server.address for server in servers if server.kind != "lb"),
            "environment_lb": ",".join(server.address for server in servers if server.kind == "lb"),
            "environment_domain": servers[0].domain,
            "environment_admin": ADMIN,
            "environment_admin_key": self.key.with_name("key.pub").read_text().strip(),
            "environment_private_key_file": str(self.key),
            "environment_known_hosts": known_hosts,
            "environment_settings": settings,
        }
        run(["ansible-playbook", "playbooks/environment.yml", "-e", json.dumps(variables)])
        begun = time.monotonic()
        run(["ansible-playbook", "deploy.yml", "-i", str(self.environments / environment)], seconds=3600)
        note(f"Deployed {environment} in {time.monotonic() - begun:.0f} s")
        for server in servers:
            server.administered_by(ADMIN)
            server.ca.write_text((self.environments / environment / "pki" / "ca.crt").read_text())

    # Judges

    def _make_judge(self, judges: Set[str]) -> None:
        """Make the virtualenv, and the container of the judges that have to be newer than a server's release."""
        requirements = self.directory / "requirements.txt"
        requirements.write_text(REQUIREMENTS)
        CACHE.mkdir(parents=True, exist_ok=True)
        make = 'source bin/lib.sh; make_venv "$1" "the judges" "$2"'
        run(["bash", "-euc", make, "bash", str(VENV), str(requirements)])
        if "observatory" in judges:
            self._install_observatory()
        OBSERVATORY.mkdir(exist_ok=True)
        image = os.environ.get("HARDSTAND_IMAGE_DEBIAN13") or "localhost/hardstand/debian13"
        names = [
            f"--add-host={server.domain}:{server.address}"
            for server in self.values()
            if server.kind in ("default", "single")
        ]
        run(
            [
                *("podman", "run", "--detach", "--name", JUDGE, "--network", PREFIX, "--ip", f"{SUBNET}.9"),
                *("--volume", f"{self.exchange}:/bench:ro", "--volume", f"{OBSERVATORY}:/observatory:ro", *names),
                *(image, "sleep", "infinity"),
            ]
        )
        if judges & {"testssl", "lynis", "observatory", "slowhttptest"}:
            judge(
                "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update &&"
                f" apt-get -qq install --no-install-recommends {JUDGE_PACKAGES} >/dev/null 2>&1 &&"
                " cd /root && apt-get -qq download lynis 2>/dev/null"
            )
            package = judge("cd /root && echo lynis_*.deb").strip()
            run(["podman", "cp", f"{JUDGE}:/root/{package}", str(self.exchange / package)])

    def _install_observatory(self) -> None:
        package = OBSERVATORY / "node_modules" / "@mdn" / "mdn-http-observatory"
        stamp = OBSERVATORY / ".made-for"
        if stamp.exists() and stamp.read_text() == OBSERVATORY_PACKAGE:
            return
        # Its own script for after the installation would download a list of Chromium's, of names that are not ours.
        run(
            [
                "npm",
                "install",
                "--prefix",
                str(OBSERVATORY),
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                OBSERVATORY_PACKAGE,
            ]
        )
        (package / "conf" / "hsts-preload.json").write_text("{}")
        stamp.write_text(OBSERVATORY_PACKAGE)


def _subnet(prefix: str, size: int) -> list[str]:
    zero = f"{prefix}0" if size == 24 else prefix
    return ["--subnet", f"{zero}/{size}", "--gateway", f"{prefix}1"]
