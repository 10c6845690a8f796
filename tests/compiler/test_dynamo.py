"""torch.compile(backend=tilewright): the results and the manners that torch users expect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from e2e.models import MLP, Branching, moved_off_init
from tilewright.compiler import dynamo
from tilewright.compiler.dynamo import MOST_ENGINES, tilewright_backend
from tilewright.errors import UsageError

ATOL = 1e-5


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """One entry an engine that was made."""
    torch._dynamo.reset()
    dynamo._warned.clear()
    made: list[object] = []
    compile_engine = dynamo.compile_engine

    def counted(*args, **kwargs):
        made.append(args)
        return compile_engine(*args, **kwargs)

    monkeypatch.setattr(dynamo, "compile_engine", counted)
    yield made
    torch._dynamo.reset()


def on_tilewright(model, **options):
    """torch.compile on the eager backend, which compiles fastest; any warning is an error."""
    return torch.compile(model, backend=tilewright_backend, options={"backend": "eager"}, **options)


@pytest.fixture
def strict() -> Iterator[None]:
    """No silent fall back: a warning of ours fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="tilewright")
        yield


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)


def test_graph_breaks_at_control_flow_that_depends_on_data(strict, compiled) -> None:
    model = moved_off_init(Branching())
    engine = on_tilewright(model)
    with torch.no_grad():
        for scale in (0.01, 10.0):
            x = scale * torch.randn(3, 8)
            found, expected = engine(x), model(x)
            close(found[0], expected[0])
            assert found[1:] == expected[1:] == (3, None)
    assert len(compiled) == 3  # before the branch, and each side of it


def test_a_changing_batch_compiles_a_few_engines_only(strict, compiled) -> None:
    model = moved_off_init(MLP())
    engine = on_tilewright(model)
    with torch.no_grad():
        for batch in (2, 3, 4, 5, 9, 17, 64):
            x = torch.randn(batch, 20)
            close(engine(x), model(x))
    assert len(compiled) == 2  # the first size, then any


def test_a_marked_dimension_compiles_once(strict, compiled) -> None:
    model = moved_off_init(MLP())
    engine = on_tilewright(model)
    with torch.no_grad():
        for batch in (5, 2, 33):
            x = torch.randn(batch, 20)
            torch._dynamo.mark_dynamic(x, 0)
            close(engine(x), model(x))
    assert len(compiled) == 1


def test_sizes_come_out_as_ints(strict) -> None:
    def shape(x):
        return x * 2, x.shape[0], x.shape[0] * 3, None, "text"

    engine = on_tilewright(shape, dynamic=True)
    with torch.no_grad():
        for batch in (4, 6):
            found = engine(torch.ones(batch, 2))
            assert found[1:] == (batch, batch * 3, None, "text")
            assert type(found[1]) is int
            assert type(found[2]) is int


@pytest.mark.parametrize(
    "update",
    [
        lambda p: p.mul_(2),
        lambda p: p.data.neg_(),
        lambda p: p.data.copy_(torch.ones_like(p)),
        lambda p: setattr(p, "data", torch.full_like(p, 0.5)),
    ],
    ids=["in place", "through data", "copied", "replaced"],
)
def test_parameter_updates_are_noticed(strict, compiled, update) -> None:
    model = moved_off_init(MLP())
    engine = on_tilewright(model)
    x = torch.randn(3, 20)
    with torch.no_grad():
        close(engine(x), model(x))
        update(model.layers[0].weight)
        close(engine(x), model(x))
        close(engine(x), model(x))
    assert len(compiled) == 2


def test_loaded_weights_are_noticed(strict) -> None:
    model, other = moved_off_init(MLP()), moved_off_init(MLP())
    engine = on_tilewright(model)
    x = torch.randn(3, 20)
    with torch.no_grad():
        close(engine(x), model(x))
        model.load_state_dict(other.state_dict(), assign=True)
        close(engine(x), other(x))


def test_parameters_that_change_at_each_call_end_compiling(compiled) -> None:
    model = moved_off_init(nn.Linear(4, 4))
    engine = on_tilewright(model)
    x = torch.randn(2, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="update parameters less often"):
        for _ in range(MOST_ENGINES + 3):
            model.weight.add_(0.1)
            close(engine(x), model(x))
    assert len(compiled) == MOST_ENGINES


