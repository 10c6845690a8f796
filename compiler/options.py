"""What `compile` may be told, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, cast

import torch

from ..autotune.effort import TuneConfig, effort_of
from ..autotune.store import Store
from ..codegen.base import KVCacheKind, backend_names, get_backend
from ..errors import UnsupportedError, UsageError
from ..passes.driver import VerifyLevel
from ..passes.heads import GQA, resolve_heads
from ..passes.schemes import QuantConfig, resolve_config
from ..settings import current
from ..targets import Target

VERIFY_LEVELS = ("off", "structure", "sample", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_KINDS = ("auto", "paged", "static")
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """How keys and values are kept.

    Attributes:
        kind: "paged" (pages on demand), "static" (one slot of full length a sequence), or "auto":
            as the backend likes.
        page_size: tokens a page, 1 to 256.
    """

    kind: Literal["auto", "paged", "static"] = "auto"
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise wrong_option("kv_cache", self.kind, (*CACHE_KINDS, "None", "KVCacheConfig(…)"))
        if type(self.page_size) is not int or not 1 <= self.page_size <= 256:
            raise wrong_option("KVCacheConfig.page_size", self.page_size, ("1 … 256",))


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """The options of one compile, resolved.

    Attributes:
        target: device to compile for.
        backend: name of the backend.
        cache: form of the KV cache, None for a graph without one.
        cache_named: whether the user named a form, so that a model that cannot have one is an
            error.
        page_size: tokens a page.
        dtype: of the weights and activations, None for the model's own.
        max_model_len: longest sequence, None for the model's own limit (at most DEFAULT_CONTEXT).
        max_batch_size: most sequences at once.
        verify: how passes are checked.
        trust_remote_code: whether a model folder may bring Python code.
        random_weights: seed of the weights of a model folder that has none, None to read them.
        deterministic: whether a row's numbers depend on no other row.
        memory_fraction: of the device's memory that an engine may take.
        tune: what may be spent on measuring kernels.
        quantize: how linears are quantized, resolved; None for not at all.
        heads: how KV heads become fewer, resolved; None for not at all.
    """

    target: Target
    backend: str
    cache: KVCacheKind | None
    cache_named: bool
    page_size: int
    dtype: torch.dtype | None
    max_model_len: int | None
    max_batch_size: int
    verify: VerifyLevel
    trust_remote_code: bool
    random_weights: int | None = None
    deterministic: bool = False
    memory_fraction: float = 0.9
    tune: str | TuneConfig = "cached"
    quantize: QuantConfig | None = None
    heads: GQA | None = None

    @property
    def records(self) -> Store | None:
        """What is known of kernels; None where defaults are asked for, or one cut for all."""
        from .tuning import tuning_store

        return None if self.tune == "none" or self.deterministic else tuning_store()


def resolve_options(
    *,
    target: str | Target,
    backend: str,
    kv_cache: str | KVCacheConfig | None,
    dtype: str | torch.dtype,
    max_model_len: int | None,
    max_batch_size: int | None,
    verify: str,
    trust_remote_code: bool,
    random_weights: int | None = None,
    deterministic: bool = False,
    memory_fraction: float = 0.9,
    tune: str | TuneConfig = "cached",
    quantize: str | QuantConfig | None = None,
    attention: str | GQA | None = None,
) -> CompileOptions:
    """Checks the options that a user gave, and fills in what "auto" means here.

    Raises:
        UsageError: a value that is not valid; the message lists those that are.
        UnsupportedError: valid values that do not go together.
    """
    device = _target(target, backend)
    name = _backend(backend, device)
    level = cast(VerifyLevel, current().verify or verify)
    if level not in VERIFY_LEVELS:
        raise wrong_option("verify", verify, VERIFY_LEVELS)
    for option, value in (("max_model_len", max_model_len), ("max_batch_size", max_batch_size)):
        if value is not None and (type(value) is not int or value < 1):
            raise wrong_option(option, value, ("an integer of 1 or more",))
    if random_weights is not None and not _is_seed(random_weights):
        raise wrong_option("random_weights", random_weights, ("a seed from 0 to 2**63 - 1", "None"))
    if type(memory_fraction) not in (int, float) or not 0 < memory_fraction <= 1:
        raise wrong_option("memory_fraction", memory_fraction, ("a number above 0, at most 1",))
    if deterministic and not get_backend(name).own_kernels:
        raise UnsupportedError(
            f"deterministic=True with backend {name!r}",
            expected="a backend whose kernels are ours: triton",
            found=f"{name}, whose libraries choose another order of sums for other batches",
            remedy="Use backend='triton', or leave deterministic out.",
        )
    return CompileOptions(
        device,
        name,
        _cache(kv_cache, name),
        kv_cache not in (None, "auto", KVCacheConfig()),
        kv_cache.page_size if isinstance(kv_cache, KVCacheConfig) else 16,
        _dtype(dtype),
        max_model_len,
        max_batch_size or 8,
        level,
        trust_remote_code,
        random_weights,
        deterministic,
        float(memory_fraction),
        _tune(tune, device, name, deterministic),
        None if quantize is None else resolve_config(quantize, device),
        resolve_heads(attention),
    )


def _tune(
    tune: str | TuneConfig, target: Target, backend: str, deterministic: bool
) -> str | TuneConfig:
    """The option, where it can be had."""
    if not effort_of(tune).measures:
        return tune
    here = backend == "triton" and not target.is_cpu and Target.detect().arch == target.arch
    if not here or deterministic:
        raise UnsupportedError(
            f"tune={tune if isinstance(tune, str) else 'TuneConfig(…)'} for {target.name}",
            expected=f"the Triton backend, not deterministic, and a GPU of {target.sm} here",
            found=f"backend {backend!r} on {Target.detect().name}",
            remedy="Use tune='cached'; tune on such a machine, and merge its records here.",
        )
    return tune


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def wrong_option(name: str, found: object, valid: tuple[str, ...]) -> UsageError:
    """The error of an option with a value that does not exist."""
    return UsageError(
        f"option {name}",
        expected=f"one of {', '.join(valid)}",
        found=repr(found),
        remedy="Choose one of those.",
    )


def _target(target: str | Target, backend: str) -> Target:
    """The device to compile for; "auto" is this machine's, or its CPU for a backend of CPUs."""
    if isinstance(target, Target):
        return target
    if target != "auto":
        return Target.parse(target)
    here = Target.detect()
    return Target.parse("cpu") if backend == "onnxruntime" and not here.is_cpu else here


