import triton
import triton.language as tl


# def add_rms_norm_79bf(a: bf16[T, 576], b: bf16[T, 576], weight: bf16[576]):
#     add_0: bf16[T, 576] = add(a, b)
#     rms_norm_0: bf16[T, 576] = rms_norm(add_0, weight, eps=1e-05, stepwise=True)
#     return {"out0": add_0, "out1": rms_norm_0}
@triton.jit
def add_rms_norm_79bf(
    a_ptr,
    b_ptr,
    weight_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 576
    a = tl.load(a_ptr + row * 576 + cols, mask=in_cols, other=0).to(tl.float32)
    b = tl.load(b_ptr + row * 576 + cols, mask=in_cols, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 576 + cols, add_0.to(tl.bfloat16), mask=in_cols)
    rms_norm_0_squares = tl.sum(tl.where(in_cols, add_0 * add_0, 0.0), 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 576.0 + 1e-05)
    rms_norm_0_normed = (add_0 * rms_norm_0_scale).to(tl.bfloat16).to(tl.float32)
    rms_norm_0 = (rms_norm_0_normed * weight).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 576 + cols, rms_norm_0.to(tl.bfloat16), mask=in_cols)
