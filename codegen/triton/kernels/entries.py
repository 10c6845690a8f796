"""Entry points of templates: a function of the launch's name that calls a shared one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ....ir.node import Node
from ..source import Constexpr, Launch, Scalar


@dataclass(frozen=True, slots=True)
class Entry:
    """A launch, and the text of its function: a call of a shared one with constants filled in."""

    launch: Launch
    text: str


def entry_of(
    launch: Launch,
    inner: str,
    sizes: Sequence[Scalar],
    constants: Mapping[str, Constexpr | None],
    decorator: str = "triton.jit",
) -> Entry:
    """A function of the launch's name that calls ``inner``: sizes that are known stand in its text,
    where Triton folds them, and the others become arguments of the launch. ``decorator`` is that of
    ``inner``.
    """
    arguments = (*launch.arguments, *(s for s in sizes if not isinstance(s.value, int)))
    passed = {name: repr(value) for name, value in constants.items()}
    passed |= {size.name: str(size.value) for size in sizes}
    passed |= {argument.name: argument.name for argument in arguments}
    passed |= {name: name for name in launch.constexprs}
    parameters = [argument.name for argument in arguments]
    parameters += [f"{name}: tl.constexpr" for name in launch.constexprs]
    call_lines = "".join(f"        {name}={text},\n" for name, text in passed.items())
    text = f"\n\n@{decorator}\ndef {launch.function}({', '.join(parameters)}):\n"
    text += f"    {inner}(\n{call_lines}    )\n"
    return Entry(replace(launch, arguments=arguments), text)


def described(node: Node, names: Sequence[str | None]) -> str:
    """The types of a node's operands and of its result, for readers of the kernel's text."""
    pairs = zip(names, node.args, strict=True)
    lines = [f"# {name}: {arg.type}\n" for name, arg in pairs if arg is not None]
    return "".join(["\n", *lines, f"# out: {node.type}\n"])
