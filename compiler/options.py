"""What `compile` may be told, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal, cast

import torch

from ..autotune.effort import TuneConfig, effort_of
from ..autotune.store import Store
from ..codegen.base import KVCacheKind, backend_names, get_backend
from ..errors import TilewrightError, UnsupportedError, UsageError
from ..ir.dtypes import DType
from ..passes.driver import VerifyLevel
from ..passes.heads import GQA, resolve_heads
from ..passes.schemes import STORED, QuantConfig, resolve_config
from ..passes.sinks import LEAST_WINDOW, Window
from ..runtime.memory import check_swap_space
from ..settings import current
from ..targets import Target

VERIFY_LEVELS = ("off", "structure", "sample", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODE_FORMS = ("auto", "kernels", "persistent", "persistent:2", "persistent:4", "persistent:8")
CACHE_KINDS = ("auto", "paged", "static")
CACHE_CODES = {"auto": None, "fp8": DType.F8E4M3, "int8": DType.I8}
DEFAULT_CONTEXT = 8192
_FP8_SINCE = 89  # the first architecture that converts e4m3


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """How keys and values are kept.

    Attributes:
        kind: "paged" (pages on demand), "static" (one slot of full length a sequence), or "auto":
            as the backend likes.
        page_size: tokens a page, 1 to 256.
        dtype: "auto" (the model's own), or codes with a scale for each token and KV head: "fp8"
            (e4m3) or "int8". They need a paged cache.
        prefix_caching: whether pages of prompts outlive their requests, for later ones that begin
            alike. Slots keep nothing.
        swap_space: GiB of the host's memory (pinned, for a GPU) for cached pages that have to make
            room: of prompts that come again, and of requests that were preempted.
        window: the latest tokens that one sees, itself included: generation then has no end, and
            memory stays constant (StreamingLLM). At least 16, and with the sinks at most the
            model's context. It needs a paged cache and rotary embedding. None for all tokens.
        sinks: first tokens that stay visible beside a window, 0 or more.
    """

    kind: Literal["auto", "paged", "static"] = "auto"
    page_size: int = 16
    dtype: Literal["auto", "fp8", "int8"] = "auto"
    prefix_caching: bool = True
    swap_space: float = 0.0
    window: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise wrong_option("kv_cache", self.kind, (*CACHE_KINDS, "None", "KVCacheConfig(…)"))
        if type(self.page_size) is not int or not 1 <= self.page_size <= 256:
            raise wrong_option("KVCacheConfig.page_size", self.page_size, ("1 … 256",))
        if self.dtype not in CACHE_CODES:
            raise wrong_option("KVCacheConfig.dtype", self.dtype, (*CACHE_CODES,))
        check_swap_space("KVCacheConfig.swap_space", self.swap_space)
        if self.window is not None and not _is_count(self.window, LEAST_WINDOW):
            valid = ("None", f"an integer of {LEAST_WINDOW} or more")
            raise wrong_option("KVCacheConfig.window", self.window, valid)
        if not _is_count(self.sinks, 0):
            raise wrong_option("KVCacheConfig.sinks", self.sinks, ("an integer of 0 or more",))
        if not isinstance(self.prefix_caching, bool):
            raise wrong_option(
                "KVCacheConfig.prefix_caching", self.prefix_caching, ("True", "False")
            )


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
        codes: what the cache holds, i8 or f8e4m3; None for numbers of the model's own type.
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
        stored: what becomes of weights that the checkpoint holds in codes: "float" and "int8" keep
            them and say what their products compute in, "expanded" makes numbers of them; None
            where the user says nothing.
        heads: how KV heads become fewer, resolved; None for not at all.
        prefix_caching: whether pages of prompts outlive their requests.
        swap_space: GiB of the host's memory for cached pages that make room.
        window: what a sequence keeps; None for all of it.
        strict: whether what the backend leaves to torch, or to parts, is an error.
        decode: how a decode step runs: "kernels", or "persistent" for one launch where there is
            one sequence, or up to as many as stand behind a colon; "auto" as records say.
        asked_cache: the form that the user asked for: "auto", "paged", "static", or "none".
        rivals: the other backends, where the choice is ours; none where the user names one, or
            wants what only one can give.
    """

    target: Target
    backend: str
    cache: KVCacheKind | None
    cache_named: bool
    page_size: int
    codes: DType | None
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
    stored: str | None = None
    heads: GQA | None = None
    prefix_caching: bool = True
    swap_space: float = 0.0
    window: Window | None = None
    strict: bool = False
    decode: str = "auto"
    asked_cache: str = "auto"
    rivals: tuple[Rival, ...] = ()

    @property
    def one_launch(self) -> tuple[int, ...] | Literal["auto"]:
        """The numbers of sequences whose decode step is one launch: those that steps are padded to,
        up to the most; "auto" leaves them to what was measured.
        """
        if self.decode == "auto":
            return "auto"
        if self.decode == "kernels":
            return ()
        most = int(self.decode.partition(":")[2] or 1)
        return tuple(number for number in (1, 2, 4, 8) if number <= most)

    @property
    def records(self) -> Store | None:
        """What is known of kernels; None where defaults are asked for, or one cut for all."""
        from .tuning import tuning_store

        return None if self.tune == "none" or self.deterministic else tuning_store()


@dataclass(frozen=True, slots=True)
class Rival:
    """A backend that might do better than the one that is taken without measuring.

    Attributes:
        backend: its name.
        options: the same options for it; None where it cannot have them.
        refused: why not, in words.
    """

    backend: str
    options: CompileOptions | None = None
    refused: str = ""


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
    strict: bool = False,
    decode: str = "auto",
) -> CompileOptions:
    """Checks the options that a user gave, and fills in what "auto" means here.

    Raises:
        UsageError: a value that is not valid; the message lists those that are.
        UnsupportedError: valid values that do not go together.
    """
    device = _target(target, backend)
    name = _backend(backend, device)
    scheme, stored = _quantize(quantize, device)
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
    if decode not in DECODE_FORMS:
        raise wrong_option("decode", decode, DECODE_FORMS)
    config = _cache_config(kv_cache)
    options = CompileOptions(
        device,
        name,
        None if config is None else _cache(config, name),
        config is not None
        and replace(config, prefix_caching=True, swap_space=0.0) != KVCacheConfig(),
        16 if config is None else config.page_size,
        None if config is None else _codes(config, name, device),
        _dtype(dtype),
        max_model_len,
        max_batch_size or 8,
        level,
        trust_remote_code,
        random_weights,
        deterministic,
        float(memory_fraction),
        _tune(tune, device, backend, name, deterministic),
        scheme,
        stored,
        resolve_heads(attention),
        config is None or config.prefix_caching,
        0.0 if config is None else float(config.swap_space),
        None if config is None else _window(config, name, deterministic),
        strict=strict,
        decode=decode,
        asked_cache="none" if config is None else config.kind,
    )
    if backend != "auto" or deterministic or decode.startswith("persistent"):
        return options
    others = (other for other in backend_names() if other != name)
    return replace(options, rivals=tuple(_rival(other, options, config) for other in others))


