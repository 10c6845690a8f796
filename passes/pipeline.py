"""The order of the passes, in one place. Nothing registers itself here."""

from __future__ import annotations

from typing import Literal

from ..ir.dtypes import DType
from .base import Pass
from .canonicalize import CANONICALIZE
from .fold_buffers import FOLD_BUFFERS
from .fold_weights import FOLD_WEIGHTS
from .fuse import FUSE
from .fuse_append import FUSE_APPEND
from .fuse_linears import FUSE_LINEARS
from .heads import HeadPlan, heads_pass
from .keep_codes import KEEP_CODES, keep_codes_pass
from .kv_cache import SLOT_CACHE, paged_cache_pass
from .merge_projections import MERGE_PROJECTIONS
from .one_token import one_token_pass
from .open_rows import OPEN_ROWS
from .quantize import Recipe, quantize_pass
from .recognize_attention import RECOGNIZE_ATTENTION
from .recognize_gated import RECOGNIZE_GATED
from .recognize_norm import RECOGNIZE_NORM
from .recognize_rope import RECOGNIZE_ROPE
from .sample_tokens import SAMPLE_TOKENS
from .share_pages import SHARE_PAGES
from .sinks import Window, window_pass
from .smooth import smooth_pass


def pipeline(
    cache: Literal["paged", "slot"] | None,
    fuses: bool = False,
    deterministic: bool = False,
    recipe: Recipe | None = None,
    stored: str | None = None,
    codes: DType | None = None,
    heads: HeadPlan | None = None,
    window: Window | None = None,
) -> tuple[Pass, ...]:
    """The passes from a captured graph to one that backends lower.

    Args:
        cache: form of the KV cache of a causal LM; None for plain modules, which keep their
            signature.
        fuses: whether the backend makes one kernel of a fused group; others fuse by themselves, and
            see more in single ops.
        deterministic: whether products are computed by kernels of ours, row by row.
        recipe: of the linears to quantize; None for none.
        stored: what becomes of weights that a checkpoint holds in codes, where none is quantized:
            "expanded" makes numbers of them, "int8" lets their products round activations.
        codes: of a paged cache, i8 or f8e4m3; None for numbers.
        heads: of the KV heads that become fewer; None for none.
        window: of a paged cache, what a sequence keeps; None for all.
    """
    caches = {None: (), "paged": (paged_cache_pass(codes),), "slot": (SLOT_CACHE,)}
    return (
        *recognizing(),
        # While a layer's projections are linears of their own.
        *((heads_pass(heads),) if heads else ()),
        # One sequence becomes ragged tokens of many, over a cache.
        *caches[cache],
        # While rotations stand by themselves.
        *((window_pass(window),) if window and cache == "paged" else ()),
        # Fewer, larger matmuls.
        MERGE_PROJECTIONS,
        # What the rewrites left: reshapes and permutes that cancel, weights to fold.
        CANONICALIZE,
        FOLD_WEIGHTS,
        # Merged and folded weights become codes, or stay those that the checkpoint has.
        *(_keeping(stored) if recipe is None else quantizing(recipe)),
        # What can share a kernel.
        *((FUSE_APPEND,) if fuses and cache == "paged" else ()),
        *((FUSE_LINEARS,) if fuses and deterministic else ()),
        *((OPEN_ROWS, FUSE) if fuses else ()),
    )


def _keeping(stored: str | None) -> tuple[Pass, ...]:
    if stored == "expanded":
        return ()
    return (keep_codes_pass(DType.I8) if stored == "int8" else KEEP_CODES,)


def recognizing() -> tuple[Pass, ...]:
    """The passes from a captured graph to one of ops that say what they mean."""
    return (
        # One spelling for each value; what depends on weights alone becomes a weight.
        CANONICALIZE,
        FOLD_BUFFERS,
        FOLD_WEIGHTS,
        # What the arithmetic means.
        RECOGNIZE_NORM,
        RECOGNIZE_ROPE,
        RECOGNIZE_GATED,
        # After rope, below which some models repeat their KV heads.
        RECOGNIZE_ATTENTION,
        CANONICALIZE,
    )


def quantizing(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that quantize by a recipe: scales move into weights before these are rounded."""
    smoothing = (smooth_pass(recipe.smooth),) if recipe.smooth else ()
    return (*smoothing, quantize_pass(recipe))


def decode_pipeline(page_size: int | None) -> tuple[Pass, ...]:
    """The passes from a paged graph, as it is before ``OPEN_ROWS``, to that of decode steps, in
    which every sequence brings one token: few rows, so that products are memory-bound like the
    rest.
    """
    return (
        one_token_pass(page_size),
        SHARE_PAGES,
        FUSE_LINEARS,
        OPEN_ROWS,
        FUSE,
        # Last: what moves a logit by a rounding may move a token.
        SAMPLE_TOKENS,
    )
