"""What the torch.compile backend does to Dynamo's graphs before an engine is made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError


class VariadicInputs(nn.Module):
    """A graph module with its tensors as one variadic parameter, for shapes by position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: torch.Tensor) -> object:
        """What the graph gives."""
        return self.inner(*tensors)


def symbolic_examples(gm: fx.GraphModule, examples: Sequence[object]) -> list[object]:
    """The examples as Dynamo traced them, with its symbolic sizes; it passes real tensors too."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [
        node.meta.get("example_value", example)
        for node, example in zip(placeholders, examples, strict=True)
    ]


def dynamic_dims(example: object) -> frozenset[int]:
    """The dimensions of an example input that Dynamo made symbolic."""
    if not isinstance(example, torch.Tensor):
        return frozenset()
    return frozenset(d for d, s in enumerate(example.shape) if isinstance(s, torch.SymInt))


def size_sources(examples: Sequence[object]) -> dict[int, tuple[int, int]]:
    """For each symbolic-size input: the (input, dimension) that has this size."""
    found: dict[int, tuple[int, int]] = {}
    for index, example in enumerate(examples):
        if not isinstance(example, torch.SymInt):
            continue
        for other, tensor in enumerate(examples):
            if isinstance(tensor, torch.Tensor):
                for dim, size in enumerate(tensor.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == example.node.expr:
                        found.setdefault(index, (other, dim))
    return found


def symbolic_outputs(gm: fx.GraphModule) -> frozenset[int]:
    """Places among the outputs that hold numbers, which an engine gives as tensors."""
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return frozenset(
        place
        for place, node in enumerate(outputs)
        if isinstance(node, fx.Node)
        and isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat | int | float)
    )


def refuse_effects(gm: fx.GraphModule, args: Sequence[object]) -> None:
    """Runs the graph on fake tensors to see that it only computes.

    Raises:
        UnsupportedError: it writes to an input or a parameter, or returns views of one, or several
            views of the same memory.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    tensors = [fake for fake in fakes if isinstance(fake, torch.Tensor)]
    before = [tensor._version for tensor in tensors]
    try:
        with mode, torch.no_grad():
            outputs = [o for o in pytree.tree_leaves(gm(*fakes)) if isinstance(o, torch.Tensor)]
    except Exception as error:
        raise _effect(
            f"{type(error).__name__}: {str(error)[:200]}", "a graph that runs on fake tensors"
        ) from error
    if [tensor._version for tensor in tensors] != before:
        raise _effect(
            "an in-place write to an input, a parameter or a buffer", "a graph that only computes"
        )
    memory = {_storage(tensor) for tensor in tensors}
    for output in {id(output): output for output in outputs}.values():
        if _storage(output) in memory:
            raise _effect(
                "an output that is a view of an input or of another output",
                "outputs of their own memory",
            )
        memory.add(_storage(output))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _effect(found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        "a graph of torch.compile",
        expected=expected,
        found=found,
        remedy="The results are right all the same; write it without, for speed.",
    )


def freeze(
    gm: fx.GraphModule,
    args: Sequence[object],
    static: Sequence[int],
    sizes: Mapping[int, tuple[int, int]],
) -> nn.Module:
    """A copy of the graph whose parameters are its own, and whose sizes are read from its tensors.

    Args:
        gm: Dynamo's graph.
        args: what it is called with.
        static: places of the parameters and buffers among ``args``.
        sizes: for a size among ``args``, the tensor and dimension that have it.

    Returns:
        a module of the remaining tensors, in order.
    """
    graph = copy.deepcopy(gm.graph)
    module = fx.GraphModule(gm, graph)
    placeholders = list(graph.find_nodes(op="placeholder"))
    for index, node in enumerate(placeholders):
        arg = args[index]
        if index in static:
            assert isinstance(arg, torch.Tensor)
            name = f"weight_{index}"
            module.register_parameter(name, nn.Parameter(arg.detach(), requires_grad=False))
            with graph.inserting_before(node):
                weight = graph.get_attr(name)
            _replace(graph, node, weight)
        elif index in sizes:
            source, dim = sizes[index]
            _replace_by_size(graph, node, placeholders, source, dim)
        elif not isinstance(arg, torch.Tensor):
            node.replace_all_uses_with(arg)
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return VariadicInputs(module)


def _replace_by_size(
    graph: fx.Graph, node: fx.Node, placeholders: Sequence[fx.Node], source: int, dim: int
) -> None:
    with graph.inserting_after(placeholders[-1]):
        size = graph.call_function(torch.ops.aten.sym_size.int, (placeholders[source], dim))
    _replace(graph, node, size)


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)
