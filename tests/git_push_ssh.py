"""What ssh and sshd are to git, without a network: GIT_SSH_COMMAND for tests/test_git_push.py.

Runs the forced command in a session of its own, behind pipes, and carries bytes. Interrupted or killed, it is as a lost
connection is to sshd: the pipes close, and the server's side gets no signal.

    git_push_ssh.py FORCED_COMMAND WHO HOST COMMAND
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import IO


def carry(source: int, target: IO[bytes]) -> None:
    """Copy until the end of the source."""
    while data := os.read(source, 65536):
        target.write(data)
        target.flush()


def main() -> int:
    """Serve one connection; returns the exit code of the forced command."""
    forced, who, command = sys.argv[1], sys.argv[2], sys.argv[-1]
    with subprocess.Popen(
        [forced, who],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "SSH_ORIGINAL_COMMAND": command},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as server:
        assert server.stdin
        assert server.stdout
        assert server.stderr

        def send() -> None:
            assert server.stdin
            carry(0, server.stdin)
            server.stdin.close()

        threading.Thread(target=send, daemon=True).start()
        errors = threading.Thread(target=carry, args=(server.stderr.fileno(), sys.stderr.buffer))
        errors.start()
        carry(server.stdout.fileno(), sys.stdout.buffer)
        errors.join()
    return server.returncode


if __name__ == "__main__":
    sys.exit(main())
