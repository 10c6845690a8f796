import triton
import triton.language as tl


# def embedding_mul_rms_norm_9927(weight: bf16[262208, 2560], ids: i64[T], weight_1: f32[2560]):
#     embedding_0: bf16[T, 2560] = embedding(weight, ids)
#     mul_0: bf16[T, 2560] = mul(embedding_0, bf16(50.5))
#     rms_norm_0: bf16[T, 2560] = rms_norm(mul_0, weight_1, eps=1e-06)
#     return {"out0": mul_0, "out1": rms_norm_0}
@triton.jit
def embedding_mul_rms_norm_9927(
    weight_ptr,
    ids_ptr,
    weight_1_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 2560
    ids = tl.load(ids_ptr + row)
    weight_1 = tl.load(weight_1_ptr + cols, mask=in_cols, other=0)
    embedding_0_row = tl.minimum(tl.maximum(ids.to(tl.int64), 0), 262207)
    embedding_0 = tl.load(weight_ptr + embedding_0_row * 2560 + cols, mask=in_cols, other=0).to(tl.float32)
    mul_0 = (embedding_0 * 50.5).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 2560 + cols, mul_0.to(tl.bfloat16), mask=in_cols)
    rms_norm_0_squares = tl.sum(tl.where(in_cols, mul_0 * mul_0, 0.0), 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 2560.0 + 1e-06)
    rms_norm_0 = (mul_0 * rms_norm_0_scale * weight_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 2560 + cols, rms_norm_0.to(tl.bfloat16), mask=in_cols)
