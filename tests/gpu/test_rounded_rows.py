"""Rows that generated kernels round to e4m3 on a GPU: the op's codes to the bit, at every scale."""

from __future__ import annotations

import pytest
import torch

from rewriting import parse
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import dense
from tilewright.ir.interpreter import interpret
from tilewright.passes.fuse import fuse
from tilewright.passes.open_rows import open_rows
from tilewright.targets import Target

pytestmark = pytest.mark.gpu

TEXT = """
def g(x: f32[T, 1000]):
    rows: ({codes}[T, 1000], f32[T, 1],) = quantize_rows(x, dtype={codes})
    q: {codes}[T, 1000] = item(rows, index=0)
    s: f32[T, 1] = item(rows, index=1)
    return {{"q": q, "s": s}}
"""


def hard_rows(largest: float) -> torch.Tensor:
    """Rows of every scale, many of whose quotients lie between two codes or next to that."""
    generator = torch.Generator("cuda").manual_seed(0)
    scale = torch.exp2(torch.arange(-149, 119, device="cuda").float())[:, None]
    scale = torch.cat([scale, scale * 1.3, scale * 1.9999999])
    size = (len(scale), 1000)
    halves = torch.randint(0, 2 * 448, size, generator=generator, device="cuda") / 2
    signs = torch.randint(0, 2, size, generator=generator, device="cuda") * 2 - 1
    steps = halves * signs
    steps[:, 500:] *= torch.exp2(-torch.randint(0, 20, (500,), device="cuda").float())
    steps[:, 0] = largest
    rows = steps * scale
    nudged = torch.nextafter(rows, rows * torch.where(signs > 0, 2.0, 0.5))
    nudged[:, 0] = rows[:, 0]
    special = torch.randn(4, 1000, device="cuda")
    special[0], special[1, 7], special[2, 3], special[3, 5] = 0.0, torch.nan, torch.inf, -0.0
    return torch.cat([rows, nudged, special])


@pytest.mark.parametrize("codes, largest", [("f8e4m3", 448.0), ("i8", 127.0)])
def test_codes_and_scales_are_the_ops(codes: str, largest: float) -> None:
    graph = parse(TEXT.format(codes=codes))
    (node,) = [n for n in fuse(open_rows(graph)).nodes if n.op == "fused"]
    target = Target.detect()
    source = emit_fused(node, (dense(node.operands[0].shape),), target)
    assert source is not None and "_by_largest(" in source.text
    (package,) = compile_sources([source], target.arch)
    kernel = LaunchedKernel(package, node.types, (), torch.device("cuda"))
    x = hard_rows(largest)
    found = sorted(kernel([x], {"T": len(x)}), key=lambda tensor: tensor.shape[1])
    expected = sorted(interpret(graph, [x.cpu()]), key=lambda tensor: tensor.shape[1])
    for ours, reference in zip(found, expected, strict=True):
        ours = ours.cpu()
        same = (ours.float() == reference.float()) | (
            ours.float().isnan() & reference.float().isnan()
        )
        assert bool(same.all()), f"{int((~same).sum())} of {same.numel()}"
