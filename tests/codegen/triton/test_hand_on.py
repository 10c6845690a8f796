"""Norms that are no launch: which product hands on to which, what it hands on, and that the second
gives the same as with a norm of its own; one token goes without.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from handed_forms import (
    Pair,
    alone,
    cut,
    drawn,
    graph_of,
    pairs,
    product_of,
    truth,
)
from linear_forms import ERROR, B, Form, problem_of, tensor
from tilewright.codegen.base import Lowered
from tilewright.codegen.program import Call
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.hand_on import handed_values, hands_on, own_results
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels import linear, linear_hands
from tilewright.codegen.triton.kernels.linear import linear_source
from tilewright.codegen.triton.kernels.linear_hands import Hands
from tilewright.codegen.triton.kernels.linear_tiles import ANY, GemmTiles
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.package import kernel_id
from tilewright.compiler import spot_check
from tilewright.compiler.trial import run_trial, write_trial
from tilewright.errors import VerificationError
from tilewright.formats.weights import Held
from tilewright.ir.build import make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS
from triton_running import SPILLED

CPU, H100 = TARGETS["cpu"], TARGETS["h100"]
# Shrinking interpreted kernels takes minutes, and the first failure says enough.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL = GemmTiles(16, 16, 16, 1, 2)
Tensors = dict[str, torch.Tensor]


def run(lowered: Lowered, inputs: Tensors, weights: Tensors) -> Tensors:
    """Every buffer that a run writes, by name; before it is written it is NaN."""
    runner = ProgramRunner(lowered.program, weights, lowered.files.__getitem__)
    found: Tensors = {}

    def noting(call: Call, kernel):
        def step(operands, sizes):
            results = kernel(operands, sizes)
            found.update(zip(call.results, results, strict=True))
            return results

        return step

    runner.steps = [(call, noting(call, kernel)) for call, kernel in runner.steps]
    result = InterpretedKernel._result
    with pytest.MonkeyPatch.context() as patched:
        poisoned = lambda *args: result(*args).fill_(torch.nan)  # noqa: E731
        patched.setattr(InterpretedKernel, "_result", poisoned)
        outputs = runner.run(inputs)
    return found | outputs


def handed(lowered: Lowered) -> list[Call]:
    return [call for call in lowered.program.calls if hands_on(call)]


def launches(graph: Graph, tokens: int) -> list[str]:
    """The functions that the graph's Program launches."""
    program, sources, _ = lower_graph(graph, H100)
    by_id = {kernel_id(source): source for source in sources}
    return [
        launch.function
        for call in program.calls
        for launch, _, _ in plan_call(
            by_id[call.kernel.rsplit("/", 1)[1]],
            [program.buffers[name] for name in call.results],
            {"B": tokens},
        ).launches
    ]


def check(pair: Pair, tokens: int, seed: int = 0, written: bool = True) -> None:
    """Both products' results are those of float64, and what is handed on is what h says."""
    graph = pair.graph
    lowered = BACKEND.lower(graph, CPU)
    (call,) = handed(lowered)
    inputs, weights = drawn(graph, tokens, seed)
    found = run(lowered, inputs, weights)
    wanted = truth(graph, inputs, weights)
    forms = (pair.first, pair.second)
    for name, form, value in zip(graph.output_names, forms, wanted, strict=True):
        scale = 1.0 + float(value.abs().max())
        error = float((found[name].double() - value).abs().max())
        assert error <= 2 * ERROR[form.dtype] * scale, name  # it rounds twice
    h, *others = (found[name] for name in call.results)
    if tokens == 1 or not written:
        assert all(other.isnan().all() for other in others)
    else:
        expected = handed_values(h, weights["second_scale"], others[1].shape[1])
        assert torch.equal(others[0], expected[0])
        torch.testing.assert_close(others[1], expected[1])


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    pair=pairs(),
    tokens=st.integers(1, 40),
    block_n=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pairs(pair: Pair, tokens: int, block_n: int, splits: int, seed: int) -> None:
    widths = (16, block_n) if pair.first.n % block_n else (block_n, 16)
    cuts = [replace(SMALL, block_n=width, splits=splits) for width in widths]
    with cut(*cuts):
        check(pair, tokens, seed)


