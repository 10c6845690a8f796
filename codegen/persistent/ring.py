"""A dense decoder as a ring of weights serves it: sizes of the one launch, and what fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UnsupportedError
from .codes import Codes
from .reading import Attention, Begin, Product, Shape, Step

TILE = 16384
"""Of weights, in units of 2 bytes: 32 KB."""
SPLITS = 16
"""Programs that share a KV head's keys."""
GROUP = 4
"""Query heads of a KV head, at most."""
_UNIT = 256  # elements of a box's rows, at most
_COPIED = 8  # elements of 16 bytes: what one look at memory takes
_LANES_CODES = 128  # of 4 bits, that lanes which sum together meet at once


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of K weights come into the ring.

    Attributes:
        k: weights of a row.
        bits: of a weight.
        unit: units of 2 bytes of a line of the tensor map, of which a row has a whole number.
    """

    k: int
    bits: int
    unit: int

    @property
    def length(self) -> int:
        """Of a row, in units of 2 bytes."""
        return self.k * self.bits // 16

    @property
    def pitch(self) -> int:
        """Weights from a row to the next one in the ring: the next power of two."""
        return 1 << (self.k - 1).bit_length()

    @property
    def in_tile(self) -> int:
        """Rows of a tile."""
        return TILE * 16 // self.bits // self.pitch

    @property
    def box(self) -> int:
        """Lines that one copy brings: half a tile where rows leave no gaps."""
        half = TILE // 2 // self.unit
        if self.k == self.pitch:
            return half
        lines = self.length // self.unit
        return min(half, lines & -lines)


@dataclass(frozen=True, slots=True)
class Ring:
    """Sizes of a model: layers of five calls each, and a last product.

    Attributes:
        layers: of qkv, attention, its output, gates and their product, which all are alike.
        width: of the residual stream.
        inner: of the gated product.
        vocab: rows of the last product.
        attention: heads, and what their rope rounds.
        eps: of each norm.
        stepwise: whether silu is rounded before it is multiplied.
        codes: what weights of layers are, None for bfloat16, which those of the last product are.
    """

    layers: int
    width: int
    inner: int
    vocab: int
    attention: Attention
    eps: float
    stepwise: bool
    codes: Codes | None = None

    @property
    def attended(self) -> int:
        """Columns of attention's result."""
        return self.attention.heads * self.attention.head_dim

    @property
    def qkv(self) -> int:
        """Rows of a layer's first product."""
        return self.attended + 2 * self.attention.kv_heads * self.attention.head_dim

    @property
    def layer_values(self) -> int:
        """What calls of a layer leave to those behind them, in elements."""
        return self.qkv + self.attended + 2 * self.width + self.inner

    @property
    def bits(self) -> int:
        """Of a layer's weights."""
        return 16 if self.codes is None else self.codes.bits

    @property
    def unit(self) -> int:
        """Of a line of the tensor map, in units of 2 bytes: rows have a whole number of them."""
        lengths = [k * self.bits // 16 for k in (self.width, self.attended, self.inner)]
        sizes = lengths[0] | lengths[1] | lengths[2] | self.width
        return min(_UNIT, sizes & -sizes)

    @property
    def rows(self) -> tuple[Rows, Rows, Rows, Rows]:
        """Rows of layers that multiply the residual stream, attention's result and the gated
        product, and of the last product.
        """
        wide, attended, inner = (
            Rows(k, self.bits, self.unit) for k in (self.width, self.attended, self.inner)
        )
        return wide, attended, inner, Rows(self.width, 16, self.unit)

    @property
    def calls(self) -> int:
        """In all."""
        return 5 * self.layers + 1

    @property
    def programs(self) -> int:
        """That attention occupies, at least."""
        return SPLITS * self.attention.kv_heads


def ring_of(shape: Shape) -> Ring:
    """The ring that serves a decode graph of one sequence.

    Raises:
        UnsupportedError: calls are no repeated layer, or of sizes that do not fit; which.
    """
    first, *middle = shape.calls
    last = middle.pop()
    layers = [middle[i : i + 5] for i in range(0, len(middle), 5)]
    _insist(isinstance(shape.form(first), Begin), "a call in front of the embedding", first)
    head = shape.form(last)
    if (
        not isinstance(head, Product)
        or not (head.norm and head.chosen)
        or head.gated
        or head.residual
    ):
        raise _other("another end than norm, product and choice", last)
    _insist(head.codes is None, "a last product of codes", last)
    x = first.out
    for layer in layers:
        _insist(len(layer) == 5, "calls that are no whole layer", layer[0])
        x = _checked_layer(shape, layer, layers[0], x)
    _insist(bool(layers) and last.x == x, "a last product of something else", last)
    qkv, attention, _, gates, down = (shape.form(step) for step in layers[0])
    assert isinstance(attention, Attention) and isinstance(qkv, Product)
    assert isinstance(gates, Product) and isinstance(down, Product)
    sizes = (len(layers), shape.width, down.k, head.n)
    found = Ring(*sizes, attention, head.eps, gates.stepwise, shape.codes)
    _check_codes(found.codes, (qkv, gates))
    _check_sizes(found, (qkv, gates, head))
    return found


def _checked_layer(shape: Shape, layer: list[Step], like: list[Step], x: str) -> str:
    """A layer's result, where its calls are those of a layer on ``x``."""
    qkv, attention, output, gates, down = layer
    for step, other in zip(layer, like, strict=True):
        _insist(step.form == other.form, "layers that differ", step)
    forms = [shape.form(step) for step in layer]
    products = [form for form in forms if isinstance(form, Product)]
    _insist(len(products) == 4 and isinstance(forms[1], Attention), "other calls", qkv)
    _insist({form.codes for form in products} == {shape.codes}, "weights of two kinds", qkv)
    kinds = [(form.norm, form.gated, form.residual, form.chosen) for form in products]
    ours = [(True, False, False, False), (False, False, True, False)]
    ours += [(True, True, False, False), (False, False, True, False)]
    _insist(kinds == ours, "other calls", qkv)
    read = (qkv.x, attention.x, output.x, output.residual, gates.x, down.x, down.residual)
    flow = (x, qkv.out, attention.out, x, output.out, gates.out, output.out)
    _insist(read == flow, "calls that read something else", qkv)
    return down.out


def _check_sizes(ring: Ring, normed: tuple[Product, ...]) -> None:
    attention = ring.attention
    eps = {form.eps for form in normed}
    _fits(eps == {ring.eps}, "norms of one epsilon", f"{sorted(eps)}")
    group = attention.heads // attention.kv_heads
    _fits(group <= GROUP, f"at most {GROUP} query heads a KV head", f"{group}")
    dim, page = attention.head_dim, attention.page_size
    _fits(dim in (64, 128), "heads of 64 or 128", f"{dim}")
    _fits(page & (page - 1) == 0, "pages of a power of two", f"{page}")
    lengths = [row.pitch * row.bits // 16 for row in ring.rows]
    pitches = all(1024 <= row.pitch <= TILE for row in ring.rows)
    known = ring.unit >= 64 and pitches and min(lengths) >= 512 and max(lengths) <= TILE
    _fits(known, _SIZES, _said(ring))
    wide, _, _, head = ring.rows
    # Gaps of the last product's rows hold what layers have left there: of two codes of 4 bits no
    # number of bfloat16, and nothing times zero is none.
    filled = ring.bits != 4 or head.k == head.pitch
    _fits(filled, "a width of a power of two with weights of 4 bits", _said(ring))
    # Of others the rows are a multiple of 64, and a tile has at most 32.
    rows = max(head.in_tile, _COPIED)
    # Tiles of one row of the last product leave no room beside the warps that codes take.
    narrow = ring.bits == 16 or head.in_tile > 1
    _fits(narrow, "a width of at most 8192 with weights of codes", _said(ring))
    _fits(ring.vocab % rows == 0, f"a vocabulary of a multiple of {rows} tokens", _said(ring))
    _fits(wide.in_tile >= 2, "gates of which a tile has two rows, of at most 16 KB", _said(ring))


_SIZES = (
    f"rows of 513 to {TILE} weights, of a multiple of 128 bytes, that with what brings them to a "
    "power of two are 1 to 32 KB"
)


def _check_codes(codes: Codes | None, normed: tuple[Product, ...]) -> None:
    if codes is None:
        return
    of_rows = codes.bits == 8 and codes.group == 0 and codes.block == 1 and codes.rounds
    by_lanes = codes.group > 0 and codes.group % _LANES_CODES == 0
    of_groups = codes.bits == 4 and by_lanes and not codes.rounds
    _fits(
        of_rows or of_groups,
        f"codes of 8 bits by rows, x rounded to such too, or of 4 bits by groups of {_LANES_CODES}",
        f"{codes}",
    )
    steps = all(form.norm_stepwise for form in normed) or not codes.rounds
    _fits(steps, "norms that round before they multiply with their weight", "others")


def _said(ring: Ring) -> str:
    return f"width {ring.width}, {ring.attended} attended, inner {ring.inner}, {ring.vocab} tokens"


def step_weights(shape: Shape) -> Mapping[str, tuple[str, ...]]:
    """Names of weights: of each layer qkv, output, gates, down, both norms, and the scales of the
    four, "" where they have none; of the end the last product, its norm and the embedding.
    """
    first, *middle = shape.calls
    last = middle.pop()
    found: dict[str, tuple[str, ...]] = {}
    for index in range(0, len(middle), 5):
        qkv, _, output, gates, down = middle[index : index + 5]
        products = (qkv.weight, output.weight, gates.weight, down.weight)
        scales = (qkv.scale, output.scale, gates.scale, down.scale)
        found[f"layer {index // 5}"] = (*products, qkv.norm, gates.norm, *scales)
    found["end"] = (last.weight, last.norm, first.weight)
    return found


def _insist(holds: bool, found: str, step: Step) -> None:
    if not holds:
        raise _other(found, step)


def _other(found: str, step: Step) -> UnsupportedError:
    named = step.weight or step.x
    return _unsupported("layers of qkv, attention, output, gates, down", f"{found} ({named})")


def _fits(holds: bool, expected: str, found: str) -> None:
    if not holds:
        raise _unsupported(expected, found)


def _unsupported(expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        "one launch for all layers, by a ring of weights",
        expected=expected,
        found=found,
        remedy="Its decode steps run in another way.",
    )
