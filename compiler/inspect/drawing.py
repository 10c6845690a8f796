"""The final graph as data to draw: blocks, nodes with places and facts, edges. No markup."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ...ir.graph import Graph, input_name
from ...ir.node import Node
from ...ir.printer import print_attr, print_graph, value_names
from ...ir.schema import schema
from ...runtime.image import EngineImage
from ...targets import Target
from .facts import CallCost, Setting, bindings, call_costs, op_label
from .layers import HIDDEN, Block, split_layers
from .layout import lay_out

LETTER, PADDING, LEAST = 7.2, 30.0, 84.0  # widths of a node's text, in the drawing's units
_CLASSES = {
    "matmul": ("linear", "matmul", "conv", "moe_experts"),
    "attention": ("attention", "paged_attention", "scaled_paged_attention", "slot_attention"),
    "norm": ("rms_norm", "layer_norm", "softmax", "rope", "gated"),
    "cache": ("kv_write", "append_kv", "scaled_append_kv"),
    "move": (
        *("embedding", "gather", "index_select", "reshape", "slice", "concat", "permute"),
        *("expand", "pad", "flip", "cast"),
    ),
    "fused": ("fused",),
    "aten": ("aten", "cond", "while"),
}
_CLASS_OF = {op: name for name, ops in _CLASSES.items() for op in ops}


def op_class(op: str) -> str:
    """What kind of work an op is, for its colour; "math" for all that is not in the table."""
    return _CLASS_OF.get(op, "math")


@dataclass(slots=True)
class _Scene:
    graph: Graph
    names: Mapping[Node, str]
    costs: Mapping[str, Mapping[Node, CallCost]]
    blocks: list[dict[str, object]] = field(default_factory=list)


def draw_graph(
    graph: Graph, image: EngineImage, settings: Sequence[Setting]
) -> list[dict[str, object]]:
    """Each block with ``title``, ``repeat``, ``width``, ``height``, ``nodes`` and ``edges``."""
    names, target = value_names(graph), Target.parse(image.target)
    costs = {
        setting.name: {
            cost.node: cost
            for cost in call_costs(graph, target, bindings(graph, image, setting), names)
        }
        for setting in settings
    }
    scene = _Scene(graph, names, costs)
    return [_draw(block, scene) for block in split_layers(graph)]


def _draw(block: Block, scene: _Scene) -> dict[str, object]:
    members = {node: index for index, node in enumerate(block.nodes)}
    ports: dict[Node, str] = {}
    edges: dict[tuple[Hashable, Hashable], None] = {}
    for node in block.nodes:
        for operand in node.operands:
            source = operand.operands[0] if operand.op == "item" else operand
            if source in members:
                edges[source, node] = None
            elif _is_shown(source):
                ports[source] = _port_label(source, scene)
                edges[("in", source), node] = None
    outputs = _outputs(block, scene.graph)
    edges |= {(node, ("out", name)): None for name, node in outputs.items()}
    order: list[Hashable] = [("in", s) for s in ports]
    order += [*block.nodes, *(("out", name) for name in outputs)]
    labels: dict[Hashable, str] = {("in", s): label for s, label in ports.items()}
    labels |= {node: op_label(node).removeprefix("fused ") for node in block.nodes}
    labels |= {("out", name): name for name in outputs}
    widths = {key: max(LEAST, LETTER * len(_widest(key, labels)) + PADDING) for key in order}
    layout = lay_out(order, list(edges), widths)
    number = {key: index for index, key in enumerate(order)}
    drawn = []
    for key in order:
        x, y = layout.places[key]
        one = {"x": round(x, 1), "y": round(y, 1), "w": round(widths[key], 1), "label": labels[key]}
        drawn.append({**one, **(_facts(key, scene) if isinstance(key, Node) else {"cls": "port"})})
    return {
        "title": block.title,
        "repeat": block.repeat,
        "width": round(layout.width, 1),
        "height": round(layout.height, 1),
        "nodes": drawn,
        "edges": [
            [number[a], number[b], [[round(x, 1), round(y, 1)] for x, y in points]]
            for a, b, points in layout.edges
        ],
    }


def _widest(key: Hashable, labels: Mapping[Hashable, str]) -> str:
    second = _short_type(key) if isinstance(key, Node) else ""
    # The second line is set smaller than the first.
    return max(labels[key], second[: int(len(second) * 0.87)], key=len)


def _short_type(node: Node) -> str:
    """The first result's type, and how many others there are."""
    more = len(node.types) - 1
    return f"{node.types[0]} +{more}" if more else str(node.types[0])


def _is_shown(source: Node) -> bool:
    """Values of other blocks and the caches; not weights, nor what only says where tokens lie."""
    if source.op == "input":
        return source.type.rank > 1 and source.dtype.is_float or input_name(source) == "token_ids"
    return source.op not in HIDDEN


def _port_label(source: Node, scene: _Scene) -> str:
    name = input_name(source) if source.op == "input" else scene.names[source]
    return f"{name}  {source.types[0]}"


def _outputs(block: Block, graph: Graph) -> dict[str, Node]:
    """The graph's outputs that the block makes; state is written in place, and not shown."""
    members = set(block.nodes)
    state = set(graph.state)
    found = {}
    for name, node in zip(graph.output_names, graph.outputs, strict=True):
        source = node.operands[0] if node.op == "item" else node
        if source in members and name not in state:
            found[name] = source
    return found


def _facts(node: Node, scene: _Scene) -> dict[str, object]:
    bodies = [value for _, value in node.attrs if isinstance(value, Graph)]
    return {
        "cls": op_class(node.op),
        "name": scene.names[node],
        "type": ", ".join(map(str, node.types)),
        "short": _short_type(node),
        "attrs": [[name, print_attr(value)] for name, value in node.attrs],
        "operands": [
            [label, _operand_text(arg, scene)]
            for label, arg in zip(_operand_names(node), node.args, strict=False)
        ],
        "body": "\n".join(print_graph(body) for body in bodies),
        "cost": {
            name: [costs[node].flops, costs[node].bytes, costs[node].seconds]
            for name, costs in scene.costs.items()
        },
    }


def _operand_names(node: Node) -> list[str]:
    declared = [name.strip("*?") for name in schema(node.op).operands] or [""]
    return [declared[min(i, len(declared) - 1)] for i in range(len(node.args))]


def _operand_text(arg: Node | None, scene: _Scene) -> str:
    if arg is None:
        return "None"
    if arg.op == "const":
        return print_attr(arg.attr("value"))
    if arg.op == "param":
        return f"{arg.attr('name')}  {arg.type}"
    return f"{scene.names[arg]}  {arg.types[0]}"
