"""append_kv: goldens of what is taken in and what stays in front of it, and the bits of before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriting import parse
from tilewright.codegen.eager.backend import BACKEND
from tilewright.codegen.plan import plan_buffers
from tilewright.ir.dims import evaluate
from tilewright.ir.graph import Graph, input_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.passes.fuse_append import fuse_append
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target

SIZES = {"T": 5, "B": 2, "M": 3, "N": 4, "P": 4}
WRITE = (
    "kn: f32[N, P, 2, 8] = kv_write(k_cache, {k}, slots)",
    "vn: f32[N, P, 2, 6] = kv_write(v_cache, v, slots)",
)
ATTEND = "a: f32[T, 4, 6] = paged_attention({q}, {kn}, {vn}, tables, lens, starts, scale=0.3)"
TABLES = (
    "c: f32[T, 1, 4] = reshape(cos, shape=(T, 1, 4))",
    "s: f32[T, 1, 4] = reshape(sin, shape=(T, 1, 4))",
)
Q_ROPE = 'qr: f32[T, 4, 8] = rope({x}, c, s, layout="half")'
K_ROPE = 'kr: f32[T, 2, 8] = rope({x}, c, s, layout="half")'
Q_NORM = "qn: f32[T, 4, 8] = rms_norm(q, qw, eps=1e-06)"
K_NORM = "knorm: f32[T, 2, 8] = rms_norm(k, kw, eps=1e-06)"


def graph(*lines: str, kn: str = "kn", vn: str = "vn") -> str:
    """The text of a graph of one attention ``a`` over the caches ``kn`` and ``vn``."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"""
