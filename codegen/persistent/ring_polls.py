"""How programs of a ring wait (ring_kernel.py): for the values themselves, in PTX.

Memory that holds nothing yet has all bits one, which no rounding makes of a number: a conversion to
bfloat16 gives 0x7fff for NaN, arithmetic in float32 gives 0x7fffffff. A look that finds nothing is
taken again. After ``limit`` looks, or when another program has done so, a wait is given up: the
first call whose input was not there is noted behind ``diagnosis``, and the launch ends with numbers
that nobody may use.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_DECLARED = (
    ".reg .pred there, late, told;",
    ".reg .b32 a, b, polls, low, flag;",
    "mov.u32 polls, 0;",
)


def _text(stages: list[list[str]], diagnosis: int, call: int, limit: int) -> str:
    """PTX of looks that are taken one after the other, each until it sets ``there``."""
    lines = list(_DECLARED)
    for stage, look in enumerate(stages):
        again, done = f"POLL{stage}", f"DONE{stage}"
        lines += [f"{again}:", *look, f"@there bra {done};", "add.u32 polls, polls, 1;"]
        lines += ["and.b32 low, polls, 255;", "setp.ne.u32 told, low, 0;", f"@told bra {again};"]
        lines += [f"ld.relaxed.gpu.global.b32 flag, [${diagnosis}];"]
        lines += ["setp.ne.u32 late, flag, 0;", "@late bra LATE;"]
        lines += [f"setp.lt.u32 late, polls, ${limit};", f"@late bra {again};", "bra LATE;"]
        lines += [f"{done}:"]
    lines += ["bra DONE;", "LATE:", f"red.relaxed.gpu.global.min.u32 [${diagnosis}+4], ${call};"]
    lines += ["mov.u32 flag, 1;", f"st.relaxed.gpu.global.b32 [${diagnosis}], flag;"]
    return "{" + "\n".join([*lines, "DONE:", "bar.warp.sync 0xffffffff;"]) + "}"


def _halves(vectors: range, pointers: list[int]) -> list[str]:
    """A look at 8 bfloat16 each: a half of w is all ones where a half of not w is zero."""
    lines = []
    for vector, pointer in zip(vectors, pointers, strict=True):
        into = ", ".join(f"${4 * vector + i}" for i in range(4))
        lines.append(f"ld.relaxed.gpu.global.v4.b32 {{{into}}}, [${pointer}];")
    lines.append("mov.u32 a, 0;")
    for word in range(4 * vectors.start, 4 * vectors.stop):
        lines += [f"not.b32 b, ${word};", "sub.u32 b, b, 0x00010001;"]
        lines += [f"and.b32 b, b, ${word};", "or.b32 a, a, b;"]
    return [*lines, "and.b32 a, a, 0x80008000;", "setp.eq.u32 there, a, 0;"]


def _row(count: int) -> str:
    """So many times 8 bfloat16 of a thread: of 8 and more times the first three quarters, which are
    written first, then the others, since all programs' looks together load L2."""
    base, diagnosis, call, limit = (4 * count + 8 * count * i for i in range(4))
    most = count * 3 // 4
    parts = (range(most), range(most, count)) if count >= 8 else (range(count),)
    stages = [_halves(part, [base + 8 * vector for vector in part]) for part in parts]
    return _text(stages, diagnosis, call, limit)


def _part() -> str:
    """Two float32 of a thread, and one that belongs to both."""
    look = ["ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$4];", "ld.relaxed.gpu.global.b32 $2, [$6];"]
    look += ["mov.b32 $3, $2;", "setp.ne.u32 there, $0, 0xffffffff;"]
    look += [f"setp.ne.and.u32 there, ${word}, 0xffffffff, there;" for word in (1, 2)]
    return _text([look], 8, 10, 12)


def _used(words: int, pointers: int, numbers: int) -> str:
    return ",".join(["=r"] * words + ["l"] * pointers + ["r"] * numbers)


TEXTS: dict[str, dict[int, str] | str] = {
    "_ROWS": {count: _row(count) for count in (1, 2, 4, 8, 16)},
    "_ROWS_USED": {count: _used(4 * count, 16 * count, 16 * count) for count in (1, 2, 4, 8, 16)},
    "_TWO": _text([_halves(range(2), [8, 16])], 24, 32, 40),
    "_TWO_USED": _used(8, 24, 16),
    "_PART": _part(),
    "_PART_USED": _used(4, 6, 4),
}
"""Constants of the kernel's text, by name: PTX, and its constraints."""
_ROWS, _ROWS_USED = gl.constexpr(TEXTS["_ROWS"]), gl.constexpr(TEXTS["_ROWS_USED"])
_TWO, _TWO_USED = gl.constexpr(TEXTS["_TWO"]), gl.constexpr(TEXTS["_TWO_USED"])
_PART, _PART_USED = gl.constexpr(TEXTS["_PART"]), gl.constexpr(TEXTS["_PART_USED"])


@gluon.jit
def _values(at, diagnosis, call, limit, COUNT: gl.constexpr):
    """bf16 at pointers, of which each thread has COUNT times 8 that follow each other."""
    TEXT: gl.constexpr = _ROWS[COUNT]
    USED: gl.constexpr = _ROWS_USED[COUNT]
    return gl.inline_asm_elementwise(
        TEXT, USED, [at.to(gl.int64), diagnosis.to(gl.int64), call, limit],
        dtype=gl.bfloat16, is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@gluon.jit
def _two_values(one, other, diagnosis, call, limit):
    """bf16 at pointers of two kinds, of which each thread has 8 that follow each other."""
    return gl.inline_asm_elementwise(
        _TWO, _TWO_USED,
        [one.to(gl.int64), other.to(gl.int64), diagnosis.to(gl.int64), call, limit],
        dtype=(gl.bfloat16, gl.bfloat16), is_pure=False, pack=8,
    )  # fmt: skip


@gluon.jit
def _part_values(value, level, diagnosis, call, limit):
    """f32 at pointers, of which each thread has pairs that follow each other, and f32 at others,
    the same for a pair."""
    return gl.inline_asm_elementwise(
        _PART, _PART_USED,
        [value.to(gl.int64), level.to(gl.int64), diagnosis.to(gl.int64), call, limit],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=2,
    )  # fmt: skip
