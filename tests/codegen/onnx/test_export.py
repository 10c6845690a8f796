"""A decoder over slots as one ONNX model for stock runtimes: every form of attention that it can
hold, weights in codes, names and layers. The oracle is the interpreter.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_running import Held
from tilewright.codegen.onnx.export import Exported, export_decoder
from tilewright.codegen.onnx.standard import CONVERTERS_OF
from tilewright.errors import UnsupportedError
from tilewright.ir.graph import Graph, input_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph

VOCAB, ROOM = 20, 16
TEXT = """\
def lm(token_ids: i64[T], positions: i64[T], seq_lens: i32[B], logits_indices: i64[R],
       k_cache_0: f32[B, {G}, L, {D}], v_cache_0: f32[B, {G}, L, {E}]):
    wq: f32[20, {Q}] = param("layers.0.q")
    wk: f32[20, {K}] = param("layers.0.k")
    wv: f32[20, {V}] = param("layers.0.v")
    head: f32[20, {O}] = param("head")
    norm: f32[{O}] = param("norm")
    {vectors}
    q0: f32[T, {Q}] = embedding(wq, token_ids)
    k0: f32[T, {K}] = embedding(wk, token_ids)
    v0: f32[T, {V}] = embedding(wv, token_ids)
    q: f32[T, {H}, {D}] = reshape(q0, shape=(T, {H}, {D}))
    k: f32[T, {G}, {D}] = reshape(k0, shape=(T, {G}, {D}))
    v: f32[T, {G}, {E}] = reshape(v0, shape=(T, {G}, {E}))
    a: (f32[T, {H}, {E}], f32[B, {G}, L, {D}], f32[B, {G}, L, {E}],) = slot_attention(
        q, k, v, k_cache_0, v_cache_0, seq_lens, {operands} {attrs})
    o: f32[T, {H}, {E}] = item(a, index=0)
    kn: f32[B, {G}, L, {D}] = item(a, index=1)
    vn: f32[B, {G}, L, {E}] = item(a, index=2)
    flat: f32[T, {O}] = reshape(o, shape=(T, {O}))
    normed: f32[T, {O}] = rms_norm(flat, norm, eps=1e-05)
    picked: f32[R, {O}] = index_select(normed, logits_indices, dim=0)
    logits: f32[R, 20] = linear(picked, head)
    return {{"logits": logits, "k_cache_0": kn, "v_cache_0": vn}}
