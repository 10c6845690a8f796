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


# def softmax(x: bf16[T, 128256]):
#     cast_0: f32[T, 128256] = cast(x, dtype=f32)
#     softmax_0: f32[T, 128256] = softmax(cast_0, dim=1)
#     return {"out0": softmax_0}
@triton.jit
def softmax(
    x_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    softmax_0_max = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for start in range(0, 128256, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        in_cols = cols < 128256
        x = tl.load(x_ptr + row * 128256 + cols, mask=in_cols, other=0).to(tl.float32)
        cast_0 = x
        softmax_0_max = tl.maximum(softmax_0_max, tl.where(in_cols, cast_0, float("-inf")))
    softmax_0_max = tl.max(softmax_0_max, 1, keep_dims=True)
    softmax_0_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, 128256, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        in_cols = cols < 128256
        x = tl.load(x_ptr + row * 128256 + cols, mask=in_cols, other=0).to(tl.float32)
        cast_0 = x
        softmax_0_exp = _exp(cast_0 - softmax_0_max, False)
        softmax_0_sum = softmax_0_sum + tl.where(in_cols, softmax_0_exp, 0.0)
    softmax_0_sum = tl.sum(softmax_0_sum, 1, keep_dims=True)
    for start in range(0, 128256, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        in_cols = cols < 128256
        x = tl.load(x_ptr + row * 128256 + cols, mask=in_cols, other=0).to(tl.float32)
        cast_0 = x
        softmax_0_exp = _exp(cast_0 - softmax_0_max, False)
        softmax_0 = tl.div_rn(softmax_0_exp, softmax_0_sum)
        tl.store(out0_ptr + row * 128256 + cols, softmax_0, mask=in_cols)
