"""Plain modules through capture_module: numbers, structures, symbols, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.compiler.capture import capture_module
from tilewright.compiler.capture_types import Symbol
from tilewright.errors import CaptureError, UsageError
from tilewright.runtime.structure import Branch, Fixed, Leaf, rebuild


class Tied(nn.Module):
    """Embedding tied to the head, a causal buffer, a counter nobody reads, nested outputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)
        self.register_buffer("mask", torch.ones(16, 16).tril())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids, flag=True):
        self.calls.add_(1)
        h = self.norm(self.embed(ids))
        size = ids.shape[1]
        scores = (h @ h.mT).masked_fill(self.mask[:size, :size] == 0, float("-inf"))
        h = scores.softmax(-1) @ h
        return {"logits": self.head(h), "rest": [h, 3, None]}


@pytest.fixture(scope="module")
def tied():
    module = Tied()
    shapes = ({1: torch.export.Dim("S", max=16)}, None)
    return module, capture_module(module, (torch.zeros(1, 6, dtype=torch.int64), True), shapes)


def ops(captured):
    return {str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"}


@pytest.mark.quick
@pytest.mark.parametrize("size", [1, 5, 16])
def test_numbers_at_several_sizes(tied, size):
    module, captured = tied
    ids = torch.randint(0, 10, (1, size))
    wanted = module(ids)
    found = rebuild(captured.output, captured.run([ids]))
    torch.testing.assert_close(found["logits"], wanted["logits"])
    torch.testing.assert_close(found["rest"][0], wanted["rest"][0])
    assert found["rest"][1:] == [3, None]


@pytest.mark.quick
def test_interface_is_plain_data(tied):
    _, captured = tied
    (ids,) = captured.inputs
    assert (ids.path, ids.dims) == ("args[0]", (1, captured.symbols[0].name))
    assert captured.symbols == (Symbol(ids.dims[1], captured.symbols[0].lower, 16),)
    assert captured.arguments == ("ids", "flag")
    assert captured.call == Branch(
        "tuple", (), (Branch("tuple", (), (Leaf(0), Fixed(True))), Branch("dict", (), ()))
    )


@pytest.mark.quick
def test_tied_weights_have_one_name_and_unused_ones_none(tied):
    _, captured = tied
    assert set(captured.weights) == {
        "embed.weight",
        "head.bias",
        "norm.weight",
        "norm.bias",
        "mask",
    }
    assert len(captured.notes) == 1 and "calls" in captured.notes[0]


@pytest.mark.quick
def test_high_level_ops_are_kept(tied):
    kept = {"aten.linear.default", "aten.matmul.default", "aten.layer_norm.default"}
    assert kept <= ops(tied[1])
    assert "aten.softmax.int" in ops(tied[1])


def test_nothing_is_left_changed():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    module[0].eval()
    before = [part.training for part in module.modules()]
    captured = capture_module(module, (torch.randn(2, 4),))
    assert [part.training for part in module.modules()] == before
    assert ops(captured) == {"aten.linear.default"}


def test_keyword_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b["x"]

    captured = capture_module(Sum(), {"a": torch.ones(2), "b": {"x": torch.ones(2)}})
    assert [entry.path for entry in captured.inputs] == ["kwargs['a']", "kwargs['b']['x']"]
    assert captured.output == Leaf(0)


def test_no_grad_blocks_are_inlined():
    class Blocks(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                y = x * 2
            with torch.autocast("cpu", enabled=False):
                z = y + 1
            return z, y

    captured = capture_module(Blocks(), (torch.ones(3),))
    assert ops(captured) == {"aten.mul.Tensor", "aten.add.Tensor"}
    torch.testing.assert_close(captured.run([torch.ones(3)])[0], torch.full((3,), 3.0))


def test_autocast_becomes_casts():
    class Autocast(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    x = torch.randn(3, 3)
    captured = capture_module(Autocast(), (x,))
    assert torch.equal(captured.run([x])[0], Autocast()(x))


def test_in_place_arithmetic_is_functionalised():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[:, 0] = 7
            y += 1
            return y

    captured = capture_module(InPlace(), (torch.zeros(2, 3),))
    torch.testing.assert_close(captured.run([torch.zeros(2, 3)])[0][:, 0], torch.full((2,), 8.0))
    targets = [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    assert not any(target._schema.is_mutable for target in targets)


class Accumulator(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total += x
        return self.total * 2


class Writes(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (Accumulator(), (torch.ones(3),), "buffer total"),
        (Writes(), (torch.ones(3),), "input x"),
        (Branches(), (torch.ones(3),), "control flow"),
        (nn.Linear(4, 4), (torch.ones(3),), "example inputs"),
    ],
    ids=["buffer", "input", "branch", "shape"],
)
def test_refusals_name_the_culprit(module, inputs, words):
    with pytest.raises(CaptureError, match=words):
        capture_module(module, inputs)


def test_the_line_of_a_branch_is_named():
    with pytest.raises(CaptureError, match=r"test_capture_module\.py:\d+ \(return x \+ 1 if"):
        capture_module(Branches(), (torch.ones(3),))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("module", "inputs", "culprit"),
    [
        ("a string", (torch.ones(3),), "model"),
        (nn.Linear(3, 3), None, "example_inputs"),
        (nn.Linear(3, 3), torch.ones(3), "example_inputs"),
        (nn.Linear(3, 3), (torch.ones(3, device="meta"),), r"example_inputs\[0\]"),
    ],
    ids=["no module", "no inputs", "bare tensor", "other device"],
)
def test_wrong_arguments(module, inputs, culprit):
    with pytest.raises(UsageError, match=culprit):
        capture_module(module, inputs)


def test_cond_keeps_its_branches():
    class Cond(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    captured = capture_module(Cond(), (torch.ones(3),))
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(captured.run([x])[0], Cond()(x))


def test_blocks_inside_branches_are_inlined():
    def then(x):
        with torch.enable_grad():
            return x + 1

    class Cond(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, then, lambda x: x - 1, (x,))

    captured = capture_module(Cond(), (torch.ones(3),))
    parts = captured.graph_module.modules()
    bodies = [part for part in parts if isinstance(part, torch.fx.GraphModule)]
    targets = {str(node.target) for body in bodies for node in body.graph.nodes}
    assert not any("wrap_with" in target for target in targets)
    torch.testing.assert_close(captured.run([torch.ones(3)])[0], torch.full((3,), 2.0))


class Weighed(nn.Module):
    def forward(self, x, y):
        return 2 * x + y


@pytest.mark.parametrize("by_name", [False, True])
def test_inputs_whose_examples_are_one_tensor_are_two_inputs(by_name) -> None:
    one = torch.ones(3)
    captured = capture_module(Weighed(), {"x": one, "y": one} if by_name else (one, one))
    x, y = torch.full((3,), 1.0), torch.full((3,), 10.0)
    (found,) = captured.graph_module(x, y)
    assert torch.equal(found, torch.full((3,), 12.0))