def _backend(backend: str, target: Target) -> str:
    """The backend to use: onnxruntime on CPUs, Triton on GPUs; eager runs on every device."""
    if backend == "auto":
        if target.is_cpu:
            return "onnxruntime"
        return "triton" if find_spec("triton") is not None else "eager"
    get_backend(backend)
    if backend == "onnxruntime" and not target.is_cpu:
        raise UnsupportedError(
            f"backend {backend!r} for target {target.name}",
            expected="a backend that runs on that device: triton or eager",
            found=f"{backend}, which runs on CPUs",
            remedy="Use backend='triton', or target='cpu'.",
        )
    return backend


def _cache(kv_cache: str | KVCacheConfig | None, backend: str) -> KVCacheKind | None:
    if kv_cache is None:
        return None
    config = KVCacheConfig(kv_cache) if isinstance(kv_cache, str) else kv_cache  # type: ignore[arg-type]
    if not isinstance(config, KVCacheConfig):
        raise wrong_option("kv_cache", kv_cache, (*CACHE_KINDS, "None", "KVCacheConfig(…)"))
    preferred = get_backend(backend).kv_cache
    wanted: KVCacheKind = {"paged": "paged", "static": "slot"}.get(config.kind, preferred)  # type: ignore[assignment]
    if wanted == "paged" and preferred != "paged":
        raise UnsupportedError(
            f"kv_cache='paged' with backend {backend!r}",
            expected="a backend that addresses pages: triton or eager",
            found=f"{backend}, which has static shapes",
            remedy="Use kv_cache='static' (or 'auto'), or another backend.",
        )
    return wanted


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise wrong_option("dtype", dtype, ("auto", *DTYPES))
    return found


def known_backends() -> tuple[str, ...]:
    """What `backend` may be."""
    return ("auto", *backend_names())