"""
FORMS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "alibi, window": {"alibi": True, "window": 3},
    "all": {"window": 4, "softcap": 5.0, "sinks": True, "alibi": True},
}
SHAPES = {"gqa": (4, 2, 8, 8), "mqa": (3, 1, 24, 24), "odd, wide v": (2, 2, 6, 10)}


def decoder(shape: tuple[int, ...], form: dict[str, object]) -> Graph:
    """One layer of attention between embeddings and logits."""
    heads, kv_heads, dim, value_dim = shape
    sizes = {
        "H": heads, "G": kv_heads, "D": dim, "E": value_dim, "Q": heads * dim,
        "K": kv_heads * dim, "V": kv_heads * value_dim, "O": heads * value_dim,
    }  # fmt: skip
    extra = [name for name in ("sinks", "alibi") if form.get(name)]
    operands = ", ".join(name if name in extra else "None" for name in ("sinks", "alibi"))
    attrs = {"scale": 0.3, **{n: form[n] for n in ("window", "softcap") if n in form}}
    text = TEXT.format(
        vectors="\n    ".join(f'{name}: f32[{heads}] = param("{name}")' for name in extra),
        operands=f"{operands}," if extra else "",
        attrs=", ".join(f"{name}={value}" for name, value in attrs.items()),
        **sizes,
    )
    graph = parse_graph(text)
    generator = torch.Generator().manual_seed(3)
    params = {node.attr("name"): node.shape for node in graph.params}
    return graph.with_weights(
        {n: Held(torch.randn(s, generator=generator)) for n, s in params.items()}  # type: ignore
    )


def session_of(exported: Exported) -> ort.InferenceSession:
    """The model, checked as its writer checks it, in ONNX Runtime."""
    proto = onnx_ir.to_proto(exported.model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # caches that are not shared are copied, with a warning
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Both:
    """The exported model and the interpreter, each with caches of its own."""

    def __init__(self, graph: Graph, flavor: str, batch: int) -> None:
        self.graph = graph
        self.exported = export_decoder(graph, CONVERTERS_OF[flavor], {}, ROOM)
        self.session = session_of(self.exported)
        self.past = {
            c.past: np.zeros((batch, c.heads, ROOM, c.width), np.float32)
            for c in self.exported.caches
        }
        self.wanted = [torch.from_numpy(cache.copy()) for cache in self.past.values()]

    def step(self, starts: list[int], new: int, seed: int = 0) -> None:
        """``new`` tokens a row from its start; logits and caches agree."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCAB, (len(starts), new), generator=generator)
        positions = torch.tensor(starts)[:, None] + torch.arange(new)
        rows = torch.arange(new).expand(len(starts), new)
        feeds = {"input_ids": ids, "position_ids": positions, "logits_indices": rows}
        taken = {value.name for value in self.session.get_inputs()}
        feeds = {name: tensor.numpy() for name, tensor in feeds.items() if name in taken}
        logits, *presents = self.session.run(None, {**feeds, **self.past})
        given = {
            "token_ids": ids.flatten(),
            "positions": positions.flatten(),
            "seq_lens": (positions[:, -1] + 1).to(torch.int32),
            "logits_indices": torch.arange(ids.numel()),
        }
        inputs = [given[n] for node in self.graph.inputs if (n := input_name(node)) in given]
        wanted, *self.wanted = interpret(self.graph, [*inputs, *self.wanted])
        found = torch.from_numpy(logits).flatten(0, 1)
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
        self.past = dict(zip(self.past, presents, strict=True))
        # What lies behind a sequence's end is its op's own affair: nothing sees it.
        for row, length in enumerate(given["seq_lens"].tolist()):
            for cache, expected in zip(presents, self.wanted, strict=True):
                ours = torch.from_numpy(cache)[row, :, :length]
                torch.testing.assert_close(ours, expected[row, :, :length])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("flavor", CONVERTERS_OF)
def test_prefill_decode_and_chunks(
    flavor: str, shape: tuple[int, ...], form: dict[str, object]
) -> None:
    both = Both(decoder(shape, form), flavor, batch=2)
    both.step([0, 0], 5)
    both.step([5, 3], 1)  # the second row had two tokens of padding, which are overwritten
    both.step([6, 4], 1)
    both.step([7, 5], 4)


