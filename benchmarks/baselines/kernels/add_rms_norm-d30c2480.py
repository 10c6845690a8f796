import triton
import triton.language as tl


# def add_rms_norm(a: bf16[T, 32768], b: bf16[T, 32768], weight: bf16[32768]):
#     add_0: bf16[T, 32768] = add(a, b)
#     rms_norm_0: bf16[T, 32768] = rms_norm(add_0, weight, eps=1e-05, stepwise=True)
#     return {"out0": add_0, "out1": rms_norm_0}
@triton.jit
def add_rms_norm(
    a_ptr,
    b_ptr,
    weight_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    rms_norm_0_squares = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, 32768, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        a = tl.load(a_ptr + row * 32768 + cols).to(tl.float32)
        b = tl.load(b_ptr + row * 32768 + cols).to(tl.float32)
        add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
        tl.store(out0_ptr + row * 32768 + cols, add_0.to(tl.bfloat16))
        rms_norm_0_squares = rms_norm_0_squares + add_0 * add_0
    rms_norm_0_squares = tl.sum(rms_norm_0_squares, 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 32768.0 + 1e-05)
    for start in range(0, 32768, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)[None, :]
        a = tl.load(a_ptr + row * 32768 + cols).to(tl.float32)
        b = tl.load(b_ptr + row * 32768 + cols).to(tl.float32)
        add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
        weight = tl.load(weight_ptr + cols).to(tl.float32)
        rms_norm_0_normed = (add_0 * rms_norm_0_scale).to(tl.bfloat16).to(tl.float32)
        rms_norm_0 = (rms_norm_0_normed * weight).to(tl.bfloat16).to(tl.float32)
        tl.store(out1_ptr + row * 32768 + cols, rms_norm_0.to(tl.bfloat16))