def _rival(name: str, options: CompileOptions, config: KVCacheConfig | None) -> Rival:
    """The same options for another backend, or why it cannot have them here."""
    device = options.target
    try:
        able = get_backend(_backend(name, device))
        if able.own_kernels and device.is_cpu:
            return Rival(name, refused="its kernels are for GPUs: on a CPU they are only tried")
        if config is None:
            return Rival(name, replace(options, backend=name))
        cache, codes = _cache(config, name), _codes(config, name, device)
        window = _window(config, name, options.deterministic)
    except TilewrightError as error:
        return Rival(name, refused=f"expected {error.expected}, found {error.found}")
    except ImportError as error:
        return Rival(name, refused=f"it is not installed: {error}")
    return Rival(name, replace(options, backend=name, cache=cache, codes=codes, window=window))


def _quantize(
    quantize: str | QuantConfig | None, target: Target
) -> tuple[QuantConfig | None, str | None]:
    """The scheme to quantize by, and what becomes of codes that the checkpoint has."""
    if quantize is None:
        return None, None
    config = QuantConfig(quantize) if isinstance(quantize, str) else quantize
    if not isinstance(config, QuantConfig) or config.scheme not in STORED:
        return resolve_config(quantize, target, STORED), None
    computes = ("float", "int8") if config.scheme == "stored" else ("float",)
    if config.compute not in computes:
        raise wrong_option(f"compute of {config.scheme}", config.compute, computes)
    if config != QuantConfig(config.scheme, compute=config.compute):
        raise UsageError(
            f"option quantize={config.scheme!r}",
            expected="nothing beside it but QuantConfig.compute: the checkpoint says the rest",
            found=repr(config),
            remedy="Leave the other fields out.",
        )
    return None, config.compute if config.scheme == "stored" else config.scheme


