"""Attention of a new prompt by cuDNN on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from tilewright.codegen.program import Call
from tilewright.codegen.triton.library import PREFIX, LibraryKernel
from tilewright.ir.schema import schema

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1024, 1087])
@pytest.mark.parametrize("heads, dim", [(32, 128), (8, 64)])
def test_fresh_attention(tokens: int, heads: int, dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    pages = -(-tokens // 16)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    joined = draw(tokens, heads + 16, dim)  # as a joined product leaves q, k and v
    q = joined[:, :heads]
    caches = [draw(pages + 9, 16, 8, dim) for _ in range(2)]
    table = torch.randperm(pages + 9, generator=generator, device="cuda")[:pages]
    position = torch.arange(tokens, device="cuda")
    slots = table[position // 16] * 16 + position % 16
    views = ((tuple(q.shape), 0, q.stride()), None, None, None)
    attrs = {"scale": dim**-0.5, "views": views, "backend": "cudnn"}
    call = Call(PREFIX + "fresh_attention", ("q", "k", "v", "s"), ("y",), attrs)
    (found,) = LibraryKernel(call, strict=True)([joined, *caches, slots], {})
    ends = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    wide = [x.double() for x in (q, *caches)]
    wanted = schema("paged_attention").reference(
        *wide, table[None].int(), ends[1:], ends, None, None, scale=dim**-0.5
    )
    assert found.is_contiguous()
    # cuDNN rounds weights to bfloat16: up to 0.0023 is left where values cancel (measured). The
    # op's own tolerance is 0.03.
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=5e-3)
