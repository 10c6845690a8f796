"""``tilewright compile --emit``: a model for other runtimes, in place of an engine folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .console import note, out, print_json, progress
from .options import check_model, check_place

FORMS = ("onnx", "tensorrt")
_UNREAD: Mapping[str, tuple[object, ...]] = {
    "target": ("auto", "cpu"),
    "backend": ("auto", "onnxruntime"),
    "kv_cache": ("auto", "static"),
    "kv_cache_dtype": ("auto",),
    "max_batch_size": (None,),
    "weights": ("embed",),
    "deterministic": (False,),
    "memory_fraction": (0.9,),
    "tune": ("cached", "none"),
    "decode": ("auto", "kernels"),
    "window": (None,),
    "sinks": (4,),
}
"""Options of engines, and the values that say nothing else than a model for other runtimes has."""
_READ = {"onnx": frozenset[str](), "tensorrt": frozenset({"target", "max_batch_size"})}
"""Those of them that a form has after all."""
_HAS = {
    "onnx": "caches of a length that the caller picks, and no kernels",
    "tensorrt": "slots as caches, and kernels of TensorRT's own",
}


def check_emission(
    form: str | None, flavor: str | None, strict: bool, output: Path, given: Mapping[str, object]
) -> None:
    """Refuses what cannot be emitted, before any work.

    Args:
        form: of ``--emit``, None where only ``--flavor`` was given.
        flavor: of ``--flavor``, None where it was not given.
        strict: whether ``--strict`` was given.
        output: the folder to write.
        given: the options of engines, by their name.

    Raises:
        UsageError: an unknown form, an option that the form has not, or a place with other files.
    """
    if flavor is not None and form != "onnx":
        raise UsageError(
            "option --flavor",
            expected="--emit onnx beside it",
            found=f"--emit {form}" if form else "no --emit",
            remedy="Add --emit onnx, or leave --flavor out.",
        )
    if strict and form == "onnx":
        raise UsageError(
            "option --strict",
            expected="an engine, or --emit tensorrt beside it",
            found="--emit onnx, which refuses what has no form anyway",
            remedy="Leave --strict out.",
        )
    if form not in FORMS:
        raise UsageError(
            "option --emit",
            expected=f"one of {', '.join(FORMS)}",
            found=repr(form),
            remedy="Choose one of those, or leave it out to write an engine.",
        )
    for name, value in given.items():
        if name not in _READ[form] and value not in _UNREAD[name]:
            raise UsageError(
                f"option --{name.replace('_', '-')}",
                expected=f"nothing beside --emit {form}, which has {_HAS[form]}",
                found=str(value),
                remedy="Leave it out.",
            )
    from ..emit import GENERATION

    check_place(output, GENERATION, "an emitted model")


def emit_model(
    model: str, output: Path, flavor: str, options: Mapping[str, Any], as_json: bool
) -> None:
    """Writes MODEL as ONNX, and says what was written; ``options`` are those of ``export_onnx``."""
    from ..emit import export_onnx

    model = check_model(model).path
    with progress(f"emit {Path(model).name}") as advance:
        emitted = export_onnx(model, output, flavor=flavor, progress=advance, **options)
    if as_json:
        print_json(
            {
                "emitted": str(output),
                "flavor": emitted.flavor,
                "nodes": emitted.nodes,
                "weight_bytes": emitted.weight_bytes,
                "largest_error": emitted.largest_error,
                "notes": list(emitted.notes),
            }
        )
        return
    for line in emitted.notes:
        note(line)
    checked = "not compared"
    if emitted.largest_error is not None:
        checked = f"largest error {emitted.largest_error:.1e} in onnxruntime"
    out().print(
        f"ONNX model written to {output}: {emitted.nodes} nodes, "
        f"{emitted.weight_bytes / 1e6:.1f} MB of weights, flavor {emitted.flavor}, {checked}",
        markup=False,
    )


def emit_engine(model: str, output: Path, options: Mapping[str, Any], as_json: bool) -> None:
    """Writes MODEL as a TensorRT engine, and says what was written; ``options`` are those of
    ``export_tensorrt``.
    """
    from ..emit_tensorrt import export_tensorrt

    model = check_model(model).path
    with progress(f"emit {Path(model).name}") as advance:
        emitted = export_tensorrt(model, output, progress=advance, **options)
    if as_json:
        facts = asdict(emitted)
        print_json({"emitted": str(facts.pop("path")), **facts})
        return
    for line in emitted.notes:
        note(line)
    attention = "fused" if emitted.fused else "in parts"
    checked = "numbers not compared"
    if emitted.largest_error is not None:
        checked = f"largest error of its network {emitted.largest_error:.1e}"
    out().print(
        f"TensorRT engine written to {output}: {emitted.layers} layers, "
        f"{emitted.engine_bytes / 1e6:.1f} MB for {', '.join(emitted.targets)}, attention "
        f"{attention}, built by {emitted.flavor} in {emitted.seconds:.1f} s, {checked}",
        markup=False,
    )
