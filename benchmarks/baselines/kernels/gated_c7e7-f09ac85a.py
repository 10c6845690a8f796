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
def _gelu_tanh(x, NATIVE: tl.constexpr):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + _tanh(inner, NATIVE))


# def gated_c7e7(x: bf16[T, 20480]):
#     slice_0: bf16[T, 10240] = slice(x, dim=1, start=0, step=1, stop=10240)
#     slice_1: bf16[T, 10240] = slice(x, dim=1, start=10240, step=1, stop=20480)
#     gated_0: bf16[T, 10240] = gated(slice_0, slice_1, activation="gelu_tanh", stepwise=True)
#     return {"out0": gated_0}
@triton.jit
def gated_c7e7(
    x_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) // 10) + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0).to(tl.int64) % 10) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slice_0 = tl.load(x_ptr + row * 20480 + cols).to(tl.float32)
    slice_1 = tl.load(x_ptr + row * 20480 + 10240 + cols).to(tl.float32)
    gated_0 = ((_gelu_tanh(slice_0, True)).to(tl.bfloat16).to(tl.float32) * slice_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 10240 + cols, gated_0.to(tl.bfloat16))
