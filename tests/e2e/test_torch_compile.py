"""torch.compile(model, backend="tilewright"), by the name that the entry point registers."""

from __future__ import annotations

import pytest
import torch

from e2e.models import Branching, Encoder, moved_off_init


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    assert "tilewright" in torch._dynamo.list_backends(), "install the package: pip install -e ."
    yield
    torch._dynamo.reset()


def test_a_module_with_control_flow_that_depends_on_data() -> None:
    model = moved_off_init(Branching())
    engine = torch.compile(model, backend="tilewright")
    with torch.no_grad():
        for scale in (0.01, 10.0):
            for batch in (3, 5, 6):
                x = scale * torch.randn(batch, 8)
                found, expected = engine(x), model(x)
                torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
                assert found[1:] == expected[1:]


def test_an_encoder() -> None:
    model = moved_off_init(Encoder())
    ids, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    engine = torch.compile(model, backend="tilewright")
    with torch.inference_mode():
        found, expected = engine(ids, mask), model(ids, mask)
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
