"""Control flow, and what is refused with a named culprit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowering_oracle import assert_same, lowered
from tilewright.compiler.capture import capture_module
from tilewright.compiler.lowering import lower, output_structure
from tilewright.errors import CaptureError, CheckpointError
from tilewright.formats.weights import Random
from tilewright.ir.interpreter import interpret
from tilewright.runtime.structure import rebuild


class Branching(nn.Module):
    """A linear layer in one branch, a negation in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: -x, (x,))
        return y + 1


@pytest.mark.quick
def test_cond_holds_both_branches() -> None:
    graph = assert_same(Branching(), torch.ones(3, 4), others=[(-torch.ones(3, 4),)])
    (node,) = [node for node in graph.nodes if node.op == "cond"]
    assert not node.attr("then").params and "layer.weight" in graph.weights


def test_cond_with_several_results_at_two_sizes() -> None:
    def choose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.cond(
            x.mean() > 0, lambda x: (x * 2, x.sum(1)), lambda x: (-x, x.amax(1)), (x,)
        )
        return a + 1, b

    assert_same(
        choose,
        torch.rand(3, 4),
        dynamic=({0: torch.export.Dim("B", max=64)},),
        others=[(-torch.rand(5, 4),)],
        tolerance=2e-6,
    )


def test_random_numbers_are_refused() -> None:
    with pytest.raises(CaptureError, match="random"):
        lowered(lambda x: x + torch.rand(3), (torch.ones(3),))


def test_sizes_that_depend_on_data_are_refused() -> None:
    with pytest.raises(CaptureError, match="torch.compile"):
        lowered(lambda x: x[x > 0], (torch.randn(3),))


def test_loops_are_refused() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return while_loop(lambda x: x.sum() < 9, lambda x: (x + 1,), (x,))[0]

    with pytest.raises(CaptureError, match="while_loop"):
        lowered(Loop(), (torch.ones(3),))


class Structured(nn.Module):
    """A dict of tensors with a fixed value among them."""

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"none": None, "double": x * 2, "count": 3, "parts": (x + 1, [x])}


def test_structured_outputs_keep_their_structure() -> None:
    captured = capture_module(Structured(), (torch.ones(2),))
    graph = lower(captured, "graph")
    found = rebuild(output_structure(captured), interpret(graph, [torch.ones(2)]))
    assert (found["none"], found["count"]) == (None, 3) and graph.output_names[0] == "double"
    torch.testing.assert_close(found["double"], torch.full((2,), 2.0))
    torch.testing.assert_close(found["parts"][1][0], torch.ones(2))


def test_weights_may_be_given_as_expressions() -> None:
    captured = capture_module(nn.Linear(4, 3, bias=False), (torch.ones(2, 4),))
    weight = Random(seed=3, shape=(3, 4))
    graph = lower(captured, "graph", {"weight": weight})
    (found,) = interpret(graph, [torch.ones(2, 4)])
    torch.testing.assert_close(found, torch.ones(2, 4) @ weight.load().T)


def test_weights_of_another_shape_are_refused() -> None:
    captured = capture_module(nn.Linear(4, 3), (torch.ones(2, 4),))
    with pytest.raises(CheckpointError, match="weight"):
        lower(captured, "graph", {"weight": Random(seed=3, shape=(4, 3))})


def test_weights_without_values_are_refused() -> None:
    captured = capture_module(nn.Linear(4, 3), (torch.ones(2, 4),))
    meta = {name: tensor.to("meta") for name, tensor in captured.weights.items()}
    captured = replace(captured, weights=meta)
    with pytest.raises(CaptureError, match="meta"):
        lower(captured, "graph")