def test_a_sum_of_squares_is_of_the_narrowest_cut_and_at_most_64_columns() -> None:
    wide = Pair(Form(k=16, n=128), Form(k=128, n=16, norm="weight"))
    for widths, groups in (((128, 128), 2), ((64, 128), 2), ((128, 32), 4), ((16, 128), 8)):
        with cut(*(replace(SMALL, block_n=width) for width in widths)):
            lowered = BACKEND.lower(wide.graph, CPU)
            (call,) = handed(lowered)
            assert lowered.program.buffers[call.results[2]].shape == (B, groups)
            for tokens in (3, 17):
                check(wide, tokens)


def test_a_product_may_take_and_hand_on() -> None:
    x = tensor("x", DType.BF16, B, 16)
    forms = [
        Form(k=k, n=32, dtype=DType.BF16, norm=norm) for k, norm in ((16, "none"), (32, "weight"))
    ]
    first = product_of("first", forms[0], x)
    second = product_of("second", forms[1], first)
    graph = graph_of(first, second, product_of("third", forms[1], second))
    with cut(SMALL):
        lowered = BACKEND.lower(graph, CPU)
        names = [call.results[0] for call in lowered.program.calls]
        assert [call.results[0] for call in handed(lowered)] == names[:2]
        suffixes = [f.partition("body_")[2] for f in launches(graph, 5)]
        assert suffixes == ["of_tokens_handed_on", "of_scaled_handed_on", "of_scaled"]
        for tokens in (1, 5):
            inputs, weights = drawn(graph, tokens)
            found = run(lowered, inputs, weights)
            for name, value in zip(names, truth(graph, inputs, weights), strict=True):
                assert float((found[name].double() - value).abs().max()) < 0.2


@pytest.mark.quick
def test_the_consumer_is_one_launch_and_one_token_is_as_it_was() -> None:
    graph = Pair().graph
    names = ["first_body", "second_body"]
    assert launches(graph, 2) == ["first_body_of_tokens_handed_on", "second_body_of_scaled"]
    assert launches(graph, 1) == names
    with alone():
        assert launches(graph, 1) == names
        assert launches(graph, 2)[1:] == ["second_body_normalise", "second_body_of_normed"]


@pytest.mark.quick
@pytest.mark.parametrize(("tokens", "more"), [(16, 0), (17, 1), (300, 1)])
def test_large_tiles_have_a_launch_for_the_norm(tokens: int, more: int, monkeypatch) -> None:
    monkeypatch.setattr(linear, "MOST_HANDED", 16)
    monkeypatch.setattr(linear_hands, "MOST_HANDED", 16)
    with cut(SMALL, replace(SMALL, block_m=32)):
        assert len(launches(Pair().graph, tokens)) == 2 + more
        check(Pair(), min(tokens, 40), written=not more)


@pytest.mark.quick
def test_one_token_gives_the_same_bits_and_touches_nothing_that_is_handed_on() -> None:
    graph = Pair().graph
    inputs, weights = drawn(graph, 1)
    lowered = BACKEND.lower(graph, CPU)
    found = run(lowered, inputs, weights)
    with alone():
        other = run(BACKEND.lower(graph, CPU), inputs, weights)
    assert all(torch.equal(found[name], other[name]) for name in graph.output_names)
    (call,) = handed(lowered)
    assert all(found[name].isnan().all() for name in call.results[1:])
    assert own_results(call, call.results) == call.results[:1]


def _two_consumers() -> Graph:
    h = product_of("first", Pair().first, tensor("x", DType.F32, B, 32))
    return graph_of(*(product_of(name, Pair().second, h) for name in ("second", "third")))


