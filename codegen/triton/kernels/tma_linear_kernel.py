"""The device side of linears of many tokens: what tma_linear.py puts into a kernel's text.

Tiles of both operands are brought to shared memory by the device's copy engine (TMA), which fills
what lies beyond an end with zeros, so that nothing is masked before the store.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _place(tile, tokens, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP):
    """First token and first column of a tile. Tiles go down GROUP blocks of tokens before they go
    on to the next columns: those at work at one time share rows of x and of weights in the L2.
    """
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(tokens, BLOCK_M)
    first = tile // (GROUP * COLUMNS) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    inside = tile % (GROUP * COLUMNS)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _product(
    x,
    weight,
    token,
    column,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of the weight from ``column`` on times tokens of x from ``token`` on: f32 [N, M]."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        w = weight.load([column, k])
        acc = tl.dot(w, x.load([token, k]).T, acc, input_precision="ieee")
    return acc


@triton.jit
def _products(
    x,
    weight,
    token,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As ``_product``, of rows of the weight's first N rows and of those N further on."""
    first = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        value = x.load([token, k]).T
        first = tl.dot(weight.load([column, k]), value, first, input_precision="ieee")
        second = tl.dot(weight.load([column + N, k]), value, second, input_precision="ieee")
    return first, second


@triton.jit
def _strips(acc):
    """The two halves of a tile's tokens, f32 [N, M / 2] each."""
    N: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (N, 2, M // 2)), (0, 2, 1)))
