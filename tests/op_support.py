"""Which backend has which op in which precision, found by lowering each op by itself.

    python tests/op_support.py    # writes docs/ops.md, which test_op_support.py holds against a run

A column is a name and a function from a graph of one op to an `Answer`: another backend adds one to
``COLUMNS``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch

from onnx_running import Held
from op_support_tensorrt import in_tensorrt
from tilewright.codegen.constants import is_constant
from tilewright.codegen.onnx.emitter import ELEMENT_TYPES, STORED_TYPES, Converter, Emitter, Shared
from tilewright.codegen.onnx.model import assemble_model
from tilewright.codegen.onnx.probe import Probe
from tilewright.codegen.onnx.standard import CONVERTERS_OF
from tilewright.codegen.onnx.table import CONVERTERS
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.errors import TilewrightError
from tilewright.ir.build import input_node, item, make, param, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.schema import OpSchema, Sample, all_schemas
from tilewright.ir.types import TensorType
from tilewright.passes.fuse import FUSE
from tilewright.passes.fuse_linears import FUSE_LINEARS
from tilewright.passes.open_rows import OPEN_ROWS
from tilewright.targets import TARGETS

TABLE = Path(__file__).resolve().parent.parent / "docs" / "ops.md"
NATIVE, DECOMPOSED, FALLBACK = "native", "decomposed", "fallback"
FLOATS = (DType.F32, DType.F16, DType.BF16)
# Ops without a value of their own, and those that hold graphs: these are what is within.
LEFT_OUT = frozenset({"input", "param", "const", "item", "aten", "fused", "cond"})
# From which operand on a model has weights.
WEIGHTS_FROM = {"moe_experts": 3, "linear": 1, "conv": 1, "rms_norm": 1, "layer_norm": 1}

# Ops whose operands behind the first are float32, or codes with scales in float32.
SINGLE = frozenset({"sample", "scaled_append_kv", "scaled_paged_attention"})


@dataclass(frozen=True, slots=True)
class Answer:
    """``how`` is one of the three; ``why`` a fallback is one."""

    how: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """An op in a precision."""

    op: str
    precision: str
    graph: Graph
    inputs: tuple[torch.Tensor, ...]


# -- backends -------------------------------------------------------------------------------------


def by_eager(case: Case) -> Answer:
    """torch, op by op: the ops' references."""
    try:
        interpret(case.graph, case.inputs)
    except (RuntimeError, TilewrightError) as error:
        return Answer(FALLBACK, str(error).splitlines()[0])
    return Answer(NATIVE)


def by_triton(case: Case) -> Answer:
    """Kernels and libraries for an H100, as the backend picks them without a tuner: in the graph of
    decode steps, whose products are kernels of ours, or else in the general one.
    """
    found = []
    for passes in ((FUSE_LINEARS, OPEN_ROWS, FUSE), (OPEN_ROWS, FUSE)):
        graph = reduce(lambda graph, step: step.run(graph), passes, case.graph)
        kernels = [call.kernel for call in lower_graph(graph, TARGETS["h100"])[0].calls]
        if not any(kernel.startswith("eager/") for kernel in kernels):
            found.append(NATIVE if len(kernels) < 2 else DECOMPOSED)
        if NATIVE in found or graph is case.graph:  # there is nothing to fuse
            break
    return Answer(max(found)) if found else Answer(FALLBACK, "torch computes it")


# Moves and changes of type, which come and go around any op.
_AROUND = frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Shape", "Identity", "Transpose"})
# What an op is in ONNX, where it takes more nodes beside to say of what: masks, scales, sizes.
_ITSELF = {
    "attention": {"Attention"},
    "linear": {"Gemm", "MatMulNBits"},
    "moe_experts": {"QMoE"},
    "quantize_rows": {"QuantizeLinear"},
    "rms_norm": {"RMSNormalization"},
    "rope": {"RotaryEmbedding"},
    "scaled_linear": {"MatMulInteger", "MatMulNBits", "Gemm"},
    "slot_attention": {"Attention", "GroupQueryAttention"},
}


def by_flavor(flavor: str) -> Callable[[Case], Answer]:
    """An emitted model; what has no form there is refused."""
    return partial(_in_onnx, converters=CONVERTERS_OF[flavor], types=STORED_TYPES)


def _in_onnx(case: Case, converters: Mapping[str, Converter], types: Mapping[DType, int]) -> Answer:
    e = Emitter(case.graph, {}, case.graph.nodes, converters.get, 16, Shared(types=types))
    for node in _calls(case):
        refusal = e.emit(node)
        if refusal is not None:
            return Answer(FALLBACK, refusal.reason)
    outputs = {f"result_{i}": node for i, node in enumerate(case.graph.outputs)}
    nodes = assemble_model(e, outputs).proto.graph.node
    ops = [node.op_type for node in nodes if node.op_type not in _AROUND]
    whole = len(ops) < 2 or not _ITSELF.get(case.op, set()).isdisjoint(ops)
    if e.shared.notes:  # of weights that become numbers
        return Answer(DECOMPOSED, next(iter(e.shared.notes)))
    return Answer(NATIVE if whole else DECOMPOSED)


