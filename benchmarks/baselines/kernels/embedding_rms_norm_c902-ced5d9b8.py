import triton
import triton.language as tl


# def embedding_rms_norm_c902(weight: bf16[128256, 2048], ids: i64[T], weight_1: bf16[2048]):
#     embedding_0: bf16[T, 2048] = embedding(weight, ids)
#     rms_norm_0: bf16[T, 2048] = rms_norm(embedding_0, weight_1, eps=1e-05, stepwise=True)
#     return {"out0": embedding_0, "out1": rms_norm_0}
@triton.jit
def embedding_rms_norm_c902(
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
    ids = tl.load(ids_ptr + row)
    weight_1 = tl.load(weight_1_ptr + cols).to(tl.float32)
    embedding_0_row = tl.minimum(tl.maximum(ids.to(tl.int64), 0), 128255)
    embedding_0 = tl.load(weight_ptr + embedding_0_row * 2048 + cols).to(tl.float32)
    tl.store(out0_ptr + row * 2048 + cols, embedding_0.to(tl.bfloat16))
    rms_norm_0_squares = tl.sum(embedding_0 * embedding_0, 1, keep_dims=True)
    rms_norm_0_scale = tl.rsqrt(rms_norm_0_squares / 2048.0 + 1e-05)
    rms_norm_0_normed = (embedding_0 * rms_norm_0_scale).to(tl.bfloat16).to(tl.float32)
    rms_norm_0 = (rms_norm_0_normed * weight_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 2048 + cols, rms_norm_0.to(tl.bfloat16))
