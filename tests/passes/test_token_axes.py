"""The token-mixing proof: what acts on each token alone passes, all else is refused by name."""

from __future__ import annotations

import pytest
import torch

from rewriting import parse
from tilewright.errors import UnsupportedError
from tilewright.ir.interpreter import interpret
from tilewright.passes.cache_samples import adapt_to_pages, same_logits
from tilewright.passes.kv_cache import PAGED_CACHE

HEAD = """
def g(input_ids: i64[1, S]):
    embed: f32[16, 8] = param("embed")
    x: f32[1, S, 8] = embedding(embed, input_ids)
"""
TAIL = """
    return {"logits": y}
"""

TOKEN_WISE = {
    "elementwise with positions": """
    p: i64[S] = iota(size=S, dtype=i64)
    c: i64[1, S, 1] = reshape(p, shape=(1, S, 1))
    f: f32[1, S, 1] = cast(c, dtype=f32)
    y: f32[1, S, 8] = mul(x, f)
""",
    "softmax and topk over features": """
    a: f32[1, S, 8] = softmax(x, dim=2)
    t: (f32[1, S, 2], i64[1, S, 2],) = topk(a, dim=2, k=2)
    v: f32[1, S, 2] = item(t, index=0)
    i: i64[1, S, 2] = item(t, index=1)
    g: f32[1, S, 2] = gather(x, i, dim=2)
    y: f32[1, S, 2] = add(g, v)
""",
    "reductions, kept and dropped": """
    m: f32[1, S, 1] = mean(x, dims=(2,), keepdim=True)
    s: f32[1, S] = sum(x, dims=(2,))
    r: f32[1, S, 1] = reshape(s, shape=(1, S, 1))
    d: f32[1, S, 8] = sub(x, m)
    y: f32[1, S, 8] = mul(d, r)
""",
    "heads apart and together, transposed": """
    h: f32[1, S, 2, 4] = reshape(x, shape=(1, S, 2, 4))
    t: f32[1, 2, S, 4] = permute(h, dims=(0, 2, 1, 3))
    n: f32[1, 2, S, 4] = rms_norm(t, eps=1e-06)
    u: f32[2, S, 4] = reshape(n, shape=(2, S, 4))
    w: f32[S, 2, 4] = permute(u, dims=(1, 0, 2))
    y: f32[1, S, 8] = reshape(w, shape=(1, S, 8))
""",
    "a table read by position, in the middle axis": """
    table: f32[1, 32, 8] = param("table")
    rows: f32[1, S, 8] = slice(table, dim=1, start=0, stop=S)
    y: f32[1, S, 8] = add(x, rows)
""",
    "slices and concatenation of features": """
    a: f32[1, S, 3] = slice(x, dim=2, start=0, stop=3)
    b: f32[1, S, 5] = slice(x, dim=2, start=3, stop=8)
    c: f32[1, S, 8] = concat(b, a, dim=2)
    d: f32[1, S, 10] = pad(c, pads=((0, 0), (0, 0), (1, 1)), value=0.5)
    e: f32[1, S, 10] = flip(d, dims=(2,))
    f: f32[1, S, 10] = cumsum(e, dim=2)
    y: f32[1, S, 10] = where(k, e, f)
""".replace("    y:", "    k: bool[1, S, 10] = gt(e, f)\n    y:"),
    "a learned query, repeated for each token": """
    q: f32[8] = param("q")
    r: f32[1, S, 8] = expand(q, shape=(1, S, 8))
    y: f32[1, S, 8] = add(x, r)
""",
    "a product with a matrix without tokens": """
    w: f32[8, 4] = param("w")
    y: f32[1, S, 4] = matmul(x, w)
""",
}

