import triton
import triton.language as tl


# def rms_norm_a6ba(x: bf16[T, 4, 256], weight: f32[256]):
#     rms_norm_0: bf16[T, 4, 256] = rms_norm(x, weight, eps=1e-06)
#     return {"out0": rms_norm_0}
@triton.jit
def rms_norm_a6ba(
    x_ptr,
    weight_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    axis_1 = row % 4
    axis_0 = row // 4
    cols = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + axis_0 * 4096 + axis_1 * 256 + 2048 + cols).to(tl.float32)
    weight = tl.load(weight_ptr + cols)
    rms_norm_0_squares = tl.sum(x * x, 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 256.0 + 1e-06)
    rms_norm_0 = (x * rms_norm_0_scale * weight).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 256 + cols, rms_norm_0.to(tl.bfloat16))
