"""The deploy lock: one file per application on each server, held by one run of Ansible at a time.

The file is JSON and says who holds it, from which machine, since when and until when. Its semantics:

Taking it is atomic
    The file is created and written under ``flock``, and a writer looks again, after it has the flock, whether the
    file it holds is still the file that the name leads to. Two runs that find a stale lock cannot both take it.
Taking it twice is harmless
    A run that holds it (same token) takes it again and extends the lease.
It ends
    by being released; with a reboot of the server, which clears /run; when the lease is over, counted by the
    server's boot-time clock, because the wall clock of a fresh server may still jump; or when the caller names the
    token of a holder that it knows to be dead (it runs on the same machine and can see that the process is gone).
A file that is not a lock, or not root's, is no lock
    /run/lock is open to every local user, who could otherwise hold up deploys by leaving a file there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import typing as t
from pathlib import Path

Holder = dict[str, t.Any]


class DeployLock:
    """The lock at ``path``, for the run that ``token`` names."""

    def __init__(self, path: str, token: str) -> None:
        self.path = path
        self.token = token

    def acquire(self, holder: Holder, lease: int, dead_token: str = "", force: bool = False) -> Holder | None:
        """Take the lock.

        Args:
            holder: what to write about the holder, for people and for a holder's own machine.
            lease: seconds after which the lock is free again, even if nobody released it.
            dead_token: token of a holder that is known to be dead.
            force: take the lock from whoever holds it.

        Returns:
            None when the lock is ours, otherwise what the file says of its holder.

        Raises:
            OSError: the directory of the lock cannot be written.
        """
        with self._open() as descriptor:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            other = self._read(descriptor)
            token = other.get("token")
            if token and token not in (self.token, dead_token) and not force and now < other.get("expires", 0):
                return other
            content = {
                **holder,
                "token": self.token,
                "since": other.get("since")
                if token == self.token
                else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "expires": now + lease,
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)
            return None

    def release(self) -> bool:
        """Give the lock back if this run holds it; returns whether it did. Raises nothing."""
        try:
            with self._open(create=False) as descriptor:
                if self._read(descriptor).get("token") != self.token:
                    return False
                Path(self.path).unlink()
                return True
        except OSError:
            return False

    @contextlib.contextmanager
    def _open(self, create: bool = True) -> t.Iterator[int]:
        """Yield a descriptor of the lock file, under flock, that is sure to be the file at the path."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        while True:
            with contextlib.suppress(FileNotFoundError):
                if Path(self.path).lstat().st_uid != os.geteuid():
                    Path(self.path).unlink()
            descriptor = os.open(self.path, flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                opened = os.fstat(descriptor)
                try:
                    named = Path(self.path).lstat()
                except FileNotFoundError:
                    continue
                if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    @staticmethod
    def _read(descriptor: int) -> Holder:
        try:
            content = json.loads(os.pread(descriptor, 65536, 0))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}
