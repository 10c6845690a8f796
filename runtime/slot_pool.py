"""A pool of slots, for executors that read K and V of a sequence in one piece."""

from __future__ import annotations

from ..errors import CapacityError
from .pool import PageCopy, PagedPool, Slots


class SlotPool(PagedPool):
    """One slot of `max_len` tokens a running sequence, for executors without paged attention.

    A slot is a page of `max_len` tokens, so that block_tables[:, 0] is the slot. Slot 0 is in use
    like the others. A fork copies the whole slot. Prefixes are not cached.
    """

    shares = False
    _first_page = 0
    _foresees = False

    def __init__(self, max_slots: int, max_len: int) -> None:
        super().__init__(max_slots, max_len)

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits into the empty pool, in tokens: one slot."""
        return self.page_size

    def append(self, seq: int, num_tokens: int) -> tuple[Slots, list[PageCopy]]:
        """Finds places for the next tokens: their slots; there are never copies to make.

        Raises:
            CapacityError: no slot is free, or the sequence outgrows its slot; nothing has changed.
        """
        if self.length(seq) + num_tokens > self.page_size:
            raise CapacityError(
                "a slot of the KV pool",
                expected=f"at most {self.page_size} tokens",
                found=f"{self.length(seq) + num_tokens}",
                remedy="Compile with a larger max_model_len.",
            )
        return super().append(seq, num_tokens)

    _go_on = PagedPool._append_each

    def fork_pages_needed(self, seq: int) -> int:
        """Free slots that `fork(seq, …)` would take."""
        return len(self._held[seq])

    def fork(self, seq: int, new: int) -> list[PageCopy]:
        """Opens `new` in a slot of its own; returns the copy of the slot to make.

        Raises:
            CapacityError: no slot is free; nothing has changed.
        """
        self._make_room(self.fork_pages_needed(seq))
        self.add(new)
        self.append(new, self._tables.length(seq))
        return list(zip(self._held[seq], self._held[new], strict=True))
