import triton
import triton.language as tl


# def add_56f6(a: bf16[T, 4096], b: bf16[T, 4096]):
#     add_0: bf16[T, 4096] = add(a, b)
#     return {"out0": add_0}
@triton.jit
def add_56f6(
    a_ptr,
    b_ptr,
    out0_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) // 4) + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0).to(tl.int64) % 4) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(a_ptr + row * 4096 + cols).to(tl.float32)
    b = tl.load(b_ptr + row * 4096 + cols).to(tl.float32)
    add_0 = (a + b).to(tl.bfloat16).to(tl.float32)
    tl.store(out0_ptr + row * 4096 + cols, add_0.to(tl.bfloat16))
