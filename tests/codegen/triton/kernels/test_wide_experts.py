"""Experts by descriptors against float64: every form and routing, what they compile to, and where
they are taken.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from experts_forms import (
    H100,
    OP,
    Form,
    node_of,
    operands_of,
    routed,
    source_of,
    truth_of,
)
from tilewright.codegen.triton.kernels.wide_experts_tiles import WideTiles
from tilewright.ir.dtypes import DType
from triton_bodies import run

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL = WideTiles(16, 16, 16, 4, 2, 2)


def check(form: Form, ids: torch.Tensor, tiles: WideTiles, sms: int) -> None:
    """The kernel is as near to float64 as torch, where so many multiprocessors share the tiles."""
    node = node_of(form)
    target = replace(H100, sms=sms)
    source = source_of(node, None, (((tiles, tiles), None),), target)
    operands = operands_of(form, ids)
    (found,) = run(source, node, operands, {"T": len(ids)})
    wanted = truth_of(form, node, operands)
    relative, absolute = OP.tolerance[form.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@settings(max_examples=6, phases=PHASES)
@given(
    form=st.builds(
        Form,
        experts=st.sampled_from([8, 11]),
        slots=st.sampled_from([1, 2, 3, 8]),
        inner=st.sampled_from([8, 24]),
        width=st.sampled_from([16, 40]),
        dtype=st.sampled_from([DType.F16, DType.BF16]),
        activation=st.sampled_from(["silu", "gelu_tanh", "gpt_oss"]),
        biases=st.booleans(),
        wide=st.booleans(),
    ),
    kind=st.sampled_from(["any", "the same", "not the first"]),
    tokens=st.sampled_from([1, 7, 40]),
    sms=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_it_is_the_op_in_float64(form, kind, tokens, sms, group) -> None:
    check(form, routed(form, tokens, kind), replace(SMALL, group=group), sms)


@pytest.mark.parametrize(("chunk", "sharers"), [(16, 3), (32, 128)])
def test_places_are_found_by_several_programs_of_several_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int, sharers: int
) -> None:
    module = "tilewright.codegen.triton.kernels.experts_entries"
    monkeypatch.setattr(f"{module}._CHUNK", chunk)
    monkeypatch.setattr(f"{module}._SHARERS", sharers)
    form = Form(experts=5, slots=2, inner=8, dtype=DType.BF16)
    for kind in ("any", "the same"):
        check(form, routed(form, 53, kind), SMALL, 2)
