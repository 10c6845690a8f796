import triton
import triton.language as tl


# def rms_norm_add_3261(x: bf16[T, 2560], weight: f32[2560], a: bf16[T, 2560], weight_1: f32[2560]):
#     rms_norm_0: bf16[T, 2560] = rms_norm(x, weight, eps=1e-06)
#     add_0: bf16[T, 2560] = add(a, rms_norm_0)
#     rms_norm_1: bf16[T, 2560] = rms_norm(add_0, weight_1, eps=1e-06)
#     return {"out0": add_0, "out1": rms_norm_1}
@triton.jit
def rms_norm_add_3261(
    x_ptr,
    weight_ptr,
    a_ptr,
    weight_1_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 2560
    x = tl.load(x_ptr + row * 2560 + cols, mask=in_cols, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0)
    a = tl.load(a_ptr + row * 2560 + cols, mask=in_cols, other=0).to(tl.float32)
    weight_1 = tl.load(weight_1_ptr + cols, mask=in_cols, other=0)
    rms_norm_0_squares = tl.sum(tl.where(in_cols, x * x, 0.0), 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 2560.0 + 1e-06)
    rms_norm_0 = (x * rms_norm_0_scale * weight).to(tl.bfloat16).to(tl.float32)
    add_0 = (a + rms_norm_0).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 2560 + cols, add_0.to(tl.bfloat16), mask=in_cols)
    rms_norm_1_squares = tl.sum(tl.where(in_cols, add_0 * add_0, 0.0), 1, keep_dims=True)
    rms_norm_1_scale = tl.rsqrt(rms_norm_1_squares / 2560.0 + 1e-06)
    rms_norm_1 = (add_0 * rms_norm_1_scale * weight_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 2560 + cols, rms_norm_1.to(tl.bfloat16), mask=in_cols)
