"""Runs a region's model: weights by reference, caches in place, small inputs in kept buffers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch

from ...errors import EngineError, UsageError
from ...ir.dims import Size, evaluate
from ...settings import current
from .model import EXTERNAL_FILE, names_read
from .providers import check_taken, providers_on

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

# Below this a tensor is written into the model: ONNX Runtime's optimisers read small constants.
INLINE_BYTES = 1024
# Ops whose weights no optimiser reads before the session is ready, so that they can be shared.
_SHARING = frozenset(
    {
        "Gather",
        "Gemm",
        "GroupQueryAttention",
        "LayerNormalization",
        "MatMul",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_HOST = torch.device("cpu")
_HALVES = (torch.float16, torch.bfloat16)
# Inputs up to this size are copied into buffers that stay bound; larger are bound where they lie.
COPY_BYTES = 1 << 20
_KEPT_BINDINGS = 16


def open_session(
    model: bytes, weights: Mapping[str, torch.Tensor], device: torch.device = _HOST
) -> ort.InferenceSession:
    """A session on ``device`` of a model whose external tensors are ``weights``, by ONNX name.

    Those of matmuls, lookups and norms share their memory with the session, which makes copies of
    its own of what it prepacks; the others are copied. ``weights`` lie in the host's memory.

    Raises:
        EngineError: ONNX Runtime does not open it, or has no provider for the device.
    """
    import onnx
    import onnxruntime as ort

    proto = onnx.ModelProto.FromString(model)
    inline = {name for name, tensor in weights.items() if tensor.nbytes <= INLINE_BYTES}
    copied = names_read(node for node in proto.graph.node if node.op_type not in _SHARING)
    # Half precision is widened before the session is ready, where it has no kernels.
    copied |= {name for name, tensor in weights.items() if tensor.dtype in _HALVES}
    values = {
        name: ort.OrtValue.from_dlpack(tensor.detach().contiguous())
        for name, tensor in weights.items()
        if name not in inline
    }
    options = _options()
    for name in values.keys() - copied:
        options.add_initializer(name, values[name])
    rest = sorted(values.keys() & copied)
    options.add_external_initializers(rest, [values[name] for name in rest])
    with tempfile.TemporaryDirectory() as folder:
        # The file that the model names has to exist, though nothing is read from it.
        (Path(folder) / EXTERNAL_FILE).touch()
        folder_option = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder_option, folder)
        _write_inline(proto, {name: weights[name] for name in inline})
        session = _open(proto.SerializeToString(), options, device)
    session.tilewright_weights = values  # they live as long as the session
    return session


def _open(model: bytes, options: ort.SessionOptions, device: torch.device) -> ort.InferenceSession:
    import onnxruntime as ort

    providers = providers_on(device)
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # its exceptions derive from nothing closer
        raise EngineError(
            "the engine's ONNX model",
            expected=f"one that onnxruntime {ort.__version__} opens",
            found=str(error).splitlines()[0],
            remedy="Compile the model again with this version, or with backend='eager'.",
        ) from error
    check_taken(session, device)
    return session


def _options() -> ort.SessionOptions:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = current().threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    return options


def _write_inline(proto: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> None:
    """Turns external tensors into ones that the model holds itself."""
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            del tensor.external_data[:]
            tensor.data_location = 0  # DEFAULT: within the model
            tensor.raw_data = _bytes(weights[tensor.name])


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class RegionKernel:
    """A loaded region.

    Results are fresh tensors, but for those in an operand's memory, which are that operand.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        result_types: Sequence[tuple[torch.dtype, tuple[Size, ...]]],
        aliases: Sequence[tuple[int, int]],
        device: torch.device = _HOST,
    ) -> None:
        import onnxruntime as ort

        self.session, self.result_types = session, result_types
        self.aliases = dict(aliases)
        self.in_place = frozenset(self.aliases.values())
        self.inputs = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]
        self.place = device
        self.device = ort.OrtDevice.make(device.type, device.index or 0)._get_c_device()
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = 4
        self.bindings: dict[tuple[object, ...], _Binding] = {}
        self.lock = Lock()  # a binding's buffers hold the operands of one run

    def __call__(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        with self.lock:
            return self._run(operands, sizes)

    def _run(
        self, operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Sequence[torch.Tensor]:
        tensors = [t if t.is_contiguous() else t.contiguous() for t in operands if t is not None]
        key = tuple(t.data_ptr() if i in self.in_place else t.shape for i, t in enumerate(tensors))
        binding = self.bindings.get(key)
        if binding is None:
            if len(self.bindings) >= _KEPT_BINDINGS:
                self.bindings.pop(next(iter(self.bindings)))
            binding = self.bindings[key] = _Binding(self, tensors, sizes)
        results = binding.run(self, tensors)
        for index, operand in self.aliases.items():
            given = operands[operand]
            assert given is not None
            if given is not tensors[operand]:
                given.copy_(tensors[operand])
            results[index] = given
        return results


class _Binding:
    """The session's operands and results bound for one set of shapes and cache pointers."""

    def __init__(
        self, kernel: RegionKernel, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]
    ) -> None:
        self.io = kernel.session.io_binding()._iobinding
        self.device = kernel.device
        self.buffers: list[tuple[int, torch.Tensor]] = []
        self.moving: list[int] = []
        for index, tensor in enumerate(tensors):
            if index in kernel.in_place:
                self._bind_input(kernel.inputs[index], tensor)
            elif tensor.nbytes <= COPY_BYTES:
                buffer = torch.empty_like(tensor)
                self._bind_input(kernel.inputs[index], buffer)
                self.buffers.append((index, buffer))
            else:
                self.moving.append(index)
        self.fresh: list[tuple[int, str, torch.dtype, list[int]]] = []
        for index, (name, (dtype, shape)) in enumerate(
            zip(kernel.outputs, kernel.result_types, strict=True)
        ):
            operand = kernel.aliases.get(index)
            if operand is not None:
                self._bind_output(name, tensors[operand])
            else:
                self.fresh.append((index, name, dtype, [evaluate(s, sizes) for s in shape]))

    def run(self, kernel: RegionKernel, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for index, buffer in self.buffers:
            buffer.copy_(tensors[index])
        for index in self.moving:
            self._bind_input(kernel.inputs[index], tensors[index])
        results = [_NONE] * len(kernel.outputs)
        for index, name, dtype, shape in self.fresh:
            results[index] = torch.empty(shape, dtype=dtype, device=kernel.place)
            self._bind_output(name, results[index])
        if kernel.place.type == "cuda":  # ONNX Runtime has a stream of its own, and waits for it
            torch.cuda.current_stream(kernel.place).synchronize()
        try:
            kernel.session._sess.run_with_iobinding(self.io, kernel.run_options)
        except RuntimeError as error:
            raise _refused(error) from error
        return results

    def _bind_input(self, name: str, tensor: torch.Tensor) -> None:
        pointer, shape = _memory(tensor)
        self.io.bind_input(name, self.device, _ONNX_TYPES[tensor.dtype], shape, pointer)

    def _bind_output(self, name: str, tensor: torch.Tensor) -> None:
        pointer, shape = _memory(tensor)
        self.io.bind_output(name, self.device, _ONNX_TYPES[tensor.dtype], shape, pointer)


def _refused(error: RuntimeError) -> UsageError:
    return UsageError(
        "inputs",
        expected="values that every op of the model takes, such as ids within their table",
        found=f"onnxruntime says: {error}",
        remedy="Check the values; backend='eager' runs the same graph op by op with torch.",
    )


_NONE = torch.empty(0)
# An empty tensor has no memory; ONNX Runtime wants some address all the same.
_SOMEWHERE = torch.empty(64, dtype=torch.uint8)


def _memory(tensor: torch.Tensor) -> tuple[int, list[int]]:
    return tensor.data_ptr() or _SOMEWHERE.data_ptr(), list(tensor.shape)


def _onnx_types() -> dict[torch.dtype, int]:
    from .emitter import ELEMENT_TYPES

    return {dtype.torch: int(number) for dtype, number in ELEMENT_TYPES.items()}


_ONNX_TYPES = _onnx_types()
