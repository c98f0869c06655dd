"""Signatures of entries: HMAC-SHA256 with a key that those share who trust one another's plans.

In: the settings `cache_key` and `cache_key_file`. Out: a signature over an entry's header, or why an entry is refused.
The header names the entry's own key and the SHA-256 of its plan, so a signed header fits no other entry and no other
plan. A key that was asked for and cannot be had means no cache at all, never a cache without signatures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac

from trt_dynamo.cache.disk import Damaged
from trt_dynamo.settings import Settings, variable_of

# A signature of ours is one of nothing else that is signed with the same key.
PURPOSE = b"trt_dynamo engine cache entry\0"
SHORTEST = 16


class Refused(Damaged):
    """An entry may be whole, and is not signed with our key."""


@dataclasses.dataclass(frozen=True)
class Signing:
    """The key (None: entries are taken without a signature), or the problem that leaves us without one."""

    key: bytes | None = dataclasses.field(default=None, repr=False)
    problem: str = ""

    def sign(self, header: bytes) -> str:
        """The signature as 64 hexadecimal digits; nothing without a key."""
        return "" if self.key is None else hmac.new(self.key, PURPOSE + header, hashlib.sha256).hexdigest()

    def check(self, header: bytes, signature: str) -> None:
        """Takes note of the signature where a key is set.

        Raises:
            Refused: the signature is missing, or was made with another key or for another header.
        """
        if self.key is None:
            return
        if not signature:
            raise Refused("it is not signed")
        if not hmac.compare_digest(self.sign(header).encode(), signature.encode()):
            raise Refused("its signature is not one of our key")


def signing_of(settings: Settings) -> Signing:
    """The key that the settings give; blanks and line ends around it do not count."""
    variable, file_variable = variable_of("cache_key"), variable_of("cache_key_file")
    if settings.cache_key and settings.cache_key_file is not None:
        return Signing(problem=f"both {variable} and {file_variable} are set; unset one of them")
    key, source = settings.cache_key.encode(), variable
    if settings.cache_key_file is not None:
        source = f"the key file {settings.cache_key_file}"
        try:
            key = settings.cache_key_file.read_bytes()
        except OSError as error:
            return Signing(problem=f"{source} cannot be read ({error.strerror}); mend it or unset {file_variable}")
    elif not settings.cache_key:
        return Signing()
    key = key.strip()
    if len(key) < SHORTEST:
        return Signing(problem=f"{source} holds {len(key)} bytes, and a key must have {SHORTEST} or more")
    return Signing(key)