def test_a_second_consumer_takes_the_norm_by_itself() -> None:
    graph = _two_consumers()
    assert launches(graph, 3) == [
        "first_body_of_tokens_handed_on",
        "second_body_of_scaled",
        "third_body_normalise",
        "third_body_of_normed",
    ]
    inputs, weights = drawn(graph, 3)
    found = run(BACKEND.lower(graph, CPU), inputs, weights)
    for name, value in zip(graph.output_names, truth(graph, inputs, weights), strict=True):
        torch.testing.assert_close(found[name].double(), value, atol=1e-5, rtol=1e-5)


def _declined() -> dict[str, Graph]:
    first, second = Pair().first, Pair().second
    x = tensor("x", DType.F32, B, 32)
    h, wide = product_of("first", first, x), product_of("wide", replace(first, n=96), x)
    half = make("slice", wide, dim=1, start=0, step=1, stop=48)
    fp16 = (replace(form, dtype=DType.F16) for form in (first, second))
    odd = replace(first, n=40)  # its programs of 16 columns would write a part of a sum
    return {
        "no weight": graph_of(h, product_of("second", replace(second, norm="bare"), h)),
        "no norm": graph_of(h, product_of("second", replace(second, norm="none"), h)),
        "a view": graph_of(wide, product_of("second", second, half)),
        "no product": graph_of(product_of("second", second, tensor("h", DType.F32, B, 48))),
        "columns": Pair(odd, replace(second, k=40)).graph,
        "float16": Pair(*fp16).graph,
        "weight": graph_of(h, _with_an_input_for_a_weight(h, second)),
    }


def _with_an_input_for_a_weight(h, form: Form):
    node = product_of("second", form, h)
    moved = [
        tensor("scale", p.dtype, *p.shape) if p.shape == (form.k,) else p for p in node.operands
    ]
    return make("fused", *moved, body=node.attr("body"), kind="linear")


@pytest.mark.parametrize("why", _declined())
def test_declined(why: str) -> None:
    graph = _declined()[why]
    program, _, _ = lower_graph(graph, H100)
    assert not any(map(hands_on, program.calls))
    assert all(len(c.results) == 1 for c in program.calls)


def test_a_deterministic_program_hands_nothing_on() -> None:
    program, _, _ = lower_graph(Pair().graph, H100, deterministic=True)
    assert not any(map(hands_on, program.calls))


def test_what_is_handed_on_is_plain_data_and_goes_when_it_is_read() -> None:
    program, _, _ = lower_graph(Pair().graph, H100)
    first, second = program.calls
    assert first.results[1:] == tuple(f"{first.results[0]}.{n}" for n in ("scaled", "squares"))
    assert first.operands[-1] == second.operands[1] and second.operands[-2:] == first.results[1:]
    assert set(first.results[1:]) <= set(second.frees)
    assert type(program).from_json(program.to_json()) == program
    assert [str(program.buffers[n]) for n in first.results[1:]] == ["f32[B, 48]", "f32[B, 3]"]


def test_a_kernel_that_would_write_a_part_of_a_sum_is_refused() -> None:
    node = Pair().graph.outputs[0]
    problem = problem_of(node)
    assert problem is not None
    assert linear_source(problem, H100, None, [SMALL], Hands(given=16)) is not None
    assert linear_source(problem, H100, None, [SMALL], Hands(given=32)) is None


def rms_error(graph: Graph, tokens: int, seeds: range) -> float:
    """Of the last output, over its own RMS."""
    lowered = BACKEND.lower(graph, CPU)
    errors, sizes = [], []
    for seed in seeds:
        inputs, weights = drawn(graph, tokens, seed)
        found = run(lowered, inputs, weights)[graph.output_names[-1]]
        wanted = truth(graph, inputs, weights)[-1]
        errors.append((found.double() - wanted).square().mean())
        sizes.append(wanted.square().mean())
    return float((torch.stack(errors).mean() / torch.stack(sizes).mean()).sqrt())


