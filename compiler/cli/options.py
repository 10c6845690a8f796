"""Options that several verbs share, and engines from what the user names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from .console import progress

if TYPE_CHECKING:
    from ...passes.heads import GQA
    from ...passes.schemes import QuantConfig
    from ...runtime.base_engine import Engine
    from ...runtime.engine import CausalLMEngine
    from ...runtime.image import EngineImage
    from ..options import CompileOptions
    from ..registered import Chosen

MODEL_HELP = (
    "A Hugging Face folder (config.json + safetensors), a .gguf or .onnx file, or a name of "
    "`tilewright models`."
)
ENGINE_HELP = (
    "An engine folder, or a model (folder, .gguf, or a name of `tilewright models`), which is "
    "compiled first if it was not before."
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
EngineOrModel = Annotated[str, typer.Argument(help=ENGINE_HELP, show_default=False)]
TargetOption = Annotated[str, typer.Option(help="Device: auto, or a name of `tilewright targets`.")]
BackendOption = Annotated[str, typer.Option(help="auto, triton, onnxruntime, tensorrt or eager.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="Quantize the linears: int8-weight, int8, fp8, fp8-tensor, fp8-block, fp8-weight or "
        "int4; stored or expanded for what MODEL has in codes. `tilewright quantize` has more "
        "options.",
        show_default=False,
    ),
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        metavar="mqa|gqa:GROUPS",
        help="Convert the model to so many KV heads (mqa: one); the report says what that cost.",
        show_default=False,
    ),
]
CacheOption = Annotated[str, typer.Option("--kv-cache", help="auto, paged or static.")]
CacheDtypeOption = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype", help="What a paged KV cache holds: auto (as the model), fp8 or int8."
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Let each token see so many, and the first ones: text without end in constant memory.",
        show_default=False,
    ),
]
SinksOption = Annotated[int, typer.Option(help="First tokens that are seen beside a window.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
ContextOption = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; by default the model's, up to 8192.")
]
BatchOption = Annotated[int | None, typer.Option(help="Most sequences at once; by default 8.")]
VerifyOption = Annotated[
    str, typer.Option(help="How passes are checked: off, structure, sample or full.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="embed copies the weights into the engine; reference leaves them in MODEL's files, "
        "which must then stay as they are."
    ),
]
RandomOption = Annotated[
    int | None,
    typer.Option(
        metavar="SEED",
        help="Draw the weights from this seed, to measure a shape that only config.json gives.",
        show_default=False,
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="The same tokens alone and in any batch, to the bit; slower."
    ),
]
MemoryOption = Annotated[
    float,
    typer.Option(
        "--memory-fraction", help="Share of the GPU's memory for weights, KV cache and steps."
    ),
]
TuneOption = Annotated[
    str,
    typer.Option(
        help="none, cached (what is known of kernels and backends), quick or full: measure first."
    ),
]
DecodeOption = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        help="How decode steps run: auto (as measured), kernels, or persistent: one launch each, "
        "of one sequence (persistent:8: of up to 8).",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Where the weights are that ENGINE refers to, if they have been moved.",
        show_default=False,
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write a trace of requests and steps, for ui.perfetto.dev.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


def is_engine(path: str) -> bool:
    """Whether a path is an engine folder, by its manifest."""
    return (Path(path) / "manifest.json").is_file()


def open_engine(
    path: str,
    *,
    backend: str = "auto",
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    checkpoint: Path | None = None,
    window: int | None = None,
    sinks: int = 4,
) -> Engine:
    """Loads an engine folder, or compiles a model in memory, with a progress bar.

    Raises:
        UsageError: compile options beside an engine, which is compiled already.
        TilewrightError: whatever is wrong with the engine or the model.
    """
    from ...runtime.engine import start

    image = open_image(
        path,
        backend,
        max_model_len,
        max_batch_size,
        checkpoint=checkpoint,
        window=window,
        sinks=sinks,
    )
    with progress(f"start {Path(path).name}") as advance:
        advance("loading weights", 0.0)
        return start(image)


def open_image(
    path: str,
    backend: str = "auto",
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    verify: str = "structure",
    checkpoint: Path | None = None,
    window: int | None = None,
    sinks: int = 4,
) -> EngineImage:
    """As ``open_engine``, not yet started."""
    if is_engine(path):
        _refuse_options(path, backend, max_model_len, window)
        from ...runtime.folder import load_image

        with progress(f"load {Path(path).name}") as advance:
            advance("checking hashes", 0.0)
            return load_image(path, checkpoint)
    if checkpoint is not None:
        raise UsageError(
            f"option --checkpoint {checkpoint}",
            expected="an engine folder that refers to a checkpoint",
            found=f"the model {path}",
            remedy="Leave it out.",
        )
    return compile_in_memory(
        path,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify=verify,
        window=window,
        sinks=sinks,
        keep=True,
    )


def open_causal_lm(
    path: str,
    *,
    backend: str = "auto",
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    checkpoint: Path | None = None,
    window: int | None = None,
    sinks: int = 4,
) -> CausalLMEngine:
    """As ``open_engine``, for verbs that generate; UsageError for an engine of a plain module."""
    from ...runtime.engine import CausalLMEngine

    engine = open_engine(
        path,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        checkpoint=checkpoint,
        window=window,
        sinks=sinks,
    )
    if not isinstance(engine, CausalLMEngine):
        raise UsageError(
            path,
            expected="an engine of a causal language model",
            found="an engine of a plain module, which generates nothing",
            remedy="Call it from Python: tilewright.load(path)(*inputs).",
        )
    return engine


def compile_in_memory(
    path: str,
    *,
    target: str = "auto",
    backend: str = "auto",
    kv_cache: str = "auto",
    kv_cache_dtype: str = "auto",
    window: int | None = None,
    sinks: int = 4,
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    verify: str = "sample",
    trust_remote_code: bool = False,
    random_weights: int | None = None,
    deterministic: bool = False,
    memory_fraction: float = 0.9,
    tune: str = "cached",
    quantize: str | QuantConfig | None = None,
    attention: str | GQA | None = None,
    strict: bool = False,
    decode: str = "auto",
    keep: bool = False,
) -> EngineImage:
    """Compiles a model, with a progress bar.

    Args:
        path: of the model, or its name in the registry, which may say more of the options.
        keep: whether the engine is kept under TILEWRIGHT_CACHE, and taken from there if it can be.
        target, …: as `tilewright.compile` takes them.
    """
    from ..options import KVCacheConfig

    chosen, options = resolve_model(
        path,
        target=target,
        backend=backend,
        kv_cache=KVCacheConfig(kv_cache, dtype=kv_cache_dtype, window=window, sinks=sinks),  # type: ignore[arg-type]
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify=verify,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        deterministic=deterministic,
        memory_fraction=memory_fraction,
        tune=tune,
        quantize=quantize,
        attention=attention,
        strict=strict,
        decode=decode,
    )
    from ..engine_cache import cached_engine, engine_key, keep_engine

    key = engine_key(chosen.path, options) if keep else None
    with progress(f"compile {Path(chosen.path).name}") as advance:
        advance("looking for an engine", 0.0)
        if (image := cached_engine(key, chosen.path)) is not None:
            return image
        from ..api import Phases, compile_image

        image = compile_image(chosen.path, None, None, options, Phases(advance))
        keep_engine(key, image)
        return image


def resolve_model(
    path: str,
    *,
    quantize: str | QuantConfig | None,
    max_model_len: int | None,
    **options: Any,
) -> tuple[Chosen, CompileOptions]:
    """A model and how it is compiled: its registry may say more of what is not given.

    Args:
        path: of the model, or its name in the registry.
        quantize, max_model_len, options: as `options.resolve_options` takes them.
    """
    from ..options import resolve_options

    chosen = check_model(path)
    if chosen.manifest is not None:
        quantize = quantize or chosen.manifest.quantize
        length = chosen.manifest.preset.parameters.get("num_ctx")
        max_model_len = max_model_len or length
    return chosen, resolve_options(quantize=quantize, max_model_len=max_model_len, **options)


def check_place(output: Path, mark: str = "manifest.json", kind: str = "an engine") -> None:
    """Refuses a place that cannot be written before minutes of work, not after them.

    Args:
        output: the folder to make.
        mark: the file by which a folder that is there may be replaced.
        kind: what it then is, for the message.

    Raises:
        UsageError: a folder with other files in it, a file, or no parent folder.
    """
    parent = output.absolute().parent
    if output.is_dir() and any(output.iterdir()) and not (output / mark).exists():
        raise UsageError(
            f"output {output}",
            expected=f"a new folder, an empty one, or {kind} to replace",
            found="a folder with other files in it",
            remedy="Choose another folder.",
        )
    if output.is_file() or not parent.is_dir():
        raise UsageError(
            f"output {output}",
            expected="a folder to make or replace, within one that exists",
            found="a file" if output.is_file() else f"no folder {parent}",
            remedy="Choose another place, or make its parent folder first.",
        )


def check_model(path: str) -> Chosen:
    """What a path or a name of the registry stands for; UsageError where there is nothing."""
    from ..registered import choose

    return choose(path)


def _refuse_options(path: str, backend: str, max_model_len: int | None, window: int | None) -> None:
    if backend != "auto" or max_model_len is not None or window is not None:
        raise UsageError(
            path,
            expected="no compile options (--backend, --max-model-len, --window) beside an engine",
            found="an engine folder, which is compiled already",
            remedy="Leave them out, or name the model instead.",
        )


def traced(engine: CausalLMEngine, trace: Path | None) -> AbstractContextManager[object]:
    """A block whose requests and steps are traced to a file, if there is to be one."""
    return nullcontext() if trace is None else engine.trace(trace)


def check_places(files: Mapping[str, Path | None]) -> None:
    """Refuses files that cannot be written before minutes of work, not after them.

    Args:
        files: by the name of their option; None where it was not given.

    Raises:
        UsageError: a folder, or a file in a folder that does not exist.
    """
    for option, path in files.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(
                f"option --{option} {path}",
                expected="a file to write, in a folder that exists",
                found="a folder" if path.is_dir() else f"no folder {path.absolute().parent}",
                remedy="Choose another place, or make the folder first.",
            )
