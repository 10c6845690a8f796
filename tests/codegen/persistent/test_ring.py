"""A ring of weights without a GPU: what fits one, its tables, its machine code, its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persistent_codes import Coded
from persistent_forms import RING_MODELS, RING_OF_CODES, WHOLE, Model, step_inputs
from tilewright.codegen.base import Recovers, get_backend
from tilewright.codegen.persistent.codes import Codes
from tilewright.codegen.persistent.loading import PersistentKernel
from tilewright.codegen.persistent.lowering import cut_for, with_one_launch
from tilewright.codegen.persistent.reading import Shape, read_decode
from tilewright.codegen.persistent.ring import Ring, Rows, ring_of, step_weights
from tilewright.codegen.persistent.ring_decode import RingDecode, make_places, since_first
from tilewright.codegen.persistent.ring_source import POINTERS, RingCut
from tilewright.codegen.persistent.tiling import Tiling
from tilewright.codegen.triton.package import read_package
from tilewright.codegen.triton.tensor_map import Mapped
from tilewright.errors import EngineError, KernelError, UnsupportedError, UsageError
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.targets import Target

H100 = Target.parse("h100")
PAGES = [3, 1, 2, 0]
SHAPE = read_decode(WHOLE.graph())
PRODUCTS = [f"{name}_{i}" for i in range(2) for name in ("qkv", "o", "gate_up", "down")]
PRODUCTS += ["lm_head"]


def tensors() -> dict[str, torch.Tensor]:
    """Weights in one piece of memory, a multiple of 512 bytes from each other, and caches."""
    made = WHOLE.tensors(1, len(PAGES))
    kept = torch.zeros(sum(-(-t.numel() // 256) * 256 for t in made.values()), dtype=torch.bfloat16)
    begin, found = 0, {}
    for name, tensor in made.items():
        if tensor.dtype is not torch.bfloat16:
            found[name] = tensor
            continue
        found[name] = kept[begin : begin + tensor.numel()].view(tensor.shape)
        begin += -(-tensor.numel() // 256) * 256
    return found


def weights_of(graph: Graph) -> dict[str, torch.Tensor]:
    """Zeros."""
    types = {param_name(node): node.type for node in graph.params}
    return {
        name: torch.zeros(tuple(map(int, map(str, type_.shape))), dtype=type_.dtype.torch)
        for name, type_ in types.items()
    }


class Fake:
    """A launch that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[object] = []

    def __call__(self, arguments) -> None:
        self.given.append(list(arguments))


def decoder(weights: dict[str, torch.Tensor], **options: bool) -> tuple[RingDecode, Fake]:
    launch = Fake()
    return RingDecode(SHAPE, RingCut(), weights, launch, torch.device("cpu"), **options), launch


def test_the_sizes_of_a_model_are_read_from_its_graph() -> None:
    ring = ring_of(SHAPE)
    attention = SHAPE.form(SHAPE.calls[2])
    assert ring == Ring(2, 1024, 2048, 2048, attention, 1e-5, True)
    assert (ring.qkv, ring.attended, ring.calls, ring.programs) == (1536, 1024, 11, 64)
    assert ring.rows == tuple(Rows(k, 16, 256) for k in (1024, 1024, 2048, 1024))
    names = step_weights(SHAPE)
    products, norms = ("qkv_1", "o_1", "gate_up_1", "down_1"), ("norm_1", "norm2_1")
    assert names["layer 1"] == (*products, *norms, "", "", "", "")
    assert names["end"] == ("lm_head", "norm", "embed")


