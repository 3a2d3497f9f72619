"""The prompt's tokens, handed on by a router that has made them, so that they are made once.

They come as a header, with a code that only who has the deployment's secret can make, and that
holds for one body.
"""

import hashlib
import hmac
from array import array
from base64 import b64decode, b64encode
from dataclasses import dataclass

# Ray keeps clients from sending headers that begin like this.
HEADER = "x-serve-router-tokens"
MAX_HEADER_BYTES = 48 * 1024
_TOKEN_BYTES = 3
_CODE_BYTES = 16


@dataclass(frozen=True)
class HandedTokens:
    request_type: str  # as the router has read the body
    tokens: list[int]


class TokenSeal:
    """
    Args:
        key: the deployment's secret.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, body: bytes, handed: HandedTokens) -> str | None:
        """The header's value; None where it would be too long."""
        planes = array("I", handed.tokens).tobytes()  # the lowest bytes of all, then the next …
        packed = b"".join(planes[i::4] for i in range(_TOKEN_BYTES))
        code = self._code(body, handed.request_type, packed)
        value = f"{handed.request_type} {b64encode(code + packed).decode()}"
        is_small = len(value) <= MAX_HEADER_BYTES and max(handed.tokens, default=0) < 2**24
        return value if is_small else None

    def open(self, body: bytes, value: str | None) -> HandedTokens | None:
        """None for what no router has said of this body."""
        request_type, _, coded = (value or "").partition(" ")
        try:
            content = b64decode(coded, validate=True)
        except ValueError:
            return None
        code, packed = content[:_CODE_BYTES], content[_CODE_BYTES:]
        if not hmac.compare_digest(code, self._code(body, request_type, packed)):
            return None
        planes = bytearray(len(packed) // _TOKEN_BYTES * 4)
        for i in range(_TOKEN_BYTES):
            size = len(packed) // _TOKEN_BYTES
            planes[i::4] = packed[i * size : (i + 1) * size]
        return HandedTokens(request_type, array("I", bytes(planes)).tolist())

    def _code(self, body: bytes, request_type: str, packed: bytes) -> bytes:
        code = hashlib.blake2b(digest_size=_CODE_BYTES, key=self._key, person=b"tokens")
        for part in (request_type.encode(), packed, body):
            code.update(len(part).to_bytes(8, "little") + part)
        return code.digest()
