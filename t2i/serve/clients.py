"""Which clients are answered: by the host that they name, and by their key."""

import hmac
import re

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OWN_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
"""The same with a port, as a Host header has them."""


def is_loopback(host: str) -> bool:
    """Tell whether a Host header names this machine itself."""
    return OWN_NAME.fullmatch(host) is not None


def has_key(authorization: str, *, key: str) -> bool:
    """Tell whether an Authorization header brings the key, in a time that tells nothing of it."""
    scheme, _, given = authorization.partition(" ")
    # As bytes: Python reads headers as Latin-1, and variables with surrogates for what is no UTF-8.
    sent, wanted = given.strip().encode("latin-1"), key.encode(errors="surrogateescape")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent, wanted)
