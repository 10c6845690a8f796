"""Optimization profiles: which sizes an engine is for, and which it should be fastest at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError
from .network import Network, Tensor

_USUAL_PROMPT = 512
_MOST_TOKENS = 16384  # of a run: its memory is theirs, and a longer prompt comes in pieces
_MOST_ELEMENTS = 2**31 - 1  # of a mask [batch, 1, length, cache length], or attention has no kernel


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes that a symbol takes: the least, the one to be fastest at, the most."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What an engine is for.

    Attributes:
        name: for people.
        sizes: by symbol.
    """

    name: str
    sizes: Mapping[str, Range]

    def shapes(self, tensor: Tensor) -> tuple[tuple[int, ...], ...]:
        """The least, usual and largest shape of an input."""
        return tuple(
            tuple(getattr(self.sizes[s], which) if isinstance(s, str) else s for s in tensor.shape)
            for which in ("least", "usual", "most")
        )

    def to_json(self) -> dict[str, object]:
        """As ``generation.json`` holds it."""
        sizes = {symbol: [r.least, r.usual, r.most] for symbol, r in self.sizes.items()}
        return {"name": self.name, **sizes}


def decoder_profiles(max_batch_size: int, max_model_len: int) -> tuple[Profile, Profile]:
    """Prefill, of prompts or pieces of them, and decode, of one token a sequence. Prompts of more
    tokens than a run takes come in several runs, each at the positions behind the last.
    """
    one, batch = Range(1, 1, 1), max_batch_size
    longest = max(1, min(max_model_len, _MOST_TOKENS, _MOST_ELEMENTS // max_model_len))
    together = max(1, min(batch, _MOST_TOKENS // longest))
    prefill = {
        "batch": Range(1, 1, together),
        "length": Range(1, min(_USUAL_PROMPT, longest), longest),
        "rows": Range(1, 1, together * longest),
    }
    decode = {"batch": Range(1, batch, batch), "length": one, "rows": Range(1, batch, batch)}
    return Profile("prefill", prefill), Profile("decode", decode)


def check_profiles(network: Network, profiles: Sequence[Profile]) -> None:
    """UsageError unless each size that a network leaves open has an ordered range in each profile,
    of which there is one at least.
    """
    symbols = network.symbols
    if symbols and not profiles:
        raise _unfit("the network", f"a profile for its sizes {', '.join(symbols)}", "none")
    for profile in profiles:
        for symbol in symbols:
            place = f"profile {profile.name!r}"
            found = profile.sizes.get(symbol)
            if found is None:
                raise _unfit(place, f"a range for the dynamic size {symbol}", "none")
            if not 1 <= found.least <= found.usual <= found.most:
                raise _unfit(place, f"1 <= least <= usual <= most for {symbol}", str(found))


def _unfit(place: str, expected: str, found: str) -> UsageError:
    return UsageError(
        place,
        expected=expected,
        found=found,
        remedy="Give each dynamic size a Range in each Profile, or use decoder_profiles.",
    )
