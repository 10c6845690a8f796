import triton
import triton.language as tl


# def embedding_add_layer_norm_9951(weight: bf16[50257, 768], ids: i64[T], weight_1: bf16[1024, 768], ids_1: i64[T], weight_2: bf16[768], bias: bf16[768]):
#     embedding_0: bf16[T, 768] = embedding(weight, ids)
#     embedding_1: bf16[T, 768] = embedding(weight_1, ids_1)
#     add_0: bf16[T, 768] = add(embedding_0, embedding_1)
#     layer_norm_0: bf16[T, 768] = layer_norm(add_0, weight_2, bias, eps=1e-05)
#     return {"out0": add_0, "out1": layer_norm_0}
@triton.jit
def embedding_add_layer_norm_9951(
    weight_ptr,
    ids_ptr,
    weight_1_ptr,
    ids_1_ptr,
    weight_2_ptr,
    bias_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 768
    ids = tl.load(ids_ptr + row)
    ids_1 = tl.load(ids_1_ptr + row)
    weight_2 = tl.load(weight_2_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    embedding_0_row = tl.minimum(tl.maximum(ids.to(tl.int64), 0), 50256)
    embedding_0 = tl.load(weight_ptr + embedding_0_row * 768 + cols, mask=in_cols, other=0).to(tl.float32)
    embedding_1_row = tl.minimum(tl.maximum(ids_1.to(tl.int64), 0), 1023)
    embedding_1 = tl.load(weight_1_ptr + embedding_1_row * 768 + cols, mask=in_cols, other=0).to(tl.float32)
    add_0 = (embedding_0 + embedding_1).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 768 + cols, add_0.to(tl.bfloat16), mask=in_cols)
    layer_norm_0_sum = tl.sum(tl.where(in_cols, add_0, 0.0), 1, keep_dims=True)
    layer_norm_0_mean = layer_norm_0_sum / 768.0
    layer_norm_0_centered = add_0 - layer_norm_0_mean
    layer_norm_0_squares = tl.sum(tl.where(in_cols, layer_norm_0_centered * layer_norm_0_centered, 0.0), 1, keep_dims=True)
    layer_norm_0_scale = tl.rsqrt(layer_norm_0_squares / 768.0 + 1e-05)
    layer_norm_0 = (layer_norm_0_centered * layer_norm_0_scale * weight_2 + bias).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 768 + cols, layer_norm_0.to(tl.bfloat16), mask=in_cols)