def g(q: f32[T, 4, 8], k: f32[T, 2, 8], v: f32[T, 2, 6], cos: f32[T, 4], sin: f32[T, 4],
      qw: f32[8], kw: f32[8], slots: i64[T], tables: i32[B, M], lens: i32[B], starts: i32[B + 1],
      k_cache: f32[N, P, 2, 8], v_cache: f32[N, P, 2, 6]):
{body}    return {{"out": a, "k_cache": {kn}, "v_cache": {vn}}}
"""


def before(*lines: str, q: str, k: str) -> str:
    return graph(
        *lines, *(line.format(k=k) for line in WRITE), ATTEND.format(q=q, kn="kn", vn="vn")
    )


def after(*lines: str, call: str, q: str = "i2") -> str:
    """With ``append_kv(…)`` as given; ``q`` is taken from it, unless it is another value."""
    results = "f32[N, P, 2, 8], f32[N, P, 2, 6]," + (" f32[T, 4, 8]," if q == "i2" else "")
    types = ("f32[N, P, 2, 8]", "f32[N, P, 2, 6]", "f32[T, 4, 8]")
    items = [f"i{i}: {t} = item(new, index={i})" for i, t in enumerate(types) if i < 2 or q == "i2"]
    attend = ATTEND.format(q=q, kn="i0", vn="i1")
    return graph(*lines, f"new: ({results}) = {call}", *items, attend, kn="i0", vn="i1")


def inputs_of(each: Graph) -> list[torch.Tensor]:
    """Random tensors, and metadata of two sequences that bring 3 and 2 tokens."""
    metadata = {
        "slots": torch.randperm(16)[: SIZES["T"]],
        "tables": torch.randint(0, 4, (2, 3), dtype=torch.int32),
        "lens": torch.tensor([7, 4], dtype=torch.int32),
        "starts": torch.tensor([0, 3, 5], dtype=torch.int32),
    }
    return [
        metadata[input_name(node)]
        if input_name(node) in metadata
        else torch.randn([evaluate(size, SIZES) for size in node.shape]).to(node.dtype.torch)
        for node in each.inputs
    ]


def fused(text: str) -> Graph:
    """The graph after the pass, with the bits that it had before."""
    old = parse(text)
    new = verify(fuse_append(old))
    inputs = inputs_of(old)
    for a, b in zip(interpret(old, inputs), interpret(new, inputs), strict=True):
        assert torch.equal(a, b)
    assert fuse_append(new) == new
    return new


def check(old: str, new: str) -> None:
    found = fused(old)
    wanted = str(parse_graph(new))
    assert str(found) == wanted, f"\n{found}\ninstead of\n{wanted}"


def test_rope_of_both_is_taken_in():
    check(
        before(*TABLES, Q_ROPE.format(x="q"), K_ROPE.format(x="k"), q="qr", k="kr"),
        after(call='append_kv(k, v, k_cache, v_cache, slots, q, cos, sin, layout="half")'),
    )


def test_norms_of_heads_are_taken_in():
    lines = (*TABLES, Q_NORM, K_NORM, Q_ROPE.format(x="qn"), K_ROPE.format(x="knorm"))
    call = "append_kv(k, v, k_cache, v_cache, slots, q, cos, sin, qw, kw, eps=1e-06)"
    check(before(*lines, q="qr", k="kr"), after(call=call))


@pytest.mark.parametrize("normed", ["q", "k"])
def test_one_norm_is_taken_in_alone(normed: str):
    lines = (Q_NORM, Q_ROPE.format(x="qn"), K_ROPE.format(x="k"))
    weights = "qw"
    if normed == "k":
        lines = (K_NORM, Q_ROPE.format(x="q"), K_ROPE.format(x="knorm"))
        weights = "None, kw"
    call = f"append_kv(k, v, k_cache, v_cache, slots, q, cos, sin, {weights}, eps=1e-06)"
    check(before(*TABLES, *lines, q="qr", k="kr"), after(call=call))


def test_norms_without_rope_are_taken_in():
    call = "append_kv(k, v, k_cache, v_cache, slots, q, None, None, qw, kw, eps=1e-06)"
    check(before(Q_NORM, K_NORM, q="qn", k="knorm"), after(call=call))


def test_without_rope_q_is_no_operand():
    check(before(q="q", k="k"), after(call="append_kv(k, v, k_cache, v_cache, slots)", q="q"))


def test_q_under_other_tables_stays_out():
    other = "qr: f32[T, 4, 8] = rope(q, s, c)"
    check(
        before(*TABLES, other, K_ROPE.format(x="k"), q="qr", k="kr"),
        after(
            *TABLES,
            other,
            call="append_kv(k, v, k_cache, v_cache, slots, None, cos, sin)",
            q="qr",
        ),
    )


@pytest.mark.parametrize("other", ['rope(q, c, s, layout="interleaved")', "add(q, q)"])
def test_q_of_another_path_stays_out(other: str):
    line = f"qr: f32[T, 4, 8] = {other}"
    text = before(*TABLES, line, K_ROPE.format(x="k"), q="qr", k="kr")
    new = next(node for node in fused(text).nodes if node.op == "append_kv")
    assert new.args[5] is None and new.args[6] is not None


def test_a_second_epsilon_stays_out():
    norm = Q_NORM.replace("1e-06", "0.001")
    lines = (*TABLES, norm, K_NORM, Q_ROPE.format(x="qn"), K_ROPE.format(x="knorm"))
    call = "append_kv(k, v, k_cache, v_cache, slots, qn, cos, sin, None, kw, eps=1e-06)"
    check(before(*lines, q="qr", k="kr"), after(norm, call=call))


def stepwise(text: str, *names: str) -> str:
    """The text with ``stepwise=True`` in the lines that set these names."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.split(":")[0].strip() in names:
            lines[number] = line.replace(")\n", ", stepwise=True)\n")
    return "".join(lines)


def in_halves(text: str) -> str:
    """The text in bfloat16."""
    return text.replace("f32", "bf16")


NORMED = before(
    *(*TABLES, Q_NORM, K_NORM, Q_ROPE.format(x="qn"), K_ROPE.format(x="knorm")), q="qr", k="kr"
)


