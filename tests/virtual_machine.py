"""Servers that are machines of their own, with a kernel and a boot loader: for what no container can show.

QEMU runs them, by KVM where this machine has it, else by emulation, some ten times slower. They are reached at
addresses of this machine's loopback network (127.0.0.0/8), at the ports that they have themselves: QEMU passes
connections on, so that nothing has to be set up in this machine's own network.
"""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from tests.ssh_login import ssh_command

PROJECT = Path(__file__).resolve().parents[1]

PORTS = (22, 80, 443)


def make_disk(release: str) -> Path:
    """Return the disk of a bare Debian server, made unless it is there; `release` is 12 or 13."""
    made = subprocess.run(
        ["molecule/shared/images", "--disk", f"debian{release}"], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    if made.returncode != 0:
        raise RuntimeError(f"the disk of Debian {release} could not be made")
    return Path(made.stdout.strip())


@functools.cache
def accelerator() -> str:
    """Return what QEMU can run processors with here.

    Some machines have /dev/kvm and QEMU fails on it as soon as there is a processor, without turning to emulation.
    """
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "max", "-nodefaults", "-display", "none", "-S"]
    tried = subprocess.run([*command, "-monitor", "stdio"], input=b"quit\n", capture_output=True, timeout=60)
    return "kvm" if tried.returncode == 0 else "tcg,thread=multi"


class VirtualMachine:
    """A virtual machine with a disk of its own, which goes when it does.

    `key` is the private key that root logs in with at first, `user` who logs in at the moment.
    """

    def __init__(self, release: str, address: str, key: Path, directory: Path) -> None:
        self.release = release
        self.address = address
        self.key = key
        self.user = "root"
        self.directory = directory / f"machine-{address}"
        self.known_hosts = self.directory / "known_hosts"

    @property
    def console(self) -> Path:
        """What the machine says while it boots."""
        return self.directory / "console"

    def start(self, seconds: float = 600) -> None:
        """Boot the machine and wait until it answers; raises TimeoutError with the console's last lines."""
        self.directory.mkdir(parents=True)
        disk = self.directory / "disk.qcow2"
        base = ["-b", str(make_disk(self.release)), "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(disk)], check=True)
        public = self.key.with_name(f"{self.key.name}.pub").read_text().strip()
        forwards = "".join(f",hostfwd=tcp:{self.address}:{port}-:{port}" for port in PORTS)
        command = [
            *("qemu-system-x86_64", "-accel", accelerator(), "-cpu", "max", "-smp", "2", "-m", "1536"),
            *("-display", "none", "-monitor", "none", "-serial", f"file:{self.console}"),
            # Losing a machine's disk is losing nothing: nobody waits for this machine's disk to have written.
            *("-drive", f"file={disk},if=virtio,format=qcow2,cache=unsafe", "-device", "virtio-rng-pci"),
            *("-nic", f"user,model=virtio-net-pci{forwards}"),
            # systemd takes credentials from the firmware's tables: https://systemd.io/CREDENTIALS
            *("-smbios", f"type=11,value=io.systemd.credential:ssh.authorized_keys.root={public}"),
        ]
        with (self.directory / "qemu.log").open("w") as log:
            # In a session of its own: Ctrl-C is for whoever started this, who then stops the machine.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        """Wait until the machine answers and has booted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"QEMU ended: {(self.directory / 'qemu.log').read_text()}")
            if not self.known_hosts.exists() or not self.known_hosts.read_text():
                self._learn_host_key()
            # "degraded" is up as well; what has failed is a test's business.
            elif self.sh("systemctl is-system-running --wait", check=False, seconds=120) in ("running", "degraded"):
                return
            time.sleep(0.5)
        raise TimeoutError(f"{self.address} does not answer: {self.console.read_text(errors='replace')[-2000:]}")

    def _learn_host_key(self) -> None:
        # Nobody else answers at an address of this machine's own.
        scan = ["ssh-keyscan", "-T", "5", "-t", "ed25519", self.address]
        found = subprocess.run(scan, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.known_hosts.write_text(found.stdout)

    def _as_root(self, command: str) -> list[str]:
        become = "" if self.user == "root" else "sudo -n "
        login = f"{self.user}@{self.address}"
        return ssh_command(login, f"{become}sh -c {shlex.quote(command)}", self.key, self.known_hosts, 10)

    def sh(self, command: str, check: bool = True, seconds: float = 1800) -> str:
        """Run a shell command as root and return what it printed; raises RuntimeError when it fails."""
        done = subprocess.run(
            self._as_root(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        if check and done.returncode != 0:
            said = done.stdout[-2000:] + done.stderr[-2000:]
            raise RuntimeError(f"{command[:200]} ended with {done.returncode}: {said}")
        return done.stdout.strip()

    def write(self, path: str, content: bytes) -> None:
        """Write a file as root."""
        subprocess.run(self._as_root(f"cat >{shlex.quote(path)}"), input=content, check=True, timeout=300)

    def boot_id(self) -> str:
        """Return what every boot has another one of."""
        return self.sh("cat /proc/sys/kernel/random/boot_id")

    def stop(self) -> None:
        """End the machine as a power cut would, and remove its disk."""
        if hasattr(self, "process") and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