def test_under_grad_gradients_are_right_and_one_warning_says_why(compiled) -> None:
    model, twin = moved_off_init(MLP()), MLP().eval()
    twin.load_state_dict(model.state_dict())
    engine = on_tilewright(model)
    x = torch.randn(3, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            engine(x)[0].sum().backward()
    ours = [w for w in caught if "tilewright compiles for inference" in str(w.message)]
    assert len(ours) == 1
    assert compiled == []
    for _ in range(3):
        twin(x)[0].sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    with torch.no_grad():
        close(engine(x), model(x))
    assert len(compiled) == 1


def test_results_can_be_written_to_and_differentiated_behind(strict) -> None:
    model = moved_off_init(MLP())
    with torch.no_grad():
        features = on_tilewright(model)(torch.randn(3, 20))[0]
    features.add_(1)
    head = nn.Linear(10, 1)
    head(features).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_ways_of_inference(strict, mode) -> None:
    model = moved_off_init(MLP())
    engine = on_tilewright(model)
    x = torch.randn(3, 20)
    with mode():
        close(engine(x), model(x))


def write_input(x):
    x.add_(1)
    return x * 2


def view_of_input(x):
    return x.view(-1), x + 1


def views_of_one(x):
    return (x * 2).chunk(2)


@pytest.mark.parametrize("function", [write_input, view_of_input, views_of_one])
def test_writes_and_views_are_as_torch_has_them(function) -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4, 2)
    with torch.no_grad(), pytest.warns(UserWarning, match="tilewright runs a graph as torch does"):
        found = on_tilewright(function)(x)
    expected = function(y)
    close(found, expected)
    close(x, y)
    if isinstance(found, tuple):
        found[0].add_(5)
        expected[0].add_(5)
        close(found, expected)
        close(x, y)


class Counting(nn.Module):
    """Writes to a buffer that its output does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


def test_buffers_are_written() -> None:
    model = Counting()
    engine = on_tilewright(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="in-place write"):
        for _ in range(3):
            engine(torch.ones(2))
    assert model.calls.item() == 3


def test_random_numbers_are_torchs_own() -> None:
    def noisy(x):
        return x + torch.rand_like(x), torch.rand_like(x)

    torch.manual_seed(3)
    with torch.no_grad(), pytest.warns(UserWarning, match="random numbers"):
        found = on_tilewright(noisy)(torch.zeros(4))
    torch.manual_seed(3)
    close(found, noisy(torch.zeros(4)))


def test_dropout_in_training_mode_still_drops() -> None:
    model = nn.Dropout(0.5).train()
    with torch.no_grad(), pytest.warns(UserWarning, match="tilewright runs a graph"):
        found = on_tilewright(model)(torch.ones(1000))
    assert 300 < int((found == 0).sum()) < 700


def test_two_models_share_nothing(strict) -> None:
    first, second = moved_off_init(MLP()), moved_off_init(MLP())
    on_first, on_second = on_tilewright(first), on_tilewright(second)
    x = torch.randn(3, 20)
    with torch.no_grad():
        for _ in range(2):
            close(on_first(x), first(x))
            close(on_second(x), second(x))


def test_one_model_compiled_twice_at_two_shapes(strict) -> None:
    model = moved_off_init(nn.Linear(4, 4))
    engine = on_tilewright(model)
    with torch.no_grad():
        for shape in ((2, 4), (2, 3, 4), (4,), (1, 4), (5, 4)):
            x = torch.randn(shape)
            close(engine(x), model(x))


def test_an_integer_argument(strict, compiled) -> None:
    def scaled(x, n):
        return x * n + x.shape[0]

    engine = on_tilewright(scaled)
    with torch.no_grad():
        for n in (2, 3, 4):
            close(engine(torch.ones(3), n), scaled(torch.ones(3), n))


def test_an_unknown_option_is_an_error() -> None:
    engine = torch.compile(MLP(), backend=tilewright_backend, options={"speed": "high"})
    wrapped = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(wrapped, match="backend, verify") as raised, torch.no_grad():
        engine(torch.randn(2, 20))
    assert isinstance(raised.value.inner_exception, UsageError)


def test_autocast_is_kept(strict) -> None:
    model = moved_off_init(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = on_tilewright(model)(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_autocast_runs_as_torch_does_where_export_drops_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamo, "EXPORT_KEEPS_AUTOCAST", False)
    monkeypatch.setattr(dynamo, "_warned", set())
    model = moved_off_init(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="under autocast"):
            found = on_tilewright(model)(x)
        torch.testing.assert_close(found, model(x), atol=0, rtol=0)
