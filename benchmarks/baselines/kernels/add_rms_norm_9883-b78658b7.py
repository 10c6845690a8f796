import triton
import triton.language as tl


# def add_rms_norm_9883(a: f32[T, 576], b: f32[T, 576], weight: f32[576]):
#     add_0: f32[T, 576] = add(a, b)
#     rms_norm_0: f32[T, 576] = rms_norm(add_0, weight, eps=1e-05)
#     return {"out0": add_0, "out1": rms_norm_0}
@triton.jit
def add_rms_norm_9883(
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
    a = tl.load(a_ptr + row * 576 + cols, mask=in_cols, other=0)
    b = tl.load(b_ptr + row * 576 + cols, mask=in_cols, other=0)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0)
    add_0 = a + b
    tl.store(out0_ptr + row * 576 + cols, add_0, mask=in_cols)
    rms_norm_0_squares = tl.sum(tl.where(in_cols, add_0 * add_0, 0.0), 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 576.0 + 1e-05)
    rms_norm_0 = add_0 * rms_norm_0_scale * weight
    tl.store(out1_ptr + row * 576 + cols, rms_norm_0, mask=in_cols)