def test_stepwise_norms_and_ropes_are_taken_in():
    call = "append_kv(k, v, k_cache, v_cache, slots, q, cos, sin, qw, kw, eps=1e-06, stepwise=True)"
    steps = stepwise(in_halves(NORMED), "qn", "knorm", "qr", "kr")
    check(steps, in_halves(after(call=call)))
    call = "append_kv(k, v, k_cache, v_cache, slots, q, None, None, qw, kw, eps=1e-06, "
    steps = stepwise(in_halves(before(Q_NORM, K_NORM, q="qn", k="knorm")), "qn", "knorm")
    check(steps, in_halves(after(call=f"{call}stepwise=True)")))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("qr", "kr"), {"rms_norm": 2}),  # Gemma's
        (("qn", "knorm"), {"rms_norm": 2}),
        (("qr", "kr", "qn"), {"rms_norm": 1}),
        (("qr", "kr", "knorm"), {"rms_norm": 1}),
        (("qr", "qn"), {"rms_norm": 1, "rope": 1}),
        (("kr", "knorm"), {"rms_norm": 1, "rope": 1}),
    ],
    ids=["ropes", "norms", "ropes and q norm", "ropes and k norm", "q", "k"],
)
def test_norms_that_round_unlike_the_rope_stay_out(names: tuple[str, ...], left: dict[str, int]):
    new = fused(stepwise(in_halves(NORMED), *names))
    ops = [node.op for node in new.calls()]
    assert ops.count("append_kv") == 1
    assert {op: ops.count(op) for op in ("rms_norm", "rope") if op in ops} == left


def test_without_rope_norms_that_round_alike_are_taken_in():
    text = in_halves(before(Q_NORM, K_NORM, q="qn", k="knorm"))
    new = fused(stepwise(text, "knorm"))
    (call,) = (node for node in new.nodes if node.op == "append_kv")
    assert call.args[5] is None and call.args[9] is not None and call.attr("stepwise") is True
    new = fused(stepwise(text, "qn"))
    (call,) = (node for node in new.nodes if node.op == "append_kv")
    assert call.args[5] is None and call.args[9] is not None and call.attr("stepwise") is None


@pytest.mark.parametrize(
    "lines",
    [
        ("knorm: f32[T, 2, 8] = rms_norm(k, eps=1e-06)",),
        (
            "flat: f32[T, 16] = reshape(k, shape=(T, 16))",
            "w: f32[16] = concat(kw, kw, dim=0)",
            "flatn: f32[T, 16] = rms_norm(flat, w, eps=1e-06)",
            "knorm: f32[T, 2, 8] = reshape(flatn, shape=(T, 2, 8))",
        ),
    ],
    ids=["without a weight", "over all heads"],
)
def test_other_norms_stay_out(lines: tuple[str, ...]):
    text = before(*TABLES, *lines, K_ROPE.format(x="knorm"), q="q", k="kr")
    (new,) = (node for node in fused(text).nodes if node.op == "append_kv")
    assert new.args[9] is None and new.args[6] is not None
    assert new.args[0].op in ("rms_norm", "reshape")


