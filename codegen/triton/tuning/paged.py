"""What the templates of attention over pages have in common."""

from __future__ import annotations

from ..kernels.paged_attention_tiles import Problem
from .template import Facts


def head_facts(problem: Problem, *further: str) -> Facts:
    """What attention over pages is asked for, whoever has how many tokens: the element type, what
    is added to scores and ``further`` words, the window, heads and their dims.
    """
    node = problem.node
    words = ["sinks" if node.args[6] else "", "alibi" if node.args[7] else ""]
    words += ["softcap" if problem.softcap is not None else "", *further]
    return (
        ("dtype", str(node.dtype)),
        ("with", " ".join(filter(None, words))),
        ("window", problem.window or 0),
        ("heads", problem.heads),
        ("kv_heads", problem.kv_heads),
        ("head_dim", problem.head_dim),
        ("value_dim", problem.value_dim),
    )