@pytest.mark.parametrize(
    ("rows", "pitch", "in_tile", "box"),
    [
        (Rows(2048, 16, 256), 2048, 8, 32),  # half a tile at once
        (Rows(14336, 16, 256), 16384, 1, 8),  # 4 boxes, then 3
        (Rows(576, 16, 64), 1024, 16, 1),
        (Rows(1536, 16, 64), 2048, 8, 8),
        (Rows(14336, 8, 256), 16384, 2, 4),
        (Rows(14336, 4, 256), 16384, 4, 2),
    ],
)
def test_rows_lie_at_the_next_power_of_two(rows, pitch, in_tile, box) -> None:
    assert (rows.pitch, rows.in_tile, rows.box) == (pitch, in_tile, box)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (replace(WHOLE, heads=16, kv_heads=2), "at most 4 query heads a KV head.*found 8"),
        (replace(WHOLE, dim=32, heads=32, kv_heads=8), "heads of 64 or 128.*found 32"),
        (replace(WHOLE, page=24), "pages of a power of two.*found 24"),
        (replace(WHOLE, width=512), "rows of 513 to 16384.*width 512"),
        (replace(WHOLE, ffn=2040), "rows of 513 to 16384.*inner 2040"),
        (replace(WHOLE, ffn=16640), "rows of 513 to 16384.*inner 16640"),
        (replace(WHOLE, vocab=2056), "a multiple of 16 tokens.*2056 tokens"),
        (replace(WHOLE, width=4096, vocab=1004), "a multiple of 8 tokens.*1004 tokens"),
        (replace(WHOLE, width=16384), "a tile has two rows"),
    ],
)
def test_sizes_that_do_not_fit_are_named(model: Model, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        ring_of(read_decode(model.graph()))


def changed(index: int, **fields: object) -> Shape:
    """The shape with another call."""
    calls = list(SHAPE.calls)
    calls[index] = replace(calls[index], **fields)
    return replace(SHAPE, calls=tuple(calls))


def of_form(index: int, **fields: object) -> Shape:
    """The shape with another form of a call and of its like."""
    number = SHAPE.calls[index].form
    forms = list(SHAPE.forms)
    forms[number] = replace(forms[number], **fields)
    return replace(SHAPE, forms=tuple(forms))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (replace(SHAPE, calls=SHAPE.calls[1:]), "in front of the embedding"),
        (replace(SHAPE, calls=SHAPE.calls[:-1]), "another end"),
        (replace(SHAPE, calls=(*SHAPE.calls[:9], SHAPE.calls[-1])), "no whole layer"),
        (changed(6, form=SHAPE.calls[3].form), "layers that differ"),
        (changed(3, residual="%9"), "read something else"),
        (changed(11, x="%1"), "a last product of something else"),
        (of_form(1, norm=False), "other calls"),
        (of_form(4, gated=False), "other calls"),
        (of_form(4, eps=1e-6), "norms of one epsilon"),
        (of_form(11, residual=True), "another end"),
        (of_form(11, gated=True), "another end"),
        (of_form(11, chosen=False), "another end"),
        (of_form(11, codes=Codes(8, 0, 1, 4, True)), "a last product of codes"),
        (of_form(1, codes=Codes(8, 0, 1, 4, True)), "weights of two kinds"),
        (changed(2, form=SHAPE.calls[1].form), "other calls"),
    ],
)
def test_calls_that_are_no_repeated_layer_are_named(shape: Shape, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        ring_of(shape)


@pytest.mark.parametrize(
    ("coded", "model", "named"),
    [
        (Coded(DType.F8E4M3, group=128, block=128, rounds=True), WHOLE, "of 8 bits by rows, x"),
        (Coded(DType.F8E4M3), RING_OF_CODES, "x rounded to such too"),
        (Coded(DType.U8, group=32), RING_OF_CODES, "by groups of 128"),
        (Coded(DType.U8), RING_OF_CODES, "by groups of 128"),  # of whole rows
        (Coded(DType.U8, group=128), replace(RING_OF_CODES, width=3072), "a power of two with"),
        (Coded(DType.U8, group=128), WHOLE, "rows of 513 to 16384"),  # 512 bytes are too few
        (Coded(DType.U8, group=128), replace(RING_OF_CODES, width=16384), "width of at most 8192"),
    ],
    ids=str,
)
def test_codes_that_have_no_ring(coded: Coded, model: Model, named: str) -> None:
    shape = read_decode(coded.graph(model.graph()))
    with pytest.raises(UnsupportedError, match=named):
        ring_of(shape)
    assert isinstance(cut_for(H100, shape), Tiling)


def test_norms_that_round_once_have_no_ring_of_codes() -> None:
    shape = read_decode(Coded(DType.F8E4M3, rounds=True).graph(WHOLE.graph()))
    (gates,) = (form for form in shape.products if form.gated)
    forms = tuple(
        replace(form, norm_stepwise=False) if form == gates else form for form in shape.forms
    )
    with pytest.raises(UnsupportedError, match="norms that round before"):
        ring_of(replace(shape, forms=forms))


@pytest.mark.parametrize(
    ("target", "batch"),
    [("cpu", 1), ("a100", 1), ("b200", 1), ("h100", 4)],
)
def test_other_targets_and_numbers_of_sequences_have_tiles(target: str, batch: int) -> None:
    assert isinstance(cut_for(Target.parse(target), SHAPE, batch), Tiling)
    assert cut_for(H100, SHAPE) == RingCut(programs=132)
    assert isinstance(cut_for(replace(H100, sms=63), SHAPE), Tiling)  # 64 have attention
    for coded in CODED.values():
        assert cut_for(H100, read_decode(coded)) == RingCut(programs=132, num_warps=8)


CODED = {
    "e4m3": Coded(DType.F8E4M3, rounds=True).graph(RING_OF_CODES.graph()),
    "4 bits": Coded(DType.U8, group=128).graph(RING_OF_CODES.graph()),
}
GRAPHS = {name: model.graph() for name, model in RING_MODELS.items()} | CODED


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_it_compiles_for_hopper_within_a_multiprocessor(graph: Graph) -> None:
    kernels = get_backend("triton").lower(graph, Target.parse("cpu"))
    cut = RingCut(num_warps=8) if graph in CODED.values() else None
    lowered = with_one_launch(kernels, graph, H100, cut=cut)
    (call,) = (call for call in lowered.program.calls if "/persistent/" in call.kernel)
    assert call.kernel.rpartition("/")[2].startswith("decode_ring-")
    read = lowered.files.__getitem__
    package = read_package(read, call.kernel.rpartition("/")[2])
    (binary,) = package.binaries.values()
    assert binary.cooperative and binary.parameters.count("b8") == 4
    assert binary.resources.spills <= 512
    assert binary.resources.shared <= H100.shared_memory_per_block
    with pytest.raises(EngineError, match="cpu, which has no TMA"):
        get_backend("triton").load(
            call, lowered.program, weights_of(graph), read, torch.device("cpu")
        )


def test_a_kernel_that_takes_too_much_shared_memory_is_refused() -> None:
    graph, less = WHOLE.graph(), replace(H100, shared_memory_per_block=200_000)
    kernels = get_backend("triton").lower(graph, Target.parse("cpu"))
    with pytest.raises(UnsupportedError, match=r"decode_ring: .*at most 200000 bytes of shared"):
        with_one_launch(kernels, graph, less)


def test_tables_tell_where_everything_lies() -> None:
    weights = tensors()
    start = weights["embed"].data_ptr()
    caches = [1000 + 16 * index for index in range(4)]
    table = make_places(ring_of(SHAPE), step_weights(SHAPE), weights, caches, start)
    row = table[1].tolist()
    products = [weights[name] for name in ("qkv_1", "o_1", "gate_up_1", "down_1")]
    assert [start + 512 * line for line in row[:4]] == [one.data_ptr() for one in products]
    assert row[4:6] == [weights["norm_1"].data_ptr(), weights["norm2_1"].data_ptr()]
    assert row[6:] == [*caches[2:], 0, 0, 0, 0]
    last = table[2].tolist()
    assert start + 512 * last[0] == weights["lm_head"].data_ptr()
    assert last[1:3] == [weights["norm"].data_ptr(), start]


def test_a_step_is_told_its_memory_in_the_kernels_order() -> None:
    weights = tensors()
    ours, launch = decoder(weights)
    inputs = step_inputs(PAGES, 3, 7, WHOLE.page)
    ours.run(inputs, weights)
    ours.run(inputs, weights)
    first, second = launch.given
    maps, rest = first[:4], dict(zip((*POINTERS, "limit"), first[4:], strict=True))
    products = [n for names in step_weights(SHAPE).values() for n in names if n in PRODUCTS]
    ends = [weights[n].data_ptr() + weights[n].nbytes for n in products]
    for one, rows in zip(maps, ring_of(SHAPE).rows, strict=True):
        assert isinstance(one, Mapped) and one.swizzle == 0
        assert one.box == (rows.box, 256)
        assert one.tensor.data_ptr() + 512 * one.shape[0] == max(ends)
    assert rest["token_ids"] is inputs["token_ids"] and rest["logits"] is ours.logits
    assert rest["inv_freq"] is weights["inv_freq"] and rest["limit"] == 1 << 20
    assert second[4] is rest["places"]  # the table of these caches is kept
    assert (ours.memory["memory"].view(torch.int16) == -1).all()
    assert (ours.memory["partials"].view(torch.int32) == -1).all()


def test_a_weight_between_lines_is_copied() -> None:
    weights = tensors()
    room = torch.zeros(1024 * 1024 + 256, dtype=torch.bfloat16)
    lines = (weights["embed"].data_ptr() - room.data_ptr()) % 512 // 2
    begin = (lines + 8) % 256
    between = room[begin : begin + 1024 * 1024].view(1024, 1024).normal_()
    with pytest.warns(UserWarning, match="1 weights \\(2 MB, o_1 first\\) do not lie"):
        ours, launch = decoder({**weights, "o_1": between})
    ours.run(step_inputs(PAGES, 3, 7, WHOLE.page), weights)
    ours_of, first = ours._weights["o_1"], ours._first.data_ptr()
    assert torch.equal(ours_of, between) and (ours_of.data_ptr() - first) % 512 == 0
    table = launch.given[0][4]
    assert first + 512 * int(table[1, 1]) == ours_of.data_ptr()
    assert ours._weights["o_0"] is weights["o_0"]


def test_weights_and_caches_that_are_not_there_are_refused() -> None:
    weights = tensors()
    without = {name: tensor for name, tensor in weights.items() if name != "norm2_0"}
    with pytest.raises(UsageError, match="norm2_0"):
        decoder(without)
    turned = {**weights, "o_1": weights["o_1"].t()}
    with pytest.raises(UsageError, match="o_1.*contiguous"):
        decoder(turned)
    ours, _ = decoder(weights)
    with pytest.raises(UsageError, match="v_cache_1"):
        ours.run(step_inputs(PAGES, 3, 7, WHOLE.page), {**weights, "v_cache_1": None})  # type: ignore[dict-item]


def test_new_caches_within_a_capture_are_refused(monkeypatch) -> None:
    weights = tensors()
    ours, _ = decoder(weights)
    ours._tables._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="has run with before the capture"):
        ours.run(step_inputs(PAGES, 3, 7, WHOLE.page), weights)


