"""Products that hand a norm on, on a GPU: against float64 over poisoned buffers, with the same bits
again, and replayed in a CUDA graph, where launches overlap.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from gpu_kernels import CUDA, here
from handed_forms import Pair, drawn, graph_of, product_of, truth
from linear_forms import B, Form, tensor
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.hand_on import hands_on
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.runtime.runner import ProgramRunner

pytestmark = pytest.mark.gpu
TOKENS = (1, 2, 8, 16, 17, 33, 64, 65, 130)
ERROR = {DType.F32: 1e-4, DType.BF16: 3e-2}


def chain(dtype: DType, layers: int = 4) -> Graph:
    """The stream of a few layers: o and down in turn, and between them gated products."""
    wide = Form(k=512, n=1024, dtype=dtype, norm="weight", halves=True)
    narrow = Form(k=1024, n=512, dtype=dtype, behind=("residual",))
    outputs = [product_of("first", narrow, tensor("x", dtype, B, 1024))]
    for layer in range(layers):
        inner = product_of(f"gate_{layer}", wide, outputs[-1])
        outputs.append(product_of(f"down_{layer}", narrow, inner))
    return graph_of(*outputs)


GRAPHS = {
    "pair": Pair(
        Form(k=256, n=4096, dtype=DType.BF16, behind=("residual",)),
        Form(k=4096, n=192, dtype=DType.BF16, norm="weight", bias=True),
    ).graph,
    "odd": Pair(Form(k=96, n=320), Form(k=320, n=80, norm="weight")).graph,
    "chain": chain(DType.BF16),
    "chain f32": chain(DType.F32),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_handed_on_gives_the_numbers_of_float64(name: str) -> None:
    graph = GRAPHS[name]
    lowered = BACKEND.lower(graph, here())
    assert any(map(hands_on, lowered.program.calls))
    dtype = graph.outputs[-1].dtype
    result = LaunchedKernel._result

    def poisoned(*args):
        return result(*args).fill_(torch.nan)

    for tokens in TOKENS:
        inputs, weights = drawn(graph, tokens, device="cuda")
        read = lowered.files.__getitem__
        runner = ProgramRunner(lowered.program, weights, read, device=CUDA)
        with mock.patch.object(LaunchedKernel, "_result", poisoned):
            found = runner.run(inputs)
            again = runner.run(inputs)
        wanted = truth(graph, inputs, weights)
        for output, value in zip(graph.output_names, wanted, strict=True):
            assert torch.equal(found[output], again[output]), (tokens, output)
            error = float((found[output].double() - value).abs().max() / value.abs().max())
            assert error <= ERROR[dtype], (tokens, output, error)


@pytest.mark.parametrize("tokens", [1, 8, 33, 64, 100])
def test_launches_that_overlap_give_the_same_bits(tokens: int) -> None:
    graph = chain(DType.BF16, layers=8)
    lowered = BACKEND.lower(graph, here())
    inputs, weights = drawn(graph, tokens, device="cuda")
    runner = ProgramRunner(lowered.program, weights, lowered.files.__getitem__, device=CUDA)
    alone = {name: value.clone() for name, value in runner.run(inputs).items()}
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = runner.run(inputs)
    for _ in range(50):
        captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], value) for name, value in alone.items())
