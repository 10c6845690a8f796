"""A ring of weights on a GPU: what the graph says, again and again, and its end."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from persistent_codes import Coded
from persistent_forms import (
    RING_MODELS,
    RING_OF_CODES,
    WHOLE,
    Model,
    by_interpreter,
    step_inputs,
)
from tilewright.codegen.persistent.loading import PersistentKernel, decoder
from tilewright.codegen.persistent.reading import read_decode
from tilewright.codegen.persistent.ring_decode import RingDecode
from tilewright.codegen.persistent.ring_source import RingCut
from tilewright.codegen.persistent.source import compile_persistent, source_of
from tilewright.compiler.engine_checks import verify_image
from tilewright.errors import KernelError
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.targets import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="a ring of weights is for sm_90",
    ),
]
PAGES = [5, 3, 1, 2, 4, 6, 7, 0]


def ring(
    graph: Graph, tensors: dict[str, torch.Tensor], limit: int = 1 << 20, **cut: int
) -> RingDecode:
    shape, target = read_decode(graph), Target.detect()
    made = RingCut(programs=target.sms, **cut)
    source = source_of(shape, made)
    (binary,) = compile_persistent([source], target.arch)
    found = decoder(shape, made, tensors, source, binary, torch.device("cuda"))
    assert isinstance(found, RingDecode)
    found.limit = limit
    return found


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@pytest.mark.parametrize("model", RING_MODELS.values(), ids=RING_MODELS)
def test_steps_in_a_row_are_those_of_the_graph(model: Model) -> None:
    graph = model.graph()
    tensors = model.tensors(1, len(PAGES))
    there = on_gpu(tensors)
    ours = ring(graph, there)
    for length in (1, 2, 15, 16, 17, 33, 64, 90, 128):
        inputs = step_inputs(PAGES, length, 3 + length, model.page)
        expected = by_interpreter(graph, tensors, inputs)
        given = on_gpu(inputs)
        for _ in range(20):  # the same step again writes the same
            ours.run(given, there)
        ours.check()
        logits = expected["logits"].float()
        torch.testing.assert_close(ours.logits.float().cpu(), logits, rtol=0.05, atol=0.06)
        for name in tensors:
            if name in expected:
                tensors[name] = expected[name]
                torch.testing.assert_close(there[name].cpu(), expected[name], rtol=0.02, atol=0.04)


@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize(
    "coded",
    [
        Coded(DType.F8E4M3, rounds=True),
        Coded(DType.U8, group=128),
        Coded(DType.U8, group=256),
    ],
    ids=["e4m3", "4 bits by 128", "4 bits by 256"],
)
def test_steps_with_weights_of_codes_are_those_of_the_graph(coded: Coded, num_warps: int) -> None:
    model = RING_OF_CODES
    graph = coded.graph(model.graph())
    tensors = coded.tensors(model.tensors(1, len(PAGES)))
    there = on_gpu(tensors)
    ours = ring(graph, there, num_warps=num_warps)
    for length in (1, 40, 99):
        inputs = step_inputs(PAGES, length, 3 + length, model.page)
        expected = by_interpreter(graph, tensors, inputs)
        given = on_gpu(inputs)
        for _ in range(20):
            ours.run(given, there)
        ours.check()
        off = ours.logits.float().cpu() - expected["logits"].float()
        # Where x is rounded to codes, another order of sums may take another code here and there.
        assert float(off.square().mean().sqrt()) < (0.1 if coded.rounds else 0.02)
        tensors |= {name: value for name, value in expected.items() if name in tensors}


def test_many_blocks_of_keys_are_attended_to() -> None:
    graph = WHOLE.graph()
    pages = torch.randperm(128, generator=torch.Generator().manual_seed(5)).tolist()
    tensors = WHOLE.tensors(2, len(pages))
    there = on_gpu(tensors)
    ours = ring(graph, there)
    for length in (511, 512, 513, 1025, 1700, 2048):
        inputs = step_inputs(pages, length, 7, WHOLE.page)
        expected = by_interpreter(graph, tensors, inputs)["logits"].float()
        ours.run(on_gpu(inputs), there)
        ours.check()
        torch.testing.assert_close(ours.logits.float().cpu(), expected, rtol=0.05, atol=0.06)
        there = {name: there[name].copy_(tensors[name]) for name in there}


@pytest.mark.parametrize("cut", [{"slots": 2}, {"slots": 3, "cap": 5}, {"cap": 1}])
def test_other_cuts_compute_the_same(cut: dict[str, int]) -> None:
    tensors = on_gpu(WHOLE.tensors(6, len(PAGES)))
    inputs = on_gpu(step_inputs(PAGES, 70, 11, WHOLE.page))
    found = []
    for given in ({}, cut):
        ours = ring(WHOLE.graph(), tensors, **given)
        ours.run(inputs, tensors)
        ours.check()
        found.append(ours.logits)
    assert torch.equal(*found)  # sums have one order


def test_a_captured_step_replays() -> None:
    tensors = on_gpu(WHOLE.tensors(3, len(PAGES)))
    ours = ring(WHOLE.graph(), tensors)
    inputs = on_gpu(step_inputs(PAGES, 40, 9, WHOLE.page))
    recorded = torch.cuda.CUDAGraph()
    with pytest.raises(KernelError, match="before the capture"), torch.cuda.graph(recorded):
        ours.run(inputs, tensors)
    ours.run(inputs, tensors)
    ours.check()
    logits = ours.logits.clone()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        ours.run(inputs, tensors)
    for _ in range(5000):
        recorded.replay()
    ours.check()
    assert torch.equal(ours.logits, logits)


def test_a_launch_that_waits_in_vain_ends() -> None:
    tensors = on_gpu(WHOLE.tensors(2, len(PAGES)))
    inputs = on_gpu(step_inputs(PAGES, 3, 1, WHOLE.page))
    ours = ring(WHOLE.graph(), tensors, limit=20000)
    ours.run(inputs, tensors)
    ours.check()
    wanted = ours.logits.clone()
    row = tensors["embed"][1]
    kept = row.clone()
    row.view(torch.int16).fill_(-1)  # the bits of memory that nobody has written
    ours.run(inputs, tensors)
    torch.cuda.synchronize()
    assert ours.logits.isnan().any()
    with pytest.raises(KernelError, match=r"call 0 of 11 .* within 20000 looks"):
        ours.check()
    row.copy_(kept)
    ours.reset()
    for _ in range(1000):
        ours.run(inputs, tensors)
    ours.check()
    assert torch.equal(ours.logits, wanted)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.fixture(scope="module")
def engine(model):
    options = {"max_model_len": 128, "max_batch_size": 2, "tune": "none", "backend": "triton"}
    return tw.compile(model, target="auto", decode="persistent", **options)


PARAMS = tw.SamplingParams(max_new_tokens=40)
PROMPTS = [[136, 114], [108, 150, 9, 17, 4]]


def test_an_engine_generates_with_it_what_hugging_face_does(model, engine, tmp_path) -> None:
    found = [engine.generate([one], PARAMS)[0].token_ids for one in PROMPTS]
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        behind = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((behind / logits.std(1)).max()) < 0.1  # what bfloat16 makes of two near tokens
    engine.save(tmp_path / "engine")
    again = tw.load(tmp_path / "engine")
    assert [again.generate([one], PARAMS)[0].token_ids for one in PROMPTS] == found


def test_verify_runs_it(engine) -> None:
    checks = {check.name: check.found for check in verify_image(engine.image)}
    assert checks["one launch, batch 1"].startswith("agrees with the interpreter")


def test_an_engine_goes_on_behind_a_launch_that_was_given_up(engine) -> None:
    wanted = engine.generate([PROMPTS[0]], PARAMS)[0].token_ids
    kernels = [kernel for _, kernel in engine.decode_runner.steps]
    (kernel,) = (one for one in kernels if isinstance(one, PersistentKernel))
    kernel.decode.memory["diagnosis"].copy_(torch.tensor([1, 3]))
    with pytest.raises(KernelError, match="call 3 of 11 of the ring"):
        engine.generate([PROMPTS[0]], PARAMS)
    assert engine.generate([PROMPTS[0]], PARAMS)[0].token_ids == wanted