def test_a_launch_that_was_given_up_is_told_until_it_is_reset() -> None:
    ours, _ = decoder(tensors())
    ours.check()
    ours.logits.fill_(float("nan"))
    ours.memory["diagnosis"].copy_(torch.tensor([1, 6]))
    with pytest.raises(KernelError, match=r"call 6 of 11 of the ring .*Attention of %6"):
        ours.check()
    assert ours.tokens == -1
    kernel = PersistentKernel(ours)
    assert isinstance(kernel, Recovers)
    assert "call 6 of 11" in str(kernel.recover())
    assert kernel.recover() is None
    ours.check()


def test_times_are_those_of_a_clock_that_turns_over() -> None:
    begun = (1 << 32) - 50
    marks = torch.tensor([[[begun, begun + 10, begun + 40], [begun + 60, 7, begun + 100]]])
    times = ((marks + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
    assert since_first(times).tolist() == [[[0, 10, 40], [60, 60, 100]]]  # 7 is of an older step
    ours, _ = decoder(tensors())
    with pytest.raises(UsageError, match="notes times"):
        ours.trace("none")
    ours, _ = decoder(tensors(), timed=True)
    trace = ours.trace("a step")
    assert len(trace.calls) == 11 and len(trace.times) == len(trace.places) == 132


Cell = tuple[object, ...]


class Memory:
    """What programs tell each other: who wrote a cell, None where nothing is there."""

    def __init__(self) -> None:
        self.cells: dict[Cell, int | None] = {}

    def write(self, cell: Cell, step: int) -> None:
        assert self.cells.get(cell) is None, f"{cell} was not empty"
        self.cells[cell] = step

    def there(self, cells: list[Cell], step: int) -> bool:
        """Whether all are; who finds some of another step reads what it must not."""
        found = [self.cells.get(cell) for cell in cells]
        assert {*found} <= {None, step}, f"step {step} read {found}"
        return None not in found


def program(memory: Memory, me: int, programs: int, layers: int, step: int):
    """A program's steps as the kernel makes them, one piece of each call; it stops where others may
    go on, and where what it reads is not there.
    """
    everyone = range(programs)

    def values(layer: int, call: str, turn: int) -> list[Cell]:
        return [(turn, layer, call, other) for other in everyone]

    turn = step % 2
    for layer in range(layers):
        for call in ("qkv", "attention", "o", "down"):
            memory.cells[(1 - turn, layer, call, me)] = None
        yield
    before: list[Cell] = []
    for layer in range(layers):
        place = (step * layers + layer) % 4
        while not memory.there(before, step):
            yield
        memory.write((turn, layer, "qkv", me), step)
        yield
        while not memory.there(values(layer, "qkv", turn), step):
            yield
        memory.write(("parts", place, me), step)
        yield
        while not memory.there([("parts", place, other) for other in everyone], step):
            yield
        memory.write((turn, layer, "attention", me), step)
        yield
        memory.cells[("parts", (place - 1) % 4, me)] = None
        yield
        for call, source in (("o", "attention"), ("down", "o")):
            while not memory.there(values(layer, source, turn), step):
                yield
            memory.write((turn, layer, call, me), step)
            yield
        before = values(layer, "down", turn)


@given(st.integers(1, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_value_is_read_that_is_of_another_step(programs, layers, random) -> None:
    """The protocol under random schedules: each cell is written once between two emptyings, and
    read of the step that asks; partials of a step's last layer meet the next step's first.
    """
    memory = Memory()
    for step in range(5):
        running = [program(memory, me, programs, layers, step) for me in range(programs)]
        turns = 0
        while running:
            turns += 1
            assert turns < 10_000, "programs wait for each other"
            one = random.choice(running)
            if next(one, "ended") == "ended":
                running.remove(one)


def test_the_protocol_needs_its_places() -> None:
    """What the model above is worth: with an emptying left out it finds the fault."""
    memory = Memory()
    memory.write(("parts", 0, 0), 0)
    with pytest.raises(AssertionError, match="was not empty"):
        memory.write(("parts", 0, 0), 1)
    with pytest.raises(AssertionError, match="step 1 read"):
        memory.there([("parts", 0, 0)], 1)
