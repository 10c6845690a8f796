"""Rows of a projection as combinations of rows: numbers by einsum, text, what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import GraphError
from tilewright.formats import FOLDABLE, Held, apply_weight

pytestmark = pytest.mark.quick
sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, st.booleans())
def test_each_run_of_rows_meets_its_map(count: int, runs: int, ins: int, outs: int, flat: bool):
    generator = torch.Generator().manual_seed(count * 7 + runs)
    maps = torch.randn(count, outs, ins, generator=generator, dtype=torch.float64)
    shape = (count * runs * ins,) if flat else (count * runs * ins, 3)
    rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight = apply_weight("map_rows", (Held(maps, "maps"), Held(rows, "rows")))
    wanted = torch.einsum("bmn,brnk->brmk", maps, rows.view(count, runs, ins, -1))
    assert weight.shape == (count * runs * outs, *shape[1:])
    torch.testing.assert_close(weight.load(), wanted.reshape(weight.shape))


def test_sixteen_bits_round_once():
    maps, rows = torch.full((1, 1, 300), 1.0), torch.full((300, 2), 0.01).bfloat16()
    weight = apply_weight("map_rows", (Held(maps, "maps"), Held(rows, "rows")))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.load(), (rows.double().sum(0, keepdim=True)).bfloat16())


@pytest.mark.parametrize(
    ("maps", "rows"),
    [
        (torch.ones(2, 3, 4), torch.ones(12, 5)),
        (torch.ones(3, 4), torch.ones(8, 5)),
        (torch.ones(2, 3, 0), torch.ones(8, 5)),
        (torch.ones(2, 3, 4).int(), torch.ones(8, 5)),
        (torch.ones(2, 3, 4), torch.ones(8, 5).int()),
        (torch.ones(2, 3, 4), torch.ones(())),
    ],
)
def test_what_does_not_fit_is_refused(maps: torch.Tensor, rows: torch.Tensor):
    with pytest.raises(GraphError, match="map_rows"):
        apply_weight("map_rows", (Held(maps, "maps"), Held(rows, "rows")))


def test_graphs_do_not_fold_it():
    assert "map_rows" not in FOLDABLE
