import triton
import triton.language as tl


# def embedding_layer_norm_fb00(weight: bf16[T, 768], ids: i64[R], weight_1: bf16[768], bias: bf16[768]):
#     embedding_0: bf16[R, 768] = embedding(weight, ids)
#     layer_norm_0: bf16[R, 768] = layer_norm(embedding_0, weight_1, bias, eps=1e-05)
#     return {"out0": layer_norm_0}
@triton.jit
def embedding_layer_norm_fb00(
    weight_ptr,
    ids_ptr,
    weight_1_ptr,
    bias_ptr,
    out0_ptr,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 768
    ids = tl.load(ids_ptr + row)
    weight_1 = tl.load(weight_1_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    embedding_0_row = tl.minimum(tl.maximum(ids.to(tl.int64), 0), T - 1)
    embedding_0 = tl.load(weight_ptr + embedding_0_row * 768 + cols, mask=in_cols & (T > 0), other=0).to(tl.float32)
    layer_norm_0_sum = tl.sum(tl.where(in_cols, embedding_0, 0.0), 1, keep_dims=True)
    layer_norm_0_mean = layer_norm_0_sum / 768.0
    layer_norm_0_centered = embedding_0 - layer_norm_0_mean
    layer_norm_0_squares = tl.sum(tl.where(in_cols, layer_norm_0_centered * layer_norm_0_centered, 0.0), 1, keep_dims=True)
    layer_norm_0_scale = tl.rsqrt(layer_norm_0_squares / 768.0 + 1e-05)
    layer_norm_0 = (layer_norm_0_centered * layer_norm_0_scale * weight_1 + bias).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 768 + cols, layer_norm_0.to(tl.bfloat16), mask=in_cols)
