"""Dense attention for the tuner: which of torch's libraries computes it.

No kernel of ours does. By default torch chooses, by rules that know the device and the operands but
no times.
"""

from __future__ import annotations

from dataclasses import replace

from ....autotune.prior import Work
from ....autotune.space import Choice, Config, Space
from ....ir.dims import evaluate
from ....ir.node import Node
from ....ir.schema import schema
from ....targets import Target
from .. import library
from ..library import ATTENTIONS, takes
from ..lowering import lower_graph
from ..source import KernelSource
from .problem import problem_graph
from .template import Calls, Facts, Sizes, Template

AUTO = "auto"
_RANKS = {AUTO: 1.0, **dict(zip(ATTENTIONS, (1.1, 1.2, 1.5, 8.0), strict=True))}
"""Times the roofline: in this order they are tried."""


class DenseAttention(Template):
    """The libraries that compute an ``attention`` node of fixed sizes."""

    name = "attention"
    modules = (library,)

    def takes(self, node: Node) -> bool:
        """Dense attention that a library computes, whose sizes are all numbers."""
        fixed = not any(type_.symbols for arg in node.operands for type_ in arg.types)
        return node.op == "attention" and takes(node) and fixed

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Shapes, the element type, and what is masked."""
        q, k, v = node.operands[:3]
        b, h, s, d = (evaluate(size, sizes) for size in q.shape)
        mask, alibi = node.args[3], node.args[5]
        window = node.attr("window")
        return (
            ("dtype", str(q.dtype)),
            ("causal", int(bool(node.attr("causal")))),
            ("window", int(str(window or 0))),
            ("mask", "" if mask is None else f"{mask.type}"),
            ("alibi", int(alibi is not None)),
            ("batch", b),
            ("heads", h),
            ("kv_heads", evaluate(k.shape[1], sizes)),
            ("head_dim", d),
            ("queries", s),
            ("keys", evaluate(v.shape[2], sizes)),
        )

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """torch's own choice, and each of them."""
        return Space((Choice("backend", (AUTO, *ATTENTIONS)),))

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """torch's own choice."""
        return Config((("backend", AUTO),))

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """None: no kernel of ours."""
        return None

    def calls(self, node: Node, config: Config, target: Target) -> Calls | None:
        """The library's call."""
        program, sources, _ = lower_graph(problem_graph(node), target)
        if any(call.loader != "triton" for call in program.calls):
            return None
        *before, call = program.calls
        if config["backend"] != AUTO:
            call = replace(call, attrs={**call.attrs, "backend": config["backend"]})
        return replace(program, calls=(*before, call)), sources

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Every operand once, and the op's operations."""
        cost = schema(node.op).cost(node)
        moved = float(evaluate(cost.bytes, sizes))
        dtype = str(node.dtype.torch).removeprefix("torch.")
        flops = float(evaluate(cost.flops, sizes))
        return Work(moved, moved, flops, dtype, target.sms, 1, moved / target.sms)

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """The roofline, by the ranks of the libraries."""
        work = self.work(node, config, sizes, target)
        seconds = target.roofline_seconds(work.flops, work.dram_bytes, work.dtype)
        return seconds * _RANKS[str(config["backend"])]

    def numerics(self, config: Config) -> str:
        """Each adds up in an order of its own."""
        return str(config["backend"])
