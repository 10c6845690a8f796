import triton
import triton.language as tl


# def cast_4a93(x: i64[T]):
#     cast_0: f32[T] = cast(x, dtype=f32)
#     return {"out0": cast_0}
@triton.jit
def cast_4a93(
    x_ptr,
    out0_ptr,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    in_cols = cols < T
    x = tl.load(x_ptr + cols, mask=in_cols, other=0)
    cast_0 = x.to(tl.float32)
    tl.store(out0_ptr + cols, cast_0, mask=in_cols)
