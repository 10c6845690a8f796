"""Functions on tiles that generated kernels call: their text becomes part of a kernel's source.

NATIVE asks for the device's own exponential and division: exact in float64, and good to 2 units in
the last place of float32 otherwise, which does for what is rounded to 16 bits.
"""
# ruff: noqa: ANN001, ANN202, SIM108
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _exp(x, NATIVE: tl.constexpr):
    if NATIVE:
        result = tl.exp(x)
    else:
        # e^x = 2^n e^r with n = round(x / ln 2); ln 2 in two parts keeps r's digits (Cody, Waite).
        x = tl.minimum(x, 90.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -110.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = tl.fma(n, -0.693145751953125, x)
        r = tl.fma(n, -1.4286068203094172e-06, r)
        whole = n.to(tl.int32)
        half = whole >> 1  # 2^n may be out of range where the result is not
        low = ((half + 127) << 23).to(tl.float32, bitcast=True)
        high = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
        result = tl.exp2(r * 1.4426950408889634) * low * high
    return result


@triton.jit
def _divide(a, b, NATIVE: tl.constexpr):
    if NATIVE:
        result = a / b
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def _by_largest(a, b, FUSED: tl.constexpr):
    # a / b rounded to nearest, where b is at least the largest |a| over 448, with half of div_rn's
    # instructions: what a product with 1 / b leaves of a is put back twice (Markstein). FUSED is
    # off in the interpreter, whose tl.fma rounds twice.
    if FUSED:
        up = tl.where(b < 8.271806125530277e-25, 1.2676506002282294e30, 1.0)  # 2^-80, 2^100
        b = b * up  # else 1 / b may be infinite, and the remainders have too few bits
        inverse = tl.div_rn(1.0, b)
        less = tl.where(b == float("inf"), 0.0, b) * -1.0  # infinity times 0 is no remainder
        a = a * up
        result = a * inverse
        for _ in tl.static_range(2):
            result = tl.fma(tl.fma(result, less, a), inverse, result)
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def _sigmoid(x, NATIVE: tl.constexpr):
    return _divide(1.0, 1.0 + _exp(x * -1.0, NATIVE), NATIVE)


@triton.jit
def _silu(x, NATIVE: tl.constexpr):
    return _divide(x, 1.0 + _exp(x * -1.0, NATIVE), NATIVE)


@triton.jit
def _tanh(x, NATIVE: tl.constexpr):
    far = 1.0 - _divide(2.0, _exp(x * 2.0, NATIVE) + 1.0, NATIVE)
    # Near 0 the difference above loses its digits; the series has them all.
    s = x * x
    series = 0.021869488536155203 - s * 0.008863235529902197
    series = -0.05396825396825397 + s * series
    series = -0.3333333333333333 + s * (0.13333333333333333 + s * series)
    near = tl.abs(x) < (0.01 if x.dtype == tl.float64 else 0.3)
    return tl.where(near, x * (1.0 + s * series), far)


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


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x, NATIVE: tl.constexpr):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + _tanh(inner, NATIVE))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log1p(x):
    # What 1 + x loses is put back (Kahan); at infinity the correction is infinity / infinity.
    u = 1.0 + x
    corrected = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, corrected))


@triton.jit
def _round(x):
    low = tl.floor(x)
    rest = x - low
    odd = tl.floor(low * 0.5) * 2.0 != low
    nearest = tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)
    return tl.where(nearest == 0.0, x * 0.0, nearest)  # -0.3 gives -0


@triton.jit
def _pow(a, b):
    # In float64: the error of log2 grows with the exponent.
    x, y = a.to(tl.float64), b.to(tl.float64)
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    size = tl.where((tl.abs(x) == 1.0) & (y == y), 1.0, size)  # 0 * infinity above
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = (x < 0.0) | ((x == 0.0) & (tl.div_rn(1.0, a.to(tl.float32)) < 0.0))
    size = tl.where(negative & odd, size * -1.0, size)
    finite = (x < 0.0) & (x > float("-inf")) & (tl.abs(y) < float("inf"))
    size = tl.where(finite & (whole == 0), float("nan"), size)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, size)


@triton.jit
def _fmod(a, b):
    # Long division in float64, 29 bits of the quotient a step: their product with b is exact.
    x, y = tl.abs(a.to(tl.float64)), tl.abs(b.to(tl.float64))
    for _ in range(10):
        quotient = x / y
        bits = quotient.to(tl.int64, bitcast=True) & -16777216
        whole = tl.floor(bits.to(tl.float64, bitcast=True))
        x = tl.where(x < y, x, x - whole * y)
    # A quotient that was rounded up may leave one divisor too few.
    x = tl.where(x < 0.0, x + y, x)
    usual = (tl.abs(a) < float("inf")) & (y != 0.0) & (y == y)
    rest = tl.where(usual, x, float("nan"))
    return tl.where(a < 0.0, rest * -1.0, rest).to(tl.float32)


@triton.jit
def _remainder(a, b):
    rest = _fmod(a, b)
    return tl.where((rest != 0.0) & ((rest < 0.0) != (b < 0.0)), rest + b, rest)


@triton.jit
def _floor_divide(a, b):
    rest = _fmod(a, b)
    quotient = tl.div_rn(a - rest, b)
    quotient = tl.where((rest != 0.0) & ((rest < 0.0) != (b < 0.0)), quotient - 1.0, quotient)
    low = tl.floor(quotient)
    low = tl.where(quotient - low > 0.5, low + 1.0, low)
    exact = tl.div_rn(a, b)
    return tl.where(b == 0.0, exact, tl.where(quotient == 0.0, exact * 0.0, low))


@triton.jit
def _int_remainder(a, b):
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def _int_floor_divide(a, b):
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def _int_pow(a, b):
    # By squaring; a power below 0 is 0 but for the bases 1 and -1, as in torch.
    result, square, bits = a * 0 + 1, a, b
    for _ in range(64):
        result = tl.where((bits & 1) != 0, result * square, result)
        square = square * square
        bits = bits >> 1
    odd = (b & 1) != 0
    inverse = tl.where(a == 1, a, tl.where(a + 1 == 0, tl.where(odd, a, a * a), a * 0))
    return tl.where(b < 0, inverse, result)


@triton.jit
def _multiply(a, b):
    return a * b
