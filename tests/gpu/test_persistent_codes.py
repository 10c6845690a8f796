"""One launch for all layers on a GPU, its weights codes: what the graph says, and the tokens of the
separate kernels.
"""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from persistent_codes import Coded
from persistent_forms import Model, by_interpreter, distance, in_float32, step_inputs, together
from tilewright.codegen.persistent.decode import PersistentDecode, on_device
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.source import compile_persistent, persistent_source
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.ir.dtypes import DType
from tilewright.targets import Target
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu
MODEL = Model(width=256, heads=8, kv_heads=2, dim=32, ffn=640, vocab=1000, page=16)
PAGES = [5, 3, 1, 2, 4, 6, 7, 0]
F8 = DType.F8E4M3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "coded",
    [
        Coded(F8, rounds=True),
        Coded(F8),
        Coded(F8, group=128, block=128, rounds=True),
        Coded(DType.U8, group=128),
        Coded(DType.U8, group=32),
    ],
    ids=str,
)
def test_steps_in_a_row_are_those_of_the_graph(coded: Coded, batch: int) -> None:
    target, device = Target.detect(), torch.device("cuda")
    graph = coded.graph(MODEL.graph())
    tensors = coded.tensors(MODEL.tensors(1, batch * len(PAGES)))
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    shape = read_decode(graph)
    tiling = Tiling(4, 4, 3, 4, 16, target.sms, batch)
    source = persistent_source(shape, tiling)
    (binary,) = compile_persistent([source], target.arch)
    ours = PersistentDecode(shape, tiling, there, on_device(source, binary, device), device)
    for length in (1, 40, 99):
        tables = [[page + i * len(PAGES) for page in PAGES] for i in range(batch)]
        inputs = together([step_inputs(one, length, 3 + length, MODEL.page) for one in tables])
        expected = by_interpreter(graph, tensors, inputs)
        given = {name: tensor.cuda() for name, tensor in inputs.items()}
        for _ in range(20):  # the same step again writes the same
            ours.run(given, there)
        ours.check()
        logits = ours.logits.float().cpu()
        if coded.rounds:  # another order of sums may take another code of x here and there
            assert distance(logits, expected["logits"]) < 0.1
        else:  # the graph rounds each op's result, so that it is no nearer to the truth itself
            truth = by_interpreter(*in_float32(graph, tensors), inputs)["logits"]
            assert distance(logits, truth) < 1.25 * distance(expected["logits"], truth)
        tensors |= {name: value for name, value in expected.items() if name in tensors}


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block", "int4"])
def test_an_engine_generates_with_it_what_its_separate_kernels_do(scheme: str) -> None:
    model = tiny_model("llama").bfloat16()
    options = {"max_model_len": 64, "max_batch_size": 2, "tune": "none", "backend": "triton"}
    params = tw.SamplingParams(max_new_tokens=3)
    wanted, found = (
        [
            completion.token_ids
            for completion in tw.compile(
                model, target="auto", decode=decode, quantize=scheme, **options
            ).generate([[136, 114]], params)
        ]
        for decode in ("kernels", "persistent")
    )
    assert found == wanted