@settings(max_examples=15, deadline=None)
@given(
    starts=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    new=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_any_rows_and_lengths(starts: list[int], new: int, seed: int) -> None:
    both = Both(decoder(SHAPES["gqa"], FORMS["window"]), "standard", len(starts))
    both.step([0] * len(starts), 8, seed)
    both.step(starts, new, seed + 1)


def test_the_standard_flavor_has_ops_of_the_standard_alone() -> None:
    def domains(flavor: str) -> set[tuple[str, str]]:
        graph = decoder(SHAPES["gqa"], {})
        model = export_decoder(graph, CONVERTERS_OF[flavor], {}, ROOM).model
        return {(node.domain, node.op_type) for node in model.graph}

    standard = domains("standard")
    assert {domain for domain, _ in standard} == {""}
    ops = {op for _, op in standard}
    assert {"Attention", "RMSNormalization", "TensorScatter"} <= ops
    assert "Identity" not in ops  # it would copy a cache
    assert ("com.microsoft", "GroupQueryAttention") in domains("onnxruntime")


def test_names_sizes_and_layers() -> None:
    graph = decoder(SHAPES["gqa"], {})
    layers = {node: "layers.0" for node in graph.nodes if node.op == "slot_attention"}
    model = export_decoder(graph, CONVERTERS_OF["standard"], layers, ROOM).model
    assert [value.name for value in model.graph.inputs] == [
        "input_ids", "position_ids", "logits_indices",
        "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    names = [value.name for value in model.graph.outputs]
    assert names == ["logits", "present.0.key", "present.0.value"]
    shapes = [str(value.shape) for value in (model.graph.inputs[0], model.graph.inputs[3])]
    assert shapes == ["[batch,length]", "[batch,2,cache_length,8]"]
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert attention.name.startswith("layers.0/")
    told = {"tilewright.layer": "layers.0", "tilewright.op": "slot_attention"}
    assert attention.metadata_props == told
    assert {"layers.0.q", "head", "norm"} <= set(model.graph.initializers)


def test_an_op_without_a_form_is_named() -> None:
    graph = decoder(SHAPES["gqa"], {})
    table = {name: c for name, c in CONVERTERS_OF["standard"].items() if name != "rms_norm"}
    with pytest.raises(UnsupportedError, match="op rms_norm in layers.7: .*no ONNX form"):
        layers = {node: "layers.7" for node in graph.nodes if node.op == "rms_norm"}
        export_decoder(graph, table, layers, ROOM)


CODES = """\
def lm(token_ids: i64[T], positions: i64[T], seq_lens: i32[B], logits_indices: i64[R]):
    table: f32[20, {K}] = param("table")
    q: {q} = param("q")
    scale: {scale} = param("scale")
    {zero}
    w: f32[6, {K}] = dequantize(q, scale, {operand} dtype=f32, group={group}{width})
    x: f32[T, {K}] = embedding(table, token_ids)
    picked: f32[R, {K}] = index_select(x, logits_indices, dim=0)
    logits: f32[R, 6] = linear(picked, w)
    return {{"logits": logits}}
"""
SCHEMES: dict[str, tuple[int, str, int, str | None]] = {
    "int8 rows": (32, "i8", 0, None),
    "int8 groups": (64, "i8", 32, None),
    "4 bits, rows": (32, "u8", 0, None),
    "4 bits, groups": (96, "u8", 32, None),
    "4 bits, zero points": (96, "u8", 32, "u8"),
    "4 bits, a zero point a row": (32, "u8", 0, "u8"),
    "4 bits, columns within a group": (40, "u8", 32, None),
    "4 bits, zero points between codes": (64, "u8", 32, "f32"),
}
REFUSED = {
    "4 bits, columns within a group": "40 columns end within a group",
    "4 bits, zero points between codes": "zero points between the codes",
}


def in_codes(width: int, codes: str, group: int, zero: str | None) -> Graph:
    groups = -(-width // group) if group else 1
    stored = -(-width // group) * group if group else width
    shape = (6, stored // 2 if codes == "u8" else stored)
    text = CODES.format(
        K=width,
        q=f"{codes}[{shape[0]}, {shape[1]}]",
        scale=f"f32[6, {groups}]",
        zero="" if zero is None else f'zero: {zero}[6, {groups}] = param("zero")',
        operand="" if zero is None else "zero,",
        group=group,
        width=f", width={width}" if codes == "u8" else "",
    )
    low, high, dtype = (0, 256, torch.uint8) if codes == "u8" else (-128, 128, torch.int8)
    weights = {
        "table": torch.randn(20, width),
        "q": torch.randint(low, high, shape).to(dtype),
        "scale": torch.rand(6, groups),
    }
    if zero is not None:
        points = torch.randint(16, (6, groups))
        weights["zero"] = points.to(torch.uint8) if zero == "u8" else points + 0.5
    return parse_graph(text).with_weights({n: Held(w) for n, w in weights.items()})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_weights_in_codes(scheme: tuple[int, str, int, str | None]) -> None:
    graph = in_codes(*scheme)
    name = next(name for name, found in SCHEMES.items() if found == scheme)
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            export_decoder(graph, CONVERTERS_OF["standard"], {}, ROOM)
        return
    both = Both(graph, "standard", batch=2)
    assert "DequantizeLinear" in {node.op_type for node in both.exported.model.graph}
    held = both.exported.model.graph.initializers["q"].const_value
    assert held is not None and held.nbytes == graph.weights["q"].load().nbytes
    both.step([0, 0], 3)
