"""First keys that stay visible behind a window, in the four kernels of attention over pages,
against float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_forms import (
    LENGTHS,
    OP,
    OUTSIDE,
    RAGGED,
    SHAPES,
    Operands,
    Shape,
    decode_call,
    decode_operands,
    layouts_of,
    ragged_call,
    ragged_operands,
    truth,
)
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels import paged_attention_tiles, paged_decode_tiles
from tilewright.codegen.triton.kernels.paged_attention import paged_attention_source
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.kernels.paged_decode import emit_paged_decode, paged_decode_source
from tilewright.codegen.triton.kernels.prefill_steps import Share
from tilewright.codegen.triton.kernels.scaled_attention import (
    emit_scaled_attention,
    scaled_attention_source,
)
from tilewright.codegen.triton.kernels.scaled_decode import scaled_decode_source
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import run_interpreted

H100 = TARGETS["h100"]
SPLIT = paged_decode_tiles.Tiles(block_n=16, num_warps=1, num_stages=1, min_keys=16)
WHOLE = paged_attention_tiles.Tiles(block_m=32, block_n=16, num_warps=1, num_stages=1)
CODES = st.sampled_from([None, DType.I8, DType.F8E4M3])
FIRST = st.sampled_from([1, 4, 16, 17])
WINDOWS = st.sampled_from([1, 7, 16, 33])


def seen(shape: Shape, first: int, codes: DType | None) -> Shape:
    return replace(shape, first=first, codes=codes, alibi=False)


def source_of(shape: Shape, node: Node, splits: int = 3) -> KernelSource:
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    if node.args[5] is None:
        make = paged_decode_source if shape.codes is None else scaled_decode_source
        return make(problem, SPLIT, H100, splits)
    if shape.codes is None:
        return paged_attention_source(problem, WHOLE, (Share(WHOLE),), splits)
    return scaled_attention_source(problem, WHOLE)


def agrees(
    shape: Shape, node: Node, operands: Operands, sizes: dict[str, int], splits: int = 3
) -> torch.Tensor:
    (found,) = run_interpreted(source_of(shape, node, splits), node, operands, sizes)
    relative, absolute = OP.tolerance[shape.dtype]
    wanted = truth(shape, node, operands)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
    return found


@settings(max_examples=4)
@given(SHAPES, FIRST, CODES, LENGTHS, WINDOWS, st.integers(1, 4))
def test_decode(shape, first, codes, lengths, window, splits):
    shape = seen(shape, first, codes)
    node = decode_call(shape, window=window)
    agrees(shape, node, *decode_operands(shape, lengths), splits)


@settings(max_examples=4)
@given(SHAPES, FIRST, CODES, RAGGED, WINDOWS, st.sampled_from([None, 4.0]))
def test_prefill_and_mixed_steps(shape, first, codes, sequences, window, softcap):
    shape = seen(shape, first, codes)
    node = ragged_call(shape, window=window, softcap=softcap)
    agrees(shape, node, *ragged_operands(shape, sequences))


@pytest.mark.quick
@pytest.mark.parametrize("codes", [None, DType.I8], ids=str)
@pytest.mark.parametrize("decodes", [True, False])
def test_what_lies_between_is_not_read(codes, decodes):
    shape = Shape(page=8, paged=True, first=3, codes=codes)
    if decodes:
        node, (operands, sizes) = decode_call(shape, window=20), decode_operands(shape, [93, 64])
        earliest = [92, 63]
    else:
        node = ragged_call(shape, window=20)
        operands, sizes = ragged_operands(shape, [(90, 3), (60, 4)])
        earliest = [90, 60]
    wanted = truth(shape, node, operands)
    for b, place in enumerate(earliest):
        operands[3][b, 1 : (place - 19) // 8] = OUTSIDE
    (found,) = run_interpreted(source_of(shape, node), node, operands, sizes)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_they_compile_without_spills():
    shape = Shape(4, 8, 128, 128, 16, paged=True, dtype=DType.BF16, first=4)
    decode = decode_call(shape, window=4096)
    prefill = ragged_call(replace(shape, codes=DType.F8E4M3), window=4096)
    sources = [
        emit_paged_decode(decode, layouts_of(decode), H100),
        emit_scaled_attention(prefill, layouts_of(prefill), H100),
    ]
    for package in compile_sources(sources, 90):
        assert all(launch.spills == 0 for launch in package.resources)