@pytest.mark.parametrize("stepwise", [False, True])
def test_the_error_is_no_larger_than_with_a_norm_of_its_own(stepwise: bool) -> None:
    first = Form(k=64, n=256, dtype=DType.BF16, behind=("residual",))
    second = Form(k=256, n=64, dtype=DType.BF16, norm="weight")
    h = product_of("first", first, tensor("x", DType.BF16, B, 64))
    more = {"stepwise": True} if stepwise else {}
    graph = graph_of(h, product_of("second", second, h, **more))
    tiles = GemmTiles(32, 64, 64, 4, 2)
    with cut(tiles):
        assert handed(BACKEND.lower(graph, CPU))
        ours = rms_error(graph, 32, range(8))
        with alone():
            theirs = rms_error(graph, 32, range(8))
    assert ours <= 1.02 * theirs
    if stepwise:  # it rounds once more
        assert ours < 0.98 * theirs


@pytest.fixture
def _in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is worth cutting down."""
    monkeypatch.setattr(spot_check, "LARGE", 0)
    monkeypatch.setattr(spot_check, "MOST_PROGRAMS", 4)


def trial(folder, dtype: DType = DType.BF16) -> float:
    """The error of a pair whose kernels run in part, with several tokens and with one."""
    first = Form(k=32, n=16 * 40, dtype=dtype, behind=("residual",))
    second = Form(k=16 * 40, n=16 * 40, dtype=dtype, norm="weight")
    graph = Pair(first, second).graph
    inputs, weights = zip(*(drawn(graph, tokens) for tokens in (5, 1)), strict=True)
    graph = graph.with_weights({name: Held(value, name) for name, value in weights[0].items()})
    with cut(SMALL):
        lowered = BACKEND.lower(graph, CPU)
    assert handed(lowered)
    write_trial(folder, graph, lowered, [list(given.values()) for given in inputs])
    return run_trial(folder)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_a_trial_takes_what_is_handed_on_from_what_is_found(tmp_path, dtype, _in_part) -> None:
    assert trial(tmp_path, dtype) < 2 * ERROR[dtype]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("(wide * weight)", "wide"),
        ("wide * wide", "wide * weight"),
        ("tl.store(squares + row", "tl.store(squares + 0 * row"),
        ("acc *= tl.rsqrt(total", "acc *= tl.rsqrt(0 * total"),
    ],
)
def test_a_trial_names_what_hands_on_something_else(
    tmp_path, monkeypatch, _in_part, line: str, wrong: str
) -> None:
    texts = linear.jit_text, linear.kernel_text
    monkeypatch.setattr(linear, "jit_text", lambda *a: texts[0](*a).replace(line, wrong))
    monkeypatch.setattr(linear, "kernel_text", lambda *a: texts[1](*a).replace(line, wrong))
    with pytest.raises(VerificationError, match="kernel (first|second)_body"):
        trial(tmp_path)


SHAPES = {  # of Llama-3-8B
    "qkv": Form(4096, 6144, DType.BF16, "weight"),
    "o": Form(4096, 4096, DType.BF16, behind=("residual",)),
    "gate_up": Form(4096, 14336, DType.BF16, "weight", halves=True),
    "down": Form(14336, 4096, DType.BF16, behind=("residual",)),
    "lm_head": Form(4096, 128256, DType.BF16, "weight"),
}


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("h100", ["o", "gate_up"]),  # one that hands on, one that is handed to
        *(
            pytest.param(arch, names, marks=pytest.mark.nightly)
            for arch, names in (("h100", SHAPES), ("a100", SHAPES), ("b200", SHAPES))
        ),
    ],
)
def test_products_that_hand_on_compile_ahead_of_time_and_do_not_spill(arch: str, names) -> None:
    target, sources = TARGETS[arch], []
    for form in map(SHAPES.__getitem__, names):
        hands = Hands(given=64, weight=DType.BF16) if form.norm == "none" else Hands(taken=64)
        problem = problem_of(product_of("product", form, tensor("x", form.dtype, B, form.k)))
        assert problem is not None
        gemms = ANY.gemms(problem, target)
        assert gemms is not None
        source = linear_source(problem, target, None, gemms, hands)
        assert source is not None
        sources.append(source)
    for package in compile_sources(sources, target.arch):
        assert all(one.spills <= SPILLED for one in package.resources)
        assert all(one.shared <= target.shared_memory_per_block for one in package.resources)
