"""Kernels of which only some programs are interpreted: a large weight has thousands of equal ones,
each of which takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import torch

from ..codegen.triton.between import Between
from ..codegen.triton.interpreted import InterpretedKernel
from ..codegen.triton.invocation import Given
from ..codegen.triton.source import Launch, Pointer
from ..errors import VerificationError
from ..passes.driver import largest_error

LARGE = 1 << 20  # elements of an operand: its kernel is worth cutting down
MOST_PROGRAMS = 32  # of a launch
MOST_AGAIN = 4  # of one of a kernel that ran before
_UNWRITTEN = {  # bits of a NaN that no arithmetic gives, by width of the element
    2: (torch.int16, 0x7FA5),
    4: (torch.int32, 0x7FA5A5A5),
}


class SpotCheckedKernel(InterpretedKernel):
    """A kernel whose last launch, where it reads a large operand, runs about ``MOST_PROGRAMS``: the
    first, the last, and some between them, evenly spaced along the grid's first axis. What these
    write is held against the reference's values, which stand for what the others would have
    written. So programs along that axis must not need one another, and write equal shares.

    So do the launches before it that fill a workspace whose values are known (`between`), though of
    these a program may write nothing.

    Args:
        kernel: whose place it takes.
        expected: the reference's values of its results, None where there are none to be had: all
            programs run.
        handed: for a kernel whose last results are no node's (codegen/triton/hand_on.py), their
            values from the results before them; what it gives none of is left as it is.
        again: whether the same kernel ran before, on other operands: a few programs will do.
        between: for a kernel of several launches that each take long: what its workspaces should
            hold.

    Raises:
        VerificationError: when called, if what is written differs, or is less than the programs'
            share.
    """

    def __init__(
        self,
        kernel: InterpretedKernel,
        expected: Sequence[torch.Tensor] | None,
        handed: Callable[..., Sequence[torch.Tensor]] | None = None,
        again: bool = False,
        between: Between | None = None,
    ) -> None:
        pairs = tuple(kernel.aliases.items())
        super().__init__(kernel.source, kernel.result_types, pairs, kernel.device)
        types = [type_.dtype.torch for type_ in kernel.result_types]
        markable = all(t.is_floating_point and t.itemsize in _UNWRITTEN for t in types)
        self.expected = expected if markable and not pairs else None
        self.handed = handed
        self.between = between
        self.most = MOST_AGAIN if again else MOST_PROGRAMS
        self._thinned: list[Launch] = []
        self._spaces: dict[int, torch.Tensor] = {}  # what is known of those that nobody filled yet

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        launches = self._plan(sizes).launches
        large = any(x is not None and x.numel() > LARGE for x in operands)
        if self.expected is None or not launches or not large:
            return super().__call__(operands, sizes)
        last, grid, _ = launches[-1]
        self._thinned = [last]
        self._spaces = {} if self.between is None else dict(self.between(operands, sizes))
        results = super().__call__(operands, sizes)
        self._thinned = []
        part = Fraction(len(_spots(grid, self.most)), grid[0])
        own, others = results[: len(self.expected)], results[len(self.expected) :]
        done = [self._completed(a, b, part) for a, b in zip(own, self.expected, strict=True)]
        # Of what was found, so that its roundings make no difference to sums of it.
        wanted = [] if self.handed is None else self.handed(*done)
        done += [self._completed(a, b, part) for a, b in zip(others, wanted, strict=False)]
        return [*done, *results[len(done) :]]

    def programs(
        self, launch: Launch, grid: tuple[int, int, int]
    ) -> Iterable[tuple[int, int, int]]:
        """All, or some of those of the launch that is cut down."""
        if not any(launch is thinned for thinned in self._thinned):
            return super().programs(launch, grid)
        x, y, z = grid
        return ((i, j, k) for i in _spots(grid, self.most) for j in range(y) for k in range(z))

    def _result(
        self, index: int, shape: tuple[int, ...], operands: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        result = super()._result(index, shape, operands)
        if self._thinned:
            type_, bits = _UNWRITTEN[result.dtype.itemsize]
            result.view(type_).fill_(bits)
        return result

    def launch(
        self,
        launch: Launch,
        grid: tuple[int, int, int],
        arguments: Sequence[Given],
    ) -> None:
        """As of every interpreted kernel; a workspace that is filled in part is completed."""
        filled: list[tuple[torch.Tensor, torch.Tensor]] = []
        for argument, value in zip(launch.arguments, arguments, strict=True):
            if not isinstance(argument, Pointer) or argument.role != "workspace":
                continue
            if argument.index in self._spaces:
                assert isinstance(value, torch.Tensor)
                wanted = self._spaces.pop(argument.index).reshape(value.shape).to(value.dtype)
                filled.append((value, wanted))
        if not filled:
            super().launch(launch, grid, arguments)
            return
        self._thinned.append(launch)
        for space, _ in filled:
            type_, bits = _UNWRITTEN[space.dtype.itemsize]
            space.view(type_).fill_(bits)
        super().launch(launch, grid, arguments)
        for space, wanted in filled:
            space.copy_(self._completed(space, wanted, Fraction(1), least=Fraction(0)))

    def _completed(
        self,
        found: torch.Tensor,
        wanted: torch.Tensor,
        part: Fraction,
        least: Fraction | None = None,
    ) -> torch.Tensor:
        """``found``, checked, with the reference's values where nothing is written: more than
        ``least`` (None: half of ``part``) is, and at most ``part``.
        """
        type_, bits = _UNWRITTEN[found.dtype.itemsize]
        unwritten = found.view(type_) == bits
        written = Fraction(int((~unwritten).sum()), unwritten.numel())
        least = part / 2 if least is None else least  # the last tile may be a partial one
        if not least < written <= part:
            raise VerificationError(
                f"kernel {self.source.name}",
                expected=f"{float(part):.3g} of its result, written by as many of its programs",
                found=f"{float(written):.3g}",
                remedy="Report it; backend='eager' has no kernels.",
            )
        completed = torch.where(unwritten, wanted, found)
        largest_error(f"kernel {self.source.name}", [wanted], [completed])
        return completed


def _spots(grid: tuple[int, int, int], most: int) -> list[int]:
    """Which programs along the first axis are run; at least the first and the last."""
    count = max(2, most // (grid[1] * grid[2]))
    if count >= grid[0]:
        return list(range(grid[0]))
    return sorted({round(i * (grid[0] - 1) / (count - 1)) for i in range(count)})