def test_a_rope_in_float32_between_casts_is_taken_in():
    """Where tables are wider than q and k, models round after the rotation: so does the op."""
    text = """
def g(q: bf16[T, 2, 8], k: bf16[T, 2, 8], cos: f32[T, 4], sin: f32[T, 4], slots: i64[T],
      tables: i32[B, M], lens: i32[B], starts: i32[B + 1],
      k_cache: bf16[N, P, 2, 8], v_cache: bf16[N, P, 2, 8]):
    c: f32[T, 1, 4] = reshape(cos, shape=(T, 1, 4))
    s: f32[T, 1, 4] = reshape(sin, shape=(T, 1, 4))
    qf: f32[T, 2, 8] = cast(q, dtype=f32)
    qt: f32[T, 2, 8] = rope(qf, c, s)
    qr: bf16[T, 2, 8] = cast(qt, dtype=bf16)
    kf: f32[T, 2, 8] = cast(k, dtype=f32)
    kt: f32[T, 2, 8] = rope(kf, c, s)
    kr: bf16[T, 2, 8] = cast(kt, dtype=bf16)
    kn: bf16[N, P, 2, 8] = kv_write(k_cache, kr, slots)
    vn: bf16[N, P, 2, 8] = kv_write(v_cache, k, slots)
    a: bf16[T, 2, 8] = paged_attention(qr, kn, vn, tables, lens, starts, scale=0.3)
    return {"out": a, "k_cache": kn, "v_cache": vn}
"""
    ops = [node.op for node in fused(text).calls()]
    assert ops == ["append_kv", "paged_attention"]
    # A rope that rounds no more than once leaves float32 for good.
    kept = fused(
        text.replace("kf: f32[T, 2, 8] = cast(k,", "kf: f32[T, 2, 8] = cast(v,").replace(
            "k: bf16[T, 2, 8], cos", "k: bf16[T, 2, 8], v: f16[T, 2, 8], cos"
        )
    )
    assert [node.op for node in kept.calls()].count("rope") == 2


def test_one_head_in_fewer_dimensions_is_taken_in():
    """Falcon turns its one key head as [T, D]."""
    text = """
def g(q: f32[T, 4, 8], kv: f32[T, 2, 8], kw: f32[8], cos: f32[T, 4], sin: f32[T, 4],
      slots: i64[T], tables: i32[B, M], lens: i32[B], starts: i32[B + 1],
      k_cache: f32[N, P, 1, 8], v_cache: f32[N, P, 1, 8]):
    k: f32[T, 1, 8] = slice(kv, dim=1, start=0, step=1, stop=1)
    v: f32[T, 1, 8] = slice(kv, dim=1, start=1, step=1, stop=2)
    flat: f32[T, 8] = reshape(k, shape=(T, 8))
    normed: f32[T, 8] = rms_norm(flat, kw, eps=0.1)
    turned: f32[T, 8] = rope(normed, cos, sin)
    kr: f32[T, 1, 8] = reshape(turned, shape=(T, 1, 8))
    c: f32[T, 1, 4] = reshape(cos, shape=(T, 1, 4))
    s: f32[T, 1, 4] = reshape(sin, shape=(T, 1, 4))
    qr: f32[T, 4, 8] = rope(q, c, s)
    kn: f32[N, P, 1, 8] = kv_write(k_cache, kr, slots)
    vn: f32[N, P, 1, 8] = kv_write(v_cache, v, slots)
    a: f32[T, 4, 8] = paged_attention(qr, kn, vn, tables, lens, starts, scale=0.3)
    return {"out": a, "k_cache": kn, "v_cache": vn}
"""
    new = fused(text)
    (call,) = (node for node in new.nodes if node.op == "append_kv")
    assert call.args[0].op == call.args[1].op == "slice"
    assert not any(node.op in ("rope", "rms_norm", "reshape") for node in new.calls())


def test_values_with_other_users_stay():
    text = before(*TABLES, Q_ROPE.format(x="q"), K_ROPE.format(x="k"), q="qr", k="kr")
    text = text.replace('"out": a,', '"out": a, "turned": kr, "queries": qr,')
    ops = [node.op for node in fused(text).calls()]
    assert ops.count("rope") == 2 and ops.count("append_kv") == 1 and "kv_write" not in ops


