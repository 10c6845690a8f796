"""Who may ask, how often, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus

from .failures import Refused

ANYBODY = "anybody"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may ask for.

    Attributes:
        per_minute: requests a minute, all of which may come at once; None for no limit.
        at_once: requests that are being answered; None for no limit.
    """

    per_minute: int | None = None
    at_once: int | None = None


class Lease:
    """A request that has been let in."""

    def __init__(self, access: Access, who: str) -> None:
        self._access: Access | None = access
        self._who = who

    def close(self) -> None:
        """It has ended; to close again does nothing."""
        if self._access is not None:
            self._access.leave(self._who)
            self._access = None


class Access:
    """Keys and their limits. A server without keys serves anybody, who share the limits.

    Args:
        keys: that are taken; only their hashes are kept.
        limits: of each key.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        keys: Iterable[str],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hashes = [_hash(key) for key in keys]
        self._limits, self._clock = limits, clock
        self._tokens: dict[str, tuple[float, float]] = {}  # how many are left, and when
        self._running: dict[str, int] = {}

    def who(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header.

        Raises:
            Refused: 401: no key, or a wrong one.
        """
        if not self._hashes:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        found = _hash(key.strip())
        # All are compared, so that the time says nothing.
        known = [hmac.compare_digest(found, one) for one in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "the key is missing or wrong: send the header 'Authorization: Bearer KEY'",
            )
        return found

    def enter(self, who: str) -> Lease:
        """Counts a request, until the lease is closed.

        Raises:
            Refused: 429: too many at once, or a minute.
        """
        running = self._running.get(who, 0)
        if self._limits.at_once is not None and running >= self._limits.at_once:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"this key has {running} requests running, as many as it may have",
                retry_after=1,
            )
        self._take_token(who)
        self._running[who] = running + 1
        return Lease(self, who)

    def leave(self, who: str) -> None:
        """Counts the end of a request; the lease calls it."""
        self._running[who] -= 1
        if not self._running[who]:
            del self._running[who]

    def _take_token(self, who: str) -> None:
        most = self._limits.per_minute
        if most is None:
            return
        now = self._clock()
        left, then = self._tokens.get(who, (float(most), now))
        left = min(most, left + (now - then) * most / 60)
        if left < 1:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"this key may ask {most} times a minute",
                retry_after=(1 - left) * 60 / most,
            )
        self._tokens[who] = (left - 1, now)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
