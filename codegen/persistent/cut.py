"""How the weights of a model are cut into chunks, and the text that reads these.

Where all weights are bfloat16, a chunk holds numbers. Where some are codes, chunks hold words of 32
bits, whatever they stand for, so that all of them fit the same registers: of a row a thread has as
many words as 8 of the model's codes fill, and of its weights in bfloat16 fewer columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from .codes import Codes
from .reading import Product, Shape
from .tiling import Tiling

_LANE = 8  # columns of codes that a thread has of a row


@dataclass(frozen=True, slots=True)
class Cut:
    """The chunks of a model.

    Attributes:
        tiling: how many rows they have, of how many warps.
        codes: of the model's weights; None where all are numbers.
    """

    tiling: Tiling
    codes: Codes | None

    @classmethod
    def of(cls, shape: Shape, tiling: Tiling) -> Cut:
        """That of a shape."""
        return cls(tiling, shape.codes)

    @property
    def per_thread(self) -> int:
        """Words of a row that a thread has."""
        return (16 if self.codes is None else self.codes.bits) * _LANE // 32

    @property
    def words(self) -> int:
        """Words of a row of a chunk."""
        return 32 * self.tiling.num_warps * self.per_thread

    def columns(self, form: Product) -> int:
        """Columns of a chunk of a product."""
        return self.words * (32 // form.bits)

    def chunks(self, form: Product) -> int:
        """Chunks that a row of a product's weight is cut into."""
        return -(-form.k // self.columns(form))

    def block_k(self, form: Product) -> str:
        """The columns in the text."""
        return "BLOCK_K" if self.codes is None else str(self.columns(form))

    @property
    def grouped(self) -> bool:
        """Whether scales come with the chunks."""
        return self.codes is not None and self.codes.group > 0

    def entry_lines(self, g: str, at: str) -> list[str]:
        """Reads the entry of a chunk of the group of rows ``g``."""
        if self.codes is None:
            return [f"{g}_base, {g}_step, {g}_left = _entry(items, {at})"]
        return [f"{g}_base, {g}_step, {g}_left, {g}_scale, {g}_pitch = _word_entry(items, {at})"]

    def chunk_lines(self, g: str) -> list[str]:
        """Begins to read the chunk that an entry told of."""
        if self.codes is None:
            return [f"w_{g} = _chunk({g}_base, {g}_step, {g}_left, R, BLOCK_K, MASKED)"]
        lines = [f"w_{g} = _word_chunk({g}_base, {g}_step, {g}_left, R, WORDS, LANE, MASKED)"]
        if self.grouped:
            lines += [
                f"s_{g} = _chunk_scales({g}_scale, {g}_pitch, {g}_left, R, WORDS, LANE, GROUP, "
                "SCALE, MASKED)"
            ]
        return lines

    def ask_line(self, at: str) -> str:
        """Asks for a later chunk to be brought to L2."""
        if self.codes is None:
            return f"_ask(items, {at}, R, BLOCK_K, MASKED)"
        return f"_ask_words(items, {at}, R, WORDS, LANE, MASKED)"

    def constexprs(self) -> dict[str, int | bool]:
        """What the text knows of chunks."""
        if self.codes is None:
            return {"BLOCK_K": self.tiling.columns}
        found: dict[str, int | bool] = {"WORDS": self.words, "LANE": self.per_thread}
        if self.grouped:
            found |= {"GROUP": self.codes.group, "SCALE": self.codes.scale_bytes}
        return found
