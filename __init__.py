"""Tilewright compiles PyTorch transformers into tuned inference engines.

Names are resolved on first use (PEP 562), so that `import tilewright` loads neither torch nor
transformers, and a process that only loads a saved engine never imports the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors

if TYPE_CHECKING:
    from .autotune.effort import TuneConfig
    from .compiler.api import compile
    from .compiler.emit import export_onnx
    from .compiler.emit_tensorrt import export_tensorrt
    from .compiler.options import KVCacheConfig
    from .passes.heads.config import GQA
    from .passes.schemes.config import QuantConfig
    from .runtime.base_engine import Engine
    from .runtime.beams import BeamCompletion
    from .runtime.engine import load
    from .runtime.output import Completion
    from .runtime.params import SamplingParams
    from .runtime.structured import StructuredOutputsParams
    from .serving.programs import assistant, gen, program, select, system, user
    from .targets import Target

__version__ = "0.1.0"

_HOME = {  # public name → the module that defines it
    "compile": ".compiler.api",
    "export_onnx": ".compiler.emit",
    "export_tensorrt": ".compiler.emit_tensorrt",
    "KVCacheConfig": ".compiler.options",
    "GQA": ".passes.heads.config",
    "QuantConfig": ".passes.schemes.config",
    "Engine": ".runtime.base_engine",
    "BeamCompletion": ".runtime.beams",
    "load": ".runtime.engine",
    "Completion": ".runtime.output",
    "SamplingParams": ".runtime.params",
    "StructuredOutputsParams": ".runtime.structured",
    "assistant": ".serving.programs",
    "gen": ".serving.programs",
    "program": ".serving.programs",
    "select": ".serving.programs",
    "system": ".serving.programs",
    "user": ".serving.programs",
    "Target": ".targets",
    "TuneConfig": ".autotune.effort",
}

__all__ = [
    "GQA",
    "BeamCompletion",
    "Completion",
    "Engine",
    "KVCacheConfig",
    "QuantConfig",
    "SamplingParams",
    "StructuredOutputsParams",
    "Target",
    "TuneConfig",
    "__version__",
    "assistant",
    "compile",
    "errors",
    "export_onnx",
    "export_tensorrt",
    "gen",
    "load",
    "program",
    "select",
    "system",
    "user",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use, and keep it.

    Raises:
        AttributeError: no public name of the package is spelled so.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not yet imported too."""
    return sorted({*globals(), *__all__})