MIXING = {
    "mean over tokens": (
        """
    m: f32[1, 1, 8] = mean(x, dims=(1,), keepdim=True)
    y: f32[1, S, 8] = sub(x, m)
""",
        "mean",
    ),
    "cumsum over tokens": ("    y: f32[1, S, 8] = cumsum(x, dim=1)", "cumsum"),
    "softmax over tokens": ("    y: f32[1, S, 8] = softmax(x, dim=1)", "softmax"),
    "tokens reversed": ("    y: f32[1, S, 8] = flip(x, dims=(1,))", "flip"),
    "tokens joined into features": (
        """
    f: f32[8*S] = reshape(x, shape=(8*S,))
    y: f32[1, S, 8] = reshape(f, shape=(1, S, 8))
""",
        "reshape",
    ),
    "tokens shifted by one": (
        """
    h: f32[1, S - 1, 8] = slice(x, dim=1, start=0, stop=S - 1)
    y: f32[1, S, 8] = pad(h, pads=((0, 0), (1, 0), (0, 0)), value=0.0)
""",
        "slice",
    ),
    "a product of tokens": (
        """
    t: f32[1, 8, S] = permute(x, dims=(0, 2, 1))
    s: f32[1, S, S] = matmul(x, t)
    y: f32[1, S, 8] = matmul(s, x)
""",
        "matmul",
    ),
    "a convolution": (
        """
    t: f32[1, 8, S] = permute(x, dims=(0, 2, 1))
    w: f32[8, 1, 3] = param("w")
    c: f32[1, 8, S] = conv(t, w, stride=(1,), padding=(1,), dilation=(1,), groups=8)
    y: f32[1, S, 8] = permute(c, dims=(0, 2, 1))
""",
        "conv",
    ),
    "the number of tokens as a value": (
        """
    n: i64[()] = dim_value(size=S, dtype=i64)
    f: f32[()] = cast(n, dtype=f32)
    y: f32[1, S, 8] = mul(x, f)
""",
        "number of tokens",
    ),
    "positions of another length": (
        """
    p: i64[S + 1] = iota(size=S + 1, dtype=i64)
    q: i64[S] = slice(p, dim=0, start=1, stop=S + 1)
    c: i64[1, S, 1] = reshape(q, shape=(1, S, 1))
    f: f32[1, S, 1] = cast(c, dtype=f32)
    y: f32[1, S, 8] = mul(x, f)
""",
        "number of tokens",
    ),
    "a foreign op": (
        """
    y: f32[1, S, 8] = aten(x, target="aten.roll.default", positional=(("t", 0), ("l", ("v", 1)),
        ("l", ("v", 1))), named=(), types=(f32[1, S, 8],))
""",
        "aten",
    ),
    "attention both ways": ("ATTENTION(causal=False, scale=0.5)", "later tokens"),
    "attention under an unknown mask": (
        "ATTENTION(m, causal=True, scale=0.5)",
        "le.*token axes do not meet",
    ),
}
ATTENTION = """
    p: i64[S] = iota(size=S, dtype=i64)
    row: i64[1, S] = reshape(p, shape=(1, S))
    col: i64[S, 1] = reshape(p, shape=(S, 1))
    m: bool[S, S] = le(row, col)
    h: f32[1, S, 2, 4] = reshape(x, shape=(1, S, 2, 4))
    t: f32[1, 2, S, 4] = permute(h, dims=(0, 2, 1, 3))
    a: f32[1, 2, S, 4] = attention(t, t, t, {})
    b: f32[1, S, 2, 4] = permute(a, dims=(0, 2, 1, 3))
    y: f32[1, S, 8] = reshape(b, shape=(1, S, 8))
"""


@pytest.mark.quick
@pytest.mark.parametrize("body", TOKEN_WISE.values(), ids=TOKEN_WISE)
def test_token_wise_ops_become_token_major(body: str) -> None:
    before = parse(HEAD + body + TAIL)
    after = PAGED_CACHE.run(before)
    ids = torch.randint(16, (1, 7))
    inputs = adapt_to_pages(before, after, [ids])
    found = same_logits(after, inputs, interpret(after, inputs))
    torch.testing.assert_close(found, interpret(before, [ids]), rtol=1e-6, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("case", MIXING.values(), ids=MIXING)
def test_mixing_is_refused_by_name(case: tuple[str, str]) -> None:
    body, culprit = case
    if body.startswith("ATTENTION("):
        body = ATTENTION.format(body[len("ATTENTION(") : -1])
    with pytest.raises(UnsupportedError, match=culprit):
        PAGED_CACHE.run(parse(HEAD + body + TAIL))
