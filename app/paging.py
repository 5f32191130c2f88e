"""Cursors: where a list goes on, handed to the client and back."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

_ID_BYTES = 8
_SIGNATURE_BYTES = 16


class CursorError(Exception):
    """Not a cursor that was given out with this key."""


class CursorSigner:
    """Makes and reads opaque cursors.

    A cursor is the last id of a page, signed: clients cannot come to depend on what is inside, and nothing but ids
    that were given out reaches the database. The key is the same for all workers, hosts and releases, so a client
    that is paging does not notice a deploy.
    """

    def __init__(self, key: str) -> None:
        # A key of its own for this purpose: a signature made here means nothing elsewhere.
        self._key = hmac.digest(key.encode(), b"paging cursor", hashlib.sha256)

    def encode(self, last_id: int) -> str:
        """Make the cursor for what comes after `last_id`."""
        payload = last_id.to_bytes(_ID_BYTES)
        return base64.urlsafe_b64encode(payload + self._sign(payload)).decode()

    def decode(self, cursor: str) -> int:
        """Read the id out of a cursor.

        Raises:
            CursorError: the cursor was changed, or made with another key.
        """
        try:
            raw = base64.b64decode(cursor, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        payload, signature = raw[:_ID_BYTES], raw[_ID_BYTES:]
        if not hmac.compare_digest(signature, self._sign(payload)):
            raise CursorError
        return int.from_bytes(payload)

    def _sign(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, hashlib.sha256)[:_SIGNATURE_BYTES]
