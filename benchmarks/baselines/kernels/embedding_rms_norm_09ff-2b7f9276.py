import triton
import triton.language as tl


# def embedding_rms_norm_09ff(weight: bf16[T, 576], ids: i64[R], weight_1: bf16[576]):
#     embedding_0: bf16[R, 576] = embedding(weight, ids)
#     rms_norm_0: bf16[R, 576] = rms_norm(embedding_0, weight_1, eps=1e-05, stepwise=True)
#     return {"out0": rms_norm_0}
@triton.jit
def embedding_rms_norm_09ff(
    weight_ptr,
    ids_ptr,
    weight_1_ptr,
    out0_ptr,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 576
    ids = tl.load(ids_ptr + row)
    weight_1 = tl.load(weight_1_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    embedding_0_row = tl.minimum(tl.maximum(ids.to(tl.int64), 0), T - 1)
    embedding_0 = tl.load(weight_ptr + embedding_0_row * 576 + cols, mask=in_cols & (T > 0), other=0).to(tl.float32)
    rms_norm_0_squares = tl.sum(tl.where(in_cols, embedding_0 * embedding_0, 0.0), 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 576.0 + 1e-05)
    rms_norm_0_normed = (embedding_0 * rms_norm_0_scale).to(tl.bfloat16).to(tl.float32)
    rms_norm_0 = (rms_norm_0_normed * weight_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 576 + cols, rms_norm_0.to(tl.bfloat16), mask=in_cols)