def _calls(case: Case) -> list[Node]:
    """The nodes that a converter is asked of; what weights alone give is a part of its user."""
    return [node for node in case.graph.calls() if not is_constant(node)]


_PROBE = Probe()


def by_onnxruntime(case: Case) -> Answer:
    """An engine on the CPU: a form, and kernels of ONNX Runtime's CPU for it."""
    for node in _calls(case):
        refusal = _PROBE(node)
        if refusal is not None:
            unknown = refusal.reason.startswith("onnxruntime ")
            return Answer(FALLBACK, "its CPU has no kernel" if unknown else refusal.reason)
    return _in_onnx(case, CONVERTERS, ELEMENT_TYPES)


def by_tensorrt(case: Case) -> Answer:
    """An engine of TensorRT, or a network that is emitted; nothing is built."""
    found = in_tensorrt(case.op, case.graph, case.inputs)
    if not found.taken:
        return Answer(FALLBACK, found.why)
    return Answer(NATIVE if found.whole else DECOMPOSED)


COLUMNS: dict[str, Callable[[Case], Answer]] = {
    "eager": by_eager,
    "triton": by_triton,
    "onnxruntime engine": by_onnxruntime,
    "ONNX, standard": by_flavor("standard"),
    "ONNX, onnxruntime": by_flavor("onnxruntime"),
    "TensorRT": by_tensorrt,
}


# -- cases ----------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Every op in every precision: its schema's first sample, and products of codes."""
    for spec in all_schemas():
        samples = spec.samples(torch.Generator().manual_seed(0))
        if samples and spec.name not in LEFT_OUT | {"dequantize", "quantize_rows", "scaled_linear"}:
            for dtype in FLOATS:
                yield _sampled(spec, samples[0], dtype)
    for dtype in FLOATS:
        yield from _coded(dtype)


def _sampled(spec: OpSchema, sample: Sample, dtype: DType) -> Case:
    single = spec.name in SINGLE
    values = [_in(x, DType.F32 if i and single else dtype) for i, x in enumerate(sample.args)]
    attrs = {n: dtype if v is DType.F32 else v for n, v in sample.attrs.items()}
    return _case(spec.name, str(dtype), values, WEIGHTS_FROM.get(spec.name, 99), **attrs)


def _in(tensor: torch.Tensor | None, dtype: DType) -> torch.Tensor | None:
    wide = tensor is not None and tensor.is_floating_point() and tensor.itemsize > 1
    return tensor.to(dtype.torch) if wide else tensor


def _case(
    op: str, precision: str, values: list[torch.Tensor | None], first: int, **attrs: object
) -> Case:
    """The op over inputs, and over weights from the operand ``first`` on."""
    nodes: list[Node | None] = []
    held = {f"w{i}": Held(x) for i, x in enumerate(values) if x is not None and i >= first}
    for index, tensor in enumerate(values):
        make_leaf = param if index >= first else input_node
        name = f"w{index}" if index >= first else f"x{index}"
        nodes.append(None if tensor is None else make_leaf(name, _type(tensor)))
    node = make(op, *nodes, **attrs)
    inputs = tuple(n for n in nodes if n is not None and n.op == "input")
    given = tuple(x for i, x in enumerate(values) if x is not None and i < first)
    return Case(op, precision, Graph("g", inputs, _results(node), held), given)


def _type(tensor: torch.Tensor) -> TensorType:
    return TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape))


def _results(node: Node) -> tuple[Node, ...]:
    count = len(node.types)
    return (node,) if count == 1 else tuple(item(node, i) for i in range(count))


ROWS, WIDTH, COUNT = 3, 256, 64
WEIGHTS: dict[str, tuple[DType, int, DType | None]] = {
    "int8 weight": (DType.I8, 0, None),
    "int8 weight, rounds x": (DType.I8, 0, DType.I8),
    "int4 weight": (DType.U8, 32, None),
    "fp8 weight": (DType.F8E4M3, 0, None),
}
ACTIVATIONS = {
    "int8": (DType.I8, 1, 0),
    "fp8": (DType.F8E4M3, 1, 0),
    "fp8 blocks": (DType.F8E4M3, 128, 128),
}


def _coded(dtype: DType) -> Iterator[Case]:
    """Products of weights in codes, and of codes on both sides, for x and results of ``dtype``."""
    rows = torch.randn(ROWS, WIDTH).to(dtype.torch)
    x = input_node("x", TensorType(dtype, (symbol("T"), WIDTH)))
    for name, (codes, group, compute) in WEIGHTS.items():
        four = codes is DType.U8
        width = packed_width(WIDTH, group) if four else WIDTH
        parts = {
            "codes": torch.zeros(COUNT, width).to(codes.torch),
            "scale": torch.ones(COUNT, blocks(WIDTH, group)),
        }
        attrs = {"dtype": dtype, "group": group, "compute": compute}
        weight = make("dequantize", *_params(parts), width=WIDTH if four else None, **attrs)
        yield _of(make("linear", x, weight), f"{name}, {dtype}", x, parts, rows)
    yield _experts_in_codes(dtype)
    for name, (codes, block, group) in ACTIVATIONS.items():
        coded = make("quantize_rows", x, dtype=codes, group=group)
        yield _of(coded, f"{name}, {dtype}", x, {}, rows)
        parts = {
            "codes": torch.zeros(COUNT, WIDTH).to(codes.torch),
            "scale": torch.ones(blocks(COUNT, block), blocks(WIDTH, group)),
        }
        scales = {"dtype": dtype, "rows": block, "group": group}
        product = make("scaled_linear", item(coded, 0), item(coded, 1), *_params(parts), **scales)
        yield _of(product, f"{name}, {dtype}", x, parts, rows)


