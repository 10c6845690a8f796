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


# def softmax_eb00(x: bf16[T, 8]):
#     cast_0: f32[T, 8] = cast(x, dtype=f32)
#     softmax_0: f32[T, 8] = softmax(cast_0, dim=1)
#     return {"out0": softmax_0}
@triton.jit
def softmax_eb00(
    x_ptr,
    out0_ptr,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = row < T
    cols = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * 8 + cols, mask=in_rows, other=0).to(tl.float32)
    cast_0 = x
    softmax_0_max = tl.max(cast_0, 1, keep_dims=True)
    softmax_0_exp = _exp(cast_0 - softmax_0_max, False)
    softmax_0_sum = tl.sum(softmax_0_exp, 1, keep_dims=True)
    softmax_0 = tl.div_rn(softmax_0_exp, softmax_0_sum)
    tl.store(out0_ptr + row * 8 + cols, softmax_0, mask=in_rows)
