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
def _silu(x, NATIVE: tl.constexpr):
    return _divide(x, 1.0 + _exp(x * -1.0, NATIVE), NATIVE)


# def gated_ea91(x: bf16[T, 16384]):
#     slice_0: bf16[T, 8192] = slice(x, dim=1, start=0, step=1, stop=8192)
#     slice_1: bf16[T, 8192] = slice(x, dim=1, start=8192, step=1, stop=16384)
#     gated_0: bf16[T, 8192] = gated(slice_0, slice_1, activation="silu", stepwise=True)
#     return {"out0": gated_0}
@triton.jit
def gated_ea91(
    x_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) // 8) + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0).to(tl.int64) % 8) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slice_0 = tl.load(x_ptr + row * 16384 + cols).to(tl.float32)
    slice_1 = tl.load(x_ptr + row * 16384 + 8192 + cols).to(tl.float32)
    gated_0 = ((_silu(slice_0, True)).to(tl.bfloat16).to(tl.float32) * slice_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 8192 + cols, gated_0.to(tl.bfloat16))
