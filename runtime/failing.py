"""The end of a request whose logits are no numbers: its own error, and nobody else's."""

from __future__ import annotations

from ..errors import TilewrightError, VerificationError
from .request import Request
from .scheduler import Scheduler


def broken_logits(request: Request) -> VerificationError:
    """The error of a request of which a row has no finite largest logit, and no launch was given
    up.
    """
    tokens = len(request.sequences[0].tokens)
    return VerificationError(
        f"the logits of {request.name} behind {tokens} tokens",
        expected="a finite largest logit",
        found="none: NaN, an infinity, or no token that is allowed",
        remedy="Run `tilewright verify`; see that not every token is ruled out.",
    )


def end_request(scheduler: Scheduler, request: Request, error: TilewrightError) -> None:
    """Ends what of a request has not ended; nothing that it has computed goes to the prefix cache.

    A step in flight may still compute a row of it, which is void then (`in_flight.py`).
    """
    for seq in request.sequences:
        if seq.finish_reason is None:
            seq.fail(error)
        scheduler.drop(seq, keep=False)
