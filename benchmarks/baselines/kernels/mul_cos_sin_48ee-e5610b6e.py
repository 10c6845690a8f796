import triton
import triton.language as tl


@triton.jit
def _two_over_pi(index):
    # 32 bits of 2 / pi from bit 32 (index - 1) on; those of index 0 stand before the point.
    word = index.to(tl.int64) * 0
    word = tl.where(index == 1, word + 0xA2F9836E, word)
    word = tl.where(index == 2, word + 0x4E441529, word)
    word = tl.where(index == 3, word + 0xFC2757D1, word)
    word = tl.where(index == 4, word + 0xF534DDC0, word)
    word = tl.where(index == 5, word + 0xDB629599, word)
    word = tl.where(index == 6, word + 0x3C439041, word)
    return tl.where(index == 7, word + 0xFE5163AB, word)


@triton.jit
def _circular(x, QUARTERS: tl.constexpr):
    # The sine of x + QUARTERS * pi / 2. Device libraries keep an array in local memory for large x;
    # here |x| * 2 / pi is had in fixed point for all x (Payne, Hanek), without one.
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    # |x| = mantissa 2^e, so the bits of 2 / pi before the one of 2^(1 - e) give whole turns.
    first = tl.maximum((bits >> 23) - 120, 0)
    index, shift = first >> 5, (first & 31).to(tl.int64)
    a, b = _two_over_pi(index), _two_over_pi(index + 1)
    c, d = _two_over_pi(index + 2), _two_over_pi(index + 3)
    high = (((a << 32) | b) << shift) | (c >> (32 - shift))
    low = ((c << shift) | (d >> (32 - shift))) & 0xFFFFFFFF
    turns = mantissa * high + ((mantissa * low) >> 32)  # quarters, with 62 bits behind the point
    quarter = ((turns >> 61) + 1) >> 1
    angle = (turns << 2).to(tl.float32) * 8.515303950216386e-20  # pi / 2 / 2^64
    small = size < 0.5
    quarter = tl.where(small, 0, quarter) + QUARTERS
    angle = tl.where(small, size, angle)
    s = angle * angle
    sine = -0.16666654611 + s * (0.0083321608736 + s * -0.00019515295891)
    sine = angle + angle * s * sine
    cosine = 0.041666645683 + s * (-0.0013887316255 + s * 2.443315711809948e-05)
    cosine = 1.0 - 0.5 * s + s * s * cosine
    result = tl.where((quarter & 1) == 0, sine, cosine)
    result = tl.where((quarter & 2) == 0, result, result * -1.0)
    return tl.where(size < float("inf"), result, float("nan"))


@triton.jit
def _sin(x):
    result = _circular(x, 0)
    return tl.where(x < 0.0, result * -1.0, tl.where(x == 0.0, x, result))


@triton.jit
def _cos(x):
    return _circular(x, 1)


# def mul_cos_sin_48ee(x: f32[T], b: f32[32]):
#     reshape_0: f32[T, 1] = reshape(x, shape=(T, 1))
#     mul_0: f32[T, 32] = mul(reshape_0, b)
#     cos_0: f32[T, 32] = cos(mul_0)
#     cast_0: bf16[T, 32] = cast(cos_0, dtype=bf16)
#     sin_0: f32[T, 32] = sin(mul_0)
#     cast_1: bf16[T, 32] = cast(sin_0, dtype=bf16)
#     return {"out0": cast_0, "out1": cast_1}
@triton.jit
def mul_cos_sin_48ee(
    x_ptr,
    b_ptr,
    out0_ptr,
    out1_ptr,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = row < T
    cols = tl.arange(0, COLUMNS)[None, :]
    reshape_0 = tl.load(x_ptr + row, mask=in_rows, other=0)
    b = tl.load(b_ptr + cols)
    mul_0 = reshape_0 * b
    cos_0 = _cos(mul_0)
    cast_0 = cos_0.to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 32 + cols, cast_0.to(tl.bfloat16), mask=in_rows)
    sin_0 = _sin(mul_0)
    cast_1 = sin_0.to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 32 + cols, cast_1.to(tl.bfloat16), mask=in_rows)