def _tune(
    tune: str | TuneConfig, target: Target, asked: str, backend: str, deterministic: bool
) -> str | TuneConfig:
    """The option, where it can be had: kernels of ours are measured on their GPU, backends that the
    user leaves to us on any device that is here.
    """
    if not effort_of(tune).measures:
        return tune
    here = target.is_cpu or Target.detect().arch == target.arch
    able = asked == "auto" or (get_backend(backend).own_kernels and not target.is_cpu)
    if not (here and able) or deterministic:
        raise UnsupportedError(
            f"tune={tune if isinstance(tune, str) else 'TuneConfig(…)'} for {target.name}",
            expected="backend='auto' or the Triton backend on a GPU, not deterministic, and a "
            f"device of {target.sm} here",
            found=f"backend {backend!r} on {Target.detect().name}",
            remedy="Use tune='cached'; tune on such a machine, and merge its records here.",
        )
    return tune


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def context_of(own: int | None, options: CompileOptions) -> int:
    """The longest sequence, given the model's own limit; of a window what it holds must fit."""
    wanted, window = options.max_model_len, options.window
    if wanted is not None and own is not None and wanted > own:
        raise UsageError(
            "option max_model_len",
            expected=f"at most {own}, the model's longest sequence",
            found=str(wanted),
            remedy="Lower it, or leave it out.",
        )
    most, kept = wanted or own, 0 if window is None else window.size + window.sinks
    if window is not None and most is not None and kept > most:
        raise UsageError(
            f"KVCacheConfig(window={window.size}, sinks={window.sinks})",
            expected=f"a window and sinks of at most {most} tokens together, which the model knows",
            found=str(kept),
            remedy="Lower the window.",
        )
    return wanted or min(own or DEFAULT_CONTEXT, max(DEFAULT_CONTEXT, kept))


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
    """The backend to use: onnxruntime on CPUs, Triton on GPUs; eager runs on every device, and
    onnxruntime on GPUs where it is asked for and has a provider, TensorRT where it builds for them.
    """
    if backend == "auto":
        if target.is_cpu:
            return "onnxruntime"
        return "triton" if find_spec("triton") is not None else "eager"
    get_backend(backend)
    if backend == "tensorrt":
        from ..codegen.tensorrt.flavor import check_target

        check_target(target)
    if backend == "onnxruntime" and not target.is_cpu:
        from ..codegen.onnx.providers import CUDA, INSTALL, cuda_missing

        missing = cuda_missing()
        if missing:
            raise UnsupportedError(
                f"backend {backend!r} for target {target.name}",
                expected="a backend that runs on that device: triton, eager, or onnxruntime with "
                f"{CUDA}",
                found=missing,
                remedy=f"Use backend='triton' or target='cpu', or {INSTALL}.",
            )
    return backend


def _cache_config(kv_cache: str | KVCacheConfig | None) -> KVCacheConfig | None:
    if kv_cache is None:
        return None
    config = KVCacheConfig(kv_cache) if isinstance(kv_cache, str) else kv_cache  # type: ignore[arg-type]
    if not isinstance(config, KVCacheConfig):
        raise wrong_option("kv_cache", kv_cache, (*CACHE_KINDS, "None", "KVCacheConfig(…)"))
    return config


def _codes(config: KVCacheConfig, backend: str, target: Target) -> DType | None:
    """What the cache holds, where backend and target have it."""
    codes = CACHE_CODES[config.dtype]
    if codes is None:
        return None
    if _cache(config, backend) != "paged":
        raise UnsupportedError(
            f"KVCacheConfig(dtype={config.dtype!r}) with backend {backend!r}",
            expected="a paged cache, which the backends triton and eager have",
            found="a cache of slots, whose keys and values have the model's own type",
            remedy="Use backend='triton' or 'eager' with kv_cache 'auto' or 'paged', or leave "
            "dtype out.",
        )
    if codes is DType.F8E4M3 and backend == "triton" and 0 < target.arch < _FP8_SINCE:
        raise UnsupportedError(
            f"KVCacheConfig(dtype={config.dtype!r}) for target {target.name}",
            expected=f"a GPU that converts e4m3: sm_{_FP8_SINCE} or newer",
            found=target.sm,
            remedy="Use dtype='int8', which it has.",
        )
    return codes


def _window(config: KVCacheConfig, backend: str, deterministic: bool) -> Window | None:
    """What a sequence keeps, where the backend can let go of the rest."""
    if config.window is None:
        return None
    if _cache(config, backend) != "paged":
        raise UnsupportedError(
            f"KVCacheConfig(window={config.window}) with backend {backend!r}",
            expected="a paged cache, which the backends triton and eager have",
            found="a cache of slots, each of which holds a sequence whole",
            remedy="Use backend='triton' or 'eager' with kv_cache 'auto' or 'paged', or leave "
            "window out.",
        )
    if deterministic:
        raise UnsupportedError(
            f"deterministic=True with KVCacheConfig(window={config.window})",
            expected="keys whose order of sums depends on their sequence alone",
            found="a window, whose keys lie by how the sequence came to them",
            remedy="Leave one of both out.",
        )
    return Window(config.window, config.sinks)


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _cache(config: KVCacheConfig, backend: str) -> KVCacheKind:
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
