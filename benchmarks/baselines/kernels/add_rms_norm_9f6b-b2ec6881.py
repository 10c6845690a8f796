import triton
import triton.language as tl


# def add_rms_norm_9f6b(a: bf16[T, 2048], b: bf16[T, 2048], weight: bf16[2048]):
#     add_0: bf16[T, 2048] = add(a, b)
#     rms_norm_0: bf16[T, 2048] = rms_norm(add_0, weight, eps=1e-05, stepwise=True)
#     return {"out0": add_0, "out1": rms_norm_0}
@triton.jit
def add_rms_norm_9f6b(
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
    a = tl.load(a_ptr + row * 2048 + cols).to(tl.float32)
    b = tl.load(b_ptr + row * 2048 + cols).to(tl.float32)
    weight = tl.load(weight_ptr + cols).to(tl.float32)
    add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 2048 + cols, add_0.to(tl.bfloat16))
    rms_norm_0_squares = tl.sum(add_0 * add_0, 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 2048.0 + 1e-05)
    rms_norm_0_normed = (add_0 * rms_norm_0_scale).to(tl.bfloat16).to(tl.float32)
    rms_norm_0 = (rms_norm_0_normed * weight).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 2048 + cols, rms_norm_0.to(tl.bfloat16))
