import triton
import triton.language as tl


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


# def add_gelu(a: bf16[T, 8192], b: bf16[8192]):
#     add_0: bf16[T, 8192] = add(a, b)
#     gelu_0: bf16[T, 8192] = gelu(add_0, approximate="none")
#     return {"out0": gelu_0}
@triton.jit
def add_gelu(
    a_ptr,
    b_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) // 8) + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0).to(tl.int64) % 8) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(a_ptr + row * 8192 + cols).to(tl.float32)
    b = tl.load(b_ptr + cols).to(tl.float32)
    add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
    gelu_0 = (_gelu(add_0)).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 8192 + cols, gelu_0.to(tl.bfloat16))
