"""Captures Hugging Face causal LMs, from a model object or from a configuration alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import CaptureError
from .capture import capture_module
from .capture_clean import where
from .capture_types import Captured, Route
from .hf_config import max_positions
from .hf_hooks import INTERFACE, hooks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_EXAMPLE_LENGTH = 7
_UNLIMITED = 1 << 20
# the hooks are entries in transformers' global tables, so one capture at a time
_LOCK = threading.RLock()


class _LogitsOnly(nn.Module):
    """input_ids i64[1, S] → logits [1, S, V], without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits


def capture_causal_lm(model: PreTrainedModel) -> Captured:
    """Captures a causal LM as ``input_ids i64[1, S] -> logits [1, S, V]`` with S dynamic.

    The routes are tried in this order, and the notes say why an earlier one was not taken:

    * "hook": attention goes through transformers' attention interface to `tilewright::attention`;
    * "masks": the model's own arithmetic, where masks given to SDPA make `tilewright::attention`
      and masks added to scores make `tilewright::mask_scores`;
    * "plain": the model's own arithmetic, masks included.

    Mixtures of experts become `tilewright::moe_experts` in all of them. The model is left as it
    was.

    Args:
        model: any model whose output has `logits`; parameters real, fake or on the meta device.

    Raises:
        CaptureError: torch.export cannot follow the model.
    """
    notes: list[str] = []
    hookable = bool(model._can_set_attn_implementation())
    routes: tuple[Route, ...] = ("hook", "masks") if hookable else ("masks",)
    with _LOCK, _silence():
        for route in routes:
            try:
                captured = _capture(model, route)
            except CaptureError as error:
                if _depends_on_length(error):
                    raise _located(model, error) from error
                notes.append(f"route {route}: {error}")
                continue
            if _has_marks(captured):
                return replace(captured, notes=(*captured.notes, *notes))
            notes.append(f"route {route}: no attention was met")
        try:
            captured = _capture(model, "plain")
        except CaptureError as error:
            raise (_located(model, error) if _depends_on_length(error) else error) from error
        return replace(captured, notes=(*captured.notes, *notes))


def meta_causal_lm(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM of `config` with its parameters on the meta device and its buffers computed.

    Takes neither the memory nor the time to fill the weights.

    Raises:
        CaptureError: transformers has no causal LM for this configuration.
    """
    from transformers import AutoModelForCausalLM

    with meta_parameters(), _silence():
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise CaptureError(
                f"architecture {_architecture(config)}",
                expected="a causal LM that transformers can build from its configuration",
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                remedy="Use a model of an architecture that AutoModelForCausalLM knows.",
            ) from error
    return model.eval()


def _architecture(config: PreTrainedConfig) -> str:
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built inside get their parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    with _LOCK:
        nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _has_marks(captured: Captured) -> bool:
    marks = (torch.ops.tilewright.attention.default, torch.ops.tilewright.mask_scores.default)
    return any(node.target in marks for node in captured.graph_module.graph.nodes)


def _depends_on_length(error: CaptureError) -> bool:
    return any(sign in error.found for sign in ("Constraints violated", "Specializations"))


def _located(model: PreTrainedModel, error: CaptureError) -> CaptureError:
    """Names the first layer that makes the graph depend on the sequence length; `error` if unknown.

    That layer walks the tokens, and so has more nodes for 9 tokens than for 7, or it has a
    convolution over them.
    """
    convolutions = [name for name, part in model.named_modules() if isinstance(part, nn.Conv1d)]
    try:
        path = next(iter(convolutions), None) or _first_grown(model)
    except CaptureError as cause:  # of the static graph, so it is the nearer one
        return cause
    if path is None:
        return error
    return CaptureError(
        f"{type(model).__name__}: {path}",
        expected="tokens that mix in attention alone, whatever the sequence length",
        found="a recurrence or scan over the tokens",
        remedy="Give example_inputs={'input_ids': ids, 'use_cache': False} and kv_cache=None: it "
        "then compiles as a plain module for that length.",
    )


def _first_grown(model: PreTrainedModel) -> str | None:
    short, long = (_nodes_by_module(_capture(model, "plain", length)) for length in (7, 9))
    return next((path for path in long if long[path] != short[path]), None)


def _nodes_by_module(captured: Captured) -> Counter[str]:
    nodes = captured.graph_module.graph.nodes
    return Counter(
        _own_name(where(node).partition(" at ")[0]) for node in nodes if node.op == "call_function"
    )


def _capture(model: PreTrainedModel, route: Route, length: int | None = None) -> Captured:
    with ExitStack() as stack:
        stack.enter_context(hooks(route, _longest(model.config)))
        if route == "hook":
            stack.enter_context(_implementation(model, "attn", INTERFACE))
        elif model.config._attn_implementation not in ("sdpa", "eager"):
            stack.enter_context(_implementation(model, "attn", "eager"))
        if model._can_set_experts_implementation():
            stack.enter_context(_implementation(model, "experts", INTERFACE))
        stack.enter_context(_fake_parameters(model))
        ids = torch.zeros(1, length or _EXAMPLE_LENGTH, dtype=torch.int64, device=_device(model))
        size = length or torch.export.Dim("S", min=1, max=_longest(model.config))
        dynamic = {"input_ids": {1: size}}
        captured = capture_module(
            _LogitsOnly(model), {"input_ids": ids}, dynamic, name=type(model).__name__, route=route
        )
    return replace(
        captured,
        weight_of={node: _own_name(name) for node, name in captured.weight_of.items()},
        weights={_own_name(name): weight for name, weight in captured.weights.items()},
    )


def _device(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    return devices.pop() if devices else torch.device("cpu")


def _own_name(name: str) -> str:
    return name.removeprefix("model.")


def _longest(config: PreTrainedConfig) -> int:
    return max_positions(config) or _UNLIMITED


@contextmanager
def _implementation(model: PreTrainedModel, kind: str, name: str) -> Iterator[None]:
    """Sets ``config._{kind}_implementation`` of all (sub-)configurations, and sets them back."""
    field = f"_{kind}_implementation_internal"
    configs = {
        id(c): c for part in model.modules() for c in _configs(getattr(part, "config", None))
    }
    before = [(config, getattr(config, field, None)) for config in configs.values()]
    for config, _ in before:
        setattr(config, field, name)
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, field, value)


def _configs(config: object) -> Iterator[PreTrainedConfig]:
    if config is None or not hasattr(config, "sub_configs"):
        return
    yield config
    for name in config.sub_configs:
        yield from _configs(getattr(config, name, None))


@contextmanager
def _fake_parameters(model: nn.Module) -> Iterator[None]:
    """Stands fake CPU tensors in for meta parameters, which do not mix with real buffers."""
    meta = [
        (part, name, parameter)
        for part in model.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter.device.type == "meta"
    ]
    if not meta:
        yield
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    for part, name, parameter in meta:
        if id(parameter) not in fakes:
            with mode:
                fake = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype
                )
            fakes[id(parameter)] = nn.Parameter(fake, requires_grad=False)
        part._parameters[name] = fakes[id(parameter)]
    try:
        yield
    finally:
        for part, name, parameter in meta:
            part._parameters[name] = parameter


@contextmanager
def _silence() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
