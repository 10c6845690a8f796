"""Optimization profiles: which sizes an engine is for, and which it should be fastest at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError
from .network import Network, Tensor

_USUAL_PROMPT = 512


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
    """Prefill, of prompts or parts of them, and decode, of one token a sequence."""
    one, batch = Range(1, 1, 1), max_batch_size
    usual = min(_USUAL_PROMPT, max_model_len)
    prefill = {
        "batch": Range(1, 1, batch),
        "length": Range(1, usual, max_model_len),
        "rows": Range(1, 1, batch * max_model_len),
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