def test_layers_that_share_a_cache_keep_one_write():
    """The second attention reads what the first one's write has left; its own q stays out."""
    second = "b: f32[T, 4, 6] = paged_attention(qs, kn, vn, tables, lens, starts, scale=0.3)"
    text = before(*TABLES, Q_ROPE.format(x="q"), K_ROPE.format(x="k"), q="qr", k="kr")
    text = text.replace(
        '    return {"out": a,',
        "    m: f32[T] = mean(a, dims=(1, 2))\n"
        "    m3: f32[T, 1, 1] = reshape(m, shape=(T, 1, 1))\n"
        "    moved: f32[T, 4, 8] = mul(q, m3)\n"
        '    qs: f32[T, 4, 8] = rope(moved, c, s, layout="half")\n'
        f'    {second}\n    return {{"out": b,',
    )
    ops = [node.op for node in fused(text).calls()]
    assert ops.count("append_kv") == 1 and ops.count("rope") == 1 and "kv_write" not in ops


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kv_write(v_cache, v, slots)", "kv_write(v_cache, v, slots_1)"),
        ("paged_attention(qr, kn, vn", "paged_attention(qr, kn, v_cache"),
        ("paged_attention(qr, kn, vn", "paged_attention(qr, k_cache, vn"),
    ],
    ids=["other slots", "v as it was", "k as it was"],
)
def test_what_is_no_pair_of_writes_is_left(old: str, new: str):
    text = before(*TABLES, Q_ROPE.format(x="q"), K_ROPE.format(x="k"), q="qr", k="kr")
    text = text.replace("slots: i64[T],", "slots: i64[T], slots_1: i64[T],").replace(old, new)
    each = parse(text)
    assert fuse_append(each) == each


def test_a_q_that_depends_on_the_write_is_left():
    """Fusing it would make the op its own operand."""
    text = before(
        *TABLES,
        K_ROPE.format(x="k"),
        "early: f32[N, P, 2, 8] = kv_write(k_cache, kr, slots)",
        "level: f32[()] = mean(early, dims=(0, 1, 2, 3))",
        "qm: f32[T, 4, 8] = mul(q, level)",
        Q_ROPE.format(x="qm"),
        q="qr",
        k="kr",
    )
    each = parse(text)
    assert fuse_append(each) == each


@st.composite
def paths(draw: st.DrawFn) -> str:
    """Graphs whose q and k are normed or not, turned or not, by these tables or those."""
    lines, names = [*TABLES], {}
    for x, heads in (("q", 4), ("k", 2)):
        type_, value = f"f32[T, {heads}, 8]", x
        if draw(st.booleans()):
            eps, weight = draw(st.sampled_from([0.1, 0.5])), draw(st.sampled_from(["qw", "kw"]))
            lines.append(f"{x}_normed: {type_} = rms_norm({value}, {weight}, eps={eps})")
            value = f"{x}_normed"
        if draw(st.booleans()):
            layout = draw(st.sampled_from(["half", "interleaved"]))
            tables = draw(st.sampled_from(["c, s", "s, c"]))
            lines.append(f'{x}r: {type_} = rope({value}, {tables}, layout="{layout}")')
            value = f"{x}r"
        if draw(st.integers(0, 3)) == 0:
            lines.append(f"{x}t: {type_} = tanh({value})")
            value = f"{x}t"
        names[x] = value
    return before(*lines, **names)


@given(paths())
def test_any_path_keeps_its_bits(text: str):
    new = fused(text)
    assert [node.op for node in new.calls()].count("append_kv") == 1
    assert parse_graph(str(new)) == new


@given(paths())
def test_programs_write_the_caches_in_place(text: str):
    old = parse(text)
    inputs = inputs_of(old)
    names = [input_name(node) for node in old.inputs]
    wanted = dict(zip(old.output_names, interpret(old, inputs), strict=True))
    program = BACKEND.lower(fuse_append(old), Target.parse("cpu")).program
    states = {p.buffer: p for p in plan_buffers(program, SIZES).placements if p.role == "state"}
    assert states.keys() == {"k_cache", "v_cache"}
    assert all(place.shared_by for place in states.values())
    given_ = {name: tensor.clone() for name, tensor in zip(names, inputs, strict=True)}
    found = ProgramRunner(program, {}, lambda name: b"").run(given_)
    for name, tensor in wanted.items():
        assert torch.equal(given_[name] if name in states else found[name], tensor)