def _experts_in_codes(dtype: DType) -> Case:
    """Experts whose tables are in 4 bits by groups."""
    experts, inner, group = 4, 32, 32
    sizes = {"up": (2 * inner, WIDTH), "down": (WIDTH, inner)}
    parts: dict[str, torch.Tensor] = {}
    tables = []
    for name, (rows, columns) in sizes.items():
        codes = torch.zeros(experts * rows, packed_width(columns, group), dtype=torch.uint8)
        own = {
            f"{name}.codes": codes,
            f"{name}.scale": torch.ones(len(codes), blocks(columns, group)),
        }
        weight = make("dequantize", *_params(own), dtype=dtype, group=group, width=columns)
        tables.append(reshape(weight, experts, rows, columns))
        parts |= own
    x = input_node("x", TensorType(dtype, (symbol("T"), WIDTH)))
    ids = input_node("ids", TensorType(DType.I64, (symbol("T"), 2)))
    shares = input_node("shares", TensorType(dtype, (symbol("T"), 2)))
    node = make("moe_experts", x, ids, shares, *tables, activation="silu")
    graph = Graph("g", (x, ids, shares), (node,), {n: Held(t) for n, t in parts.items()})
    given = (torch.zeros(ROWS, WIDTH), torch.tensor([[0, 1]] * ROWS), torch.zeros(ROWS, 2))
    inputs = tuple(t.to(dtype.torch) if t.is_floating_point() else t for t in given)
    return Case("moe_experts", f"int4 weight, {dtype}", graph, inputs)


def _params(parts: dict[str, torch.Tensor]) -> list[Node]:
    return [param(name, _type(tensor)) for name, tensor in parts.items()]


def _of(
    node: Node, precision: str, x: Node, parts: dict[str, torch.Tensor], rows: torch.Tensor
) -> Case:
    held = {name: Held(tensor) for name, tensor in parts.items()}
    return Case(node.op, precision, Graph("g", (x,), _results(node), held), (rows,))


# -- the page -------------------------------------------------------------------------------------

HEAD = """\
# Ops, backends, precisions

Written by `python tests/op_support.py`, which lowers each op by itself; a test holds this page
against a run. An op is **native** where the backend has a kernel, library or op for it (with what
prepares masks, scales and sizes beside), **decomposed** where several of its ops make one of ours
or a weight becomes numbers first, and a **fallback** where torch computes it in an engine. An
emitted ONNX model has nothing to fall back to: there, such an op is refused by its name. Shapes are
those of the ops' own samples; a backend may decline others.

`triton` is the backend's choice for an H100 without a tuner, single ops fused as the passes fuse
them. `onnxruntime engine` runs on the CPU; 16-bit types have few kernels there. The next two are
`--emit onnx` and its flavors, by the ops that the file holds: onnxruntime's CPU widens float16 by
itself, and has no kernels that compute in bfloat16. `TensorRT` is by the layers of a network over
tokens, whether in an engine (`backend="tensorrt"`) or emitted: TensorRT itself computes a layer of
attention in float32 by parts, and of paged attention it has none.
"""


def rows_of_table() -> list[tuple[str, str, tuple[Answer, ...]]]:
    """(op, precisions, an answer a column); precisions of equal answers in one row."""
    found: dict[tuple[str, str], dict[tuple[Answer, ...], list[str]]] = {}
    for case in cases():
        answers = tuple(column(case) for column in COLUMNS.values())
        codes, _, dtype = case.precision.rpartition(", ")
        found.setdefault((case.op, codes), {}).setdefault(answers, []).append(dtype)
    return [
        (op, ", ".join(filter(None, (codes, " ".join(dtypes)))), answers)
        for (op, codes), by_answers in sorted(found.items())
        for answers, dtypes in by_answers.items()
    ]


def page() -> str:
    """The page in Markdown."""
    rows = rows_of_table()
    reasons: dict[str, int] = {}
    lines = [f"| op | precision | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for op, precision, answers in rows:
        cells = [op, precision]
        for answer in answers:
            number = reasons.setdefault(answer.why, len(reasons) + 1) if answer.why else 0
            cells.append(f"{answer.how} ({number})" if number else answer.how)
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join([HEAD, *lines, "", "What the numbers stand for:", "", *notes, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(page(), encoding="utf-8")
