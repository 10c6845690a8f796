"""What becomes of a decode product before it is stored: the lines behind it in a kernel's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ....ir.node import Node
from ..generate_ops import TRITON_NAMES, elementwise, held, operand, rounded
from .linear_tiles import Problem
from .linear_views import Place


@dataclass(frozen=True, slots=True)
class Epilogue:
    """The lines from ``acc``, the product f32 [columns, tokens] of a program, to the store of
    ``out``.

    Attributes:
        problem: whose body it is.
        names: of the body's values.
    """

    problem: Problem
    names: Mapping[Node, str]

    def pointer(self, node: Node | None) -> str:
        """The parameter that points to an input of the body."""
        assert node is not None
        return f"{self.names[node]}ptr"

    def lines(self) -> list[str]:
        """The body's ops behind the product, each in its element type."""
        p, lines = self.problem, []
        if p.bias is not None:
            bias = f"tl.load({self.pointer(p.bias)} + weight_rows).to(tl.float32)[:, None]"
            lines.append(f"acc += {bias}")
        lines.append(f"acc = {rounded('acc', p.linear.dtype)}")
        if p.parts == 2:
            halves = "tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1))"
            lines.append(f"first, second = tl.split({halves})")
        result = "acc"
        for member in p.members:
            texts = [
                self._operand(member, position, arg, lines)
                for position, arg in enumerate(member.args)
                if arg is not None
            ]
            text = elementwise(member, texts)
            assert text is not None
            result = self.names[member]
            lines.append(f"{result} = {text}")
        lines.append(f"out = {result}.to({TRITON_NAMES[p.node.dtype]})")
        lines.append(f"tl.store(out_ptr + token.to(tl.int64) * {p.n} + column, out, mask=there)")
        return lines

    def _operand(self, member: Node, position: int, arg: Node, lines: list[str]) -> str:
        """A member's operand as a variable or literal; what lies in memory is loaded into one."""
        p = self.problem
        if arg.op == "const":
            return operand(member, arg)
        if arg.op == "slice" and p.linear in arg.operands:
            return "first" if arg.attr("start") == 0 else "second"
        if arg is p.linear:
            return "acc"
        if arg in p.members:
            return self.names[arg]
        name = f"{self.names[arg]}in"
        lines.append(f"{name} = {self._load(p.places[member, position])}")
        return name

    def _load(self, place: Place) -> str:
        address = f"{self.pointer(place.source)} + {place.offset}"
        masks = []
        if place.row != 0:
            address += f" + token.to(tl.int64) * {place.row}"
            masks.append("(token < tokens)")
        if place.column != 0:
            address += f" + column * {place.column}"
            masks.append(f"(column < {self.problem.n})")
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        return f"tl.load({address}{mask}).to({held(place.source.dtype)})"
