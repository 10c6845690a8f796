"""What the steps of a load computed, by phase, and how much of the device that used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.counters import decodes
from ...runtime.engine import CausalLMEngine
from ...runtime.plan import Chunk
from ...runtime.request import Request
from ...targets import Target
from ..inspect.facts import Setting, bindings, final_graph, kv_bytes_per_token
from .decoding import decode_image
from .floor import find_linears


@dataclass(slots=True)
class Phase:
    """Sums over the steps of one kind.

    Attributes:
        steps: how many.
        tokens: that they computed.
        sequences: that took part, in sum.
        context: tokens of the KV cache that they read: of each sequence all up to its last token.
        seconds: that they took, what the host did between planning and taking tokens included.
        mfu: model FLOPs utilisation: FLOPs of the linears over what the device's peak rate could
            compute in the time; attention is not counted. None where it is not known.
        mbu: model bandwidth utilisation: bytes of the linears' weights and of the context over
            what its peak rate could read. None where it is not known.
    """

    steps: int = 0
    tokens: int = 0
    sequences: int = 0
    context: int = 0
    seconds: float = 0.0
    mfu: float | None = None
    mbu: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Computed, 0 for no steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


class PhaseMeter:
    """Observes a loop: steps with any tokens of prompts are "prefill", as in `Counters`."""

    def __init__(self) -> None:
        self.phases = {"prefill": Phase(), "decode": Phase()}

    def added(self, request: Request) -> None:
        """A request was queued."""

    def stepped(self, chunks: Sequence[Chunk], started: float, ended: float) -> None:
        """A step was computed."""
        phase = self.phases["decode" if all(map(decodes, chunks)) else "prefill"]
        tokens = sum([len(chunk.slots) for chunk in chunks])
        phase.steps += 1
        phase.tokens += tokens
        phase.sequences += len(chunks)
        phase.context += sum([chunk.start for chunk in chunks]) + tokens
        phase.seconds += ended - started


def rate_phases(engine: CausalLMEngine, phases: dict[str, Phase], dtype: str) -> None:
    """Fills in `mfu` and `mbu`.

    Args:
        engine: whose graph says what a step must compute and read.
        phases: of a PhaseMeter.
        dtype: whose peak rate counts; linears of codes in both operands are counted at that of
            the codes' type, if the target has one.
    """
    target = Target.parse(engine.image.target)
    rates = {name: rate * 1e12 for name, rate in target.tflops}
    peak = rates.get(dtype)
    coded = max(rates.get("float8_e4m3fn", 0.0), rates.get("int8", 0.0)) or peak
    kv_bytes = kv_bytes_per_token(engine.image)
    for name, phase in phases.items():
        image = decode_image(engine) if name == "decode" else engine.image
        graph = final_graph(image)
        sizes = bindings(graph, image, Setting(name, 1, 1))
        linears = find_linears(graph, sizes)
        if not linears or not phase.seconds:
            continue
        read = phase.steps * sum(one.weight_bytes for one in linears) + phase.context * kv_bytes
        phase.mbu = read / (target.dram_gb_per_s * 1e9) / phase.seconds
        if peak is not None and coded is not None:
            # Linears grow with the tokens of a step, or with its sequences: all of them where each
            # brings one token, the last ones where each is sampled once.
            more_tokens = find_linears(graph, {**sizes, "T": 2})
            more_sequences = find_linears(graph, {**sizes, "B": 2, "R": 2})
            least = sum(
                (phase.tokens * (t.flops - one.flops) + phase.sequences * (s.flops - one.flops))
                / (coded if one.coded else peak)
                for one, t, s in zip(linears, more_tokens, more_sequences, strict=True)
            )
            phase.mfu = least / phase.seconds
