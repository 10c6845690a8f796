"""Loading weights in parallel: the values of one thread, bounded host memory, clear errors."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import CapacityError, CheckpointError
from tilewright.formats import Held, Random, Stored, apply_weight, made, open_checkpoint
from tilewright.formats.weight_base import Placement
from tilewright.formats.weights import Full
from tilewright.runtime import weights as loading
from tilewright.runtime.staging import blocks
from tilewright.runtime.weights import load_weights, place_weights

CPU = torch.device("cpu")
SIZES = st.integers(1, 5)


@pytest.fixture
def stored(tmp_path):
    """Stored weights a, b, c: [6, 4] in bfloat16, and their tensors."""
    from safetensors.torch import save_file

    tensors = {name: torch.randn(6, 4).bfloat16() for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    return {name: Stored(checkpoint, name) for name in tensors}, tensors


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_thread_count_gives_what_torch_computes(stored, threads: int) -> None:
    weights, t = stored
    merged = apply_weight("concat", tuple(weights.values()), dim=0)
    beside = apply_weight("concat", tuple(weights.values()), dim=1)
    wide = torch.float32
    cases = {
        "plain": (weights["a"], t["a"]),
        "merged": (merged, torch.cat([*t.values()])),
        "beside": (beside, torch.cat([*t.values()], 1)),
        "cast": (apply_weight("cast", (merged,), dtype=wide), torch.cat([*t.values()]).float()),
        "scaled": (
            apply_weight("mul", (apply_weight("cast", (weights["b"],), dtype=wide), 0.3)),
            t["b"].float() * 0.3,
        ),
        "turned": (apply_weight("permute", (weights["c"],), dims=(1, 0)), t["c"].T),
        "cut": (apply_weight("slice", (weights["c"],), dim=0, start=1, stop=3), t["c"][1:3]),
        "ones": (Full(1.0, (3,), torch.bfloat16), torch.ones(3).bfloat16()),
        "none": (Full(1.0, (0, 3)), torch.empty(0, 3)),
    }
    before = torch.get_num_threads()
    loaded = place_weights({name: weight for name, (weight, _) in cases.items()}, CPU, threads)
    assert torch.get_num_threads() == before
    for name, (_, expected) in cases.items():
        assert torch.equal(loaded.tensors[name], expected), name
        assert loaded.tensors[name].dtype == expected.dtype
        assert loaded.tensors[name].is_contiguous()
    assert loaded.report.bytes_read == 3 * 6 * 4 * 2
    assert loaded.report.bytes_placed == sum(e.nbytes for _, e in cases.values())
    assert loaded.report.seconds > 0


def test_a_cast_within_a_cast_still_rounds() -> None:
    x = Held(torch.randn(50), "x")
    half = apply_weight("cast", (x,), dtype=torch.bfloat16)
    parts = apply_weight("concat", (half, half), dim=0)
    for inner, expected in ((half, x.tensor), (parts, torch.cat([x.tensor, x.tensor]))):
        back = apply_weight("cast", (inner,), dtype=torch.float32)
        assert torch.equal(load_weights({"w": back}, CPU)["w"], expected.bfloat16().float())


def test_stored_tensors_stay_mapped_on_a_cpu(stored) -> None:
    weights, _ = stored
    loaded = load_weights({"a": weights["a"], "again": weights["a"]}, CPU)
    assert loaded["a"] is loaded["again"]
    whole = weights["a"].checkpoint.tensor("a").load()
    assert loaded["a"].untyped_storage().nbytes() == whole.untyped_storage().nbytes()


@given(SIZES, SIZES, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_chunks_of_a_random_tensor_are_independent_of_threads_and_layout(
    rows: int, columns: int, chunk: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(made, "CHUNK_ELEMENTS", chunk)
        weight = Random(3, (rows, columns), dtype, std=1.0)
        drawn = weight.load()
        other = Random(4, (rows, columns), dtype, std=1.0)
        # Beside another one its memory is not contiguous, and it is written whole.
        beside = apply_weight("concat", (weight, other), dim=1)
        below = apply_weight("concat", (weight, other), dim=0)
        for threads in (1, 3):
            found = place_weights({"w": weight, "b": beside, "c": below}, CPU, threads).tensors
            assert torch.equal(found["w"], drawn)
            assert torch.equal(found["b"], torch.cat([drawn, other.load()], 1))
            assert torch.equal(found["c"], torch.cat([drawn, other.load()], 0))


def test_large_random_tensors_are_drawn_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Random(5, (4, 250), std=1.0).load()
    torch.testing.assert_close(
        small, torch.randn(4, 250, generator=torch.Generator().manual_seed(5)), rtol=0, atol=0
    )
    monkeypatch.setattr(made, "CHUNK_ELEMENTS", 300)
    large = Random(5, (4, 2500), std=1.0).load().view(-1)
    assert len(set(large.tolist())) > 9990  # no chunk repeats another
    assert large.std().item() == pytest.approx(1, rel=0.03)


class Watched:
    """A checkpoint of float32[1000] tensors that counts those in memory at once."""

    metadata: dict[str, object] = {}

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.name, self.shape, self.dtype = "w", (1000,), torch.float32

    def tensor(self, name: str) -> Watched:
        return self

    def names(self) -> tuple[str, ...]:
        return ("w",)

    def files(self) -> tuple[()]:
        return ()

    def load(self) -> torch.Tensor:
        tensor = torch.ones(1000)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._died)
        return tensor

    def _died(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize(("limit", "most"), [(8000, 2), (1, 1)])
def test_host_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, limit: int, most: int) -> None:
    monkeypatch.setattr(loading, "HOST_BYTES", limit)
    watched = Watched()
    parts = tuple(Stored(watched, "w") for _ in range(40))
    weight = apply_weight("concat", parts, dim=0)
    assert torch.equal(place_weights({"w": weight}, CPU, 6).tensors["w"], torch.ones(40_000))
    assert 1 <= watched.most <= most
    assert watched.alive == 0


def test_an_error_in_one_thread_ends_all(stored) -> None:
    class Broken(Watched):
        def load(self) -> torch.Tensor:
            raise CheckpointError("w", expected="bytes", found="none", remedy="Copy it again.")

    weights = {f"w{i}": Stored(Broken(), "w") for i in range(20)}
    with pytest.raises(CheckpointError, match="Copy it again"):
        place_weights(weights, CPU, 4)


def test_too_little_memory_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match=r"4503599627370496 bytes .*smaller dtype"):
        load_weights({"w": Random(0, (2**50,))}, CPU)
    monkeypatch.setattr(loading, "_free_bytes", lambda device: 7)
    with pytest.raises(CapacityError, match=r"memory for 8 bytes .* found 7 bytes free"):
        load_weights({"w": Full(1.0, (2,))}, CPU)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Watched):
        def load(self) -> torch.Tensor:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        load_weights({"w": Stored(Broken(), "w")}, CPU)


class Recorded(Placement):
    """A device as far as expressions can tell: what is brought to it is counted."""

    def __init__(self) -> None:
        self.brought: list[int] = []

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        self.brought.append(tensor.numel())
        return tensor.clone()

    def fill(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        self.brought.append(tensor.numel())
        out.copy_(tensor)


def test_parts_are_placed_straight_into_the_merged_tensor(stored) -> None:
    weights, tensors = stored
    place = Recorded()
    merged = apply_weight("concat", tuple(weights.values()), dim=0)
    cast = apply_weight("cast", (merged,), dtype=torch.float32)
    out = torch.empty(18, 4)
    cast.write(out, place)
    assert torch.equal(out, torch.cat([*tensors.values()]).float())
    assert place.brought == [24, 24, 24]
    row = apply_weight("slice", (weights["a"],), dim=0, start=2, stop=3)
    assert torch.equal(row.value(place), tensors["a"][2:3])
    assert place.brought[3:] == [4]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 7), max_size=3), st.integers(1, 30))
def test_blocks_cover_a_tensor_once(shape: list[int], limit: int) -> None:
    source, out = torch.randn(shape), torch.zeros(shape)
    count = 0
    for region, part in blocks(out, source, limit):
        assert region.shape == part.shape
        assert 0 < part.numel() <= limit
        count += part.numel()
        region.copy_(part)
    assert count == source.numel()
    assert torch.equal(out, source)
