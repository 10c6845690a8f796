import triton
import triton.language as tl


# def add_layer_norm_1111(a: bf16[T, 768], b: bf16[T, 768], weight: bf16[768], bias: bf16[768]):
#     add_0: bf16[T, 768] = add(a, b)
#     layer_norm_0: bf16[T, 768] = layer_norm(add_0, weight, bias, eps=1e-05)
#     return {"out0": add_0, "out1": layer_norm_0}
@triton.jit
def add_layer_norm_1111(
    a_ptr,
    b_ptr,
    weight_ptr,
    bias_ptr,
    out0_ptr,
    out1_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < 768
    a = tl.load(a_ptr + row * 768 + cols, mask=in_cols, other=0).to(tl.float32)
    b = tl.load(b_ptr + row * 768 + cols, mask=in_cols, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0).to(tl.float32)
    add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 768 + cols, add_0.to(tl.bfloat16), mask=in_cols)
    layer_norm_0_sum = tl.sum(tl.where(in_cols, add_0, 0.0), 1, keep_dims=True)
    layer_norm_0_mean = layer_norm_0_sum / 768.0
    layer_norm_0_centered = add_0 - layer_norm_0_mean
    layer_norm_0_squares = tl.sum(tl.where(in_cols, layer_norm_0_centered * layer_norm_0_centered, 0.0), 1, keep_dims=True)
    layer_norm_0_scale = tl.rsqrt(layer_norm_0_squares / 768.0 + 1e-05)
    layer_norm_0 = (layer_norm_0_centered * layer_norm_0_scale * weight + bias).to(tl.bfloat16).to(tl.float32)
    tl.store(out1_ptr + row * 768 + cols, layer_norm_0.to(tl.bfloat16), mask=in_cols)
