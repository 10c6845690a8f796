"""What the verbs of ``tilewright tune`` share: options, and the problems of what the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .options import compile_in_memory, is_engine

if TYPE_CHECKING:
    from ...codegen.triton.tuning.tunable import KernelTunable
    from ...runtime.image import EngineImage

OnlyOption = Annotated[
    str | None,
    typer.Option(
        help="Templates: linear_gemv (one token), linear_gemm (several), paged_decode, "
        "paged_attention (prefill), attention (of modules), expert_rows (few tokens), "
        "expert_groups, rows (norms), elementwise, wide_linear (products of many tokens); over "
        "codes quant_linear_gemv, quant_linear_gemm, scaled_decode, scaled_attention; "
        "and of the whole model decode_step (one launch or several) and backend."
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        help="Where the searches are kept, for several processes or for later: a journal file, a "
        "database URL, or grpc://host:port."
    ),
]


def image_of(
    engine: str,
    *,
    target: str = "auto",
    backend: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    random_weights: int | None = None,
    tune: str = "none",
) -> EngineImage:
    """The engine of a folder; of a model, compiled in memory, by default with untuned kernels.

    Raises:
        UsageError: a scheme beside an engine, whose weights are what they are.
    """
    if is_engine(engine):
        if quantize is not None:
            raise UsageError(
                f"option --quantize {quantize}",
                expected="a model, which is quantized as it is compiled",
                found=f"the engine {engine}",
                remedy="Leave it out, or name the model instead.",
            )
        from ...runtime.folder import load_image

        return load_image(engine)
    return compile_in_memory(
        engine,
        target=target,
        backend=backend,
        kv_cache="auto",
        dtype=dtype,
        quantize=quantize,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify="structure",
        trust_remote_code=False,
        random_weights=random_weights,
        deterministic=False,
        memory_fraction=0.9,
        tune=tune,
    )


def chosen(problems: Sequence[KernelTunable], only: str | None) -> list[KernelTunable]:
    """The problems of the templates that ``only`` names: all for None, none for "".

    Raises:
        UsageError: a template that no problem is of.
    """
    if only is None:
        return list(problems)
    if only == "":
        return []
    names = [name.strip() for name in only.split(",")]
    there = sorted({tunable.template.name for tunable in problems})
    if unknown := sorted(set(names) - set(there)):
        raise UsageError(
            f"option --only {unknown[0]}",
            expected=f"some of {', '.join(there)}",
            found=unknown[0],
            remedy="Name templates that this model's kernels come from.",
        )
    return [tunable for tunable in problems if tunable.template.name in names]
