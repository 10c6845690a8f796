"""From a graph and samples to a recipe: what each method finds out for its scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...formats.weights import Held, Weight
from ...ir.graph import Graph
from ...passes.driver import run_passes
from ...passes.heads import HeadPlan
from ...passes.keep_codes import KEEP_CODES
from ...passes.pipeline import pipeline
from ...passes.quantize import Recipe, check_skips, linears_to_quantize
from ...passes.schemes import SCHEMES, Parts, QuantConfig
from ...passes.smooth import Site, smooth, smooth_sites
from .awq import awq_vector, clipped_codes
from .gptq import gptq_codes
from .grid import Grid, steady_gram
from .lockstep import run_in_step
from .smoothquant import smoothquant_vector

Advance = Callable[[float], None]
Samples = Sequence[Sequence[torch.Tensor]]


def needs_samples(config: QuantConfig) -> bool:
    """Whether a resolved configuration can only be had with activations."""
    return config.method != "rtn" or SCHEMES[config.scheme].activations == "tensor"


def plain_graph(captured: Graph, heads: HeadPlan | None = None) -> Graph:
    """A captured graph after the passes that come before quantization, but without a KV cache:
    its weights have the names that those of the graph to quantize have, and are numbers. ``heads``
    become fewer in it.
    """
    steps = [step for step in pipeline(None, heads=heads) if step is not KEEP_CODES]
    return run_passes(captured, steps, level="off")[0]


def calibrate(
    graph: Graph, samples: Samples, config: QuantConfig, advance: Advance = lambda share: None
) -> Recipe:
    """What a resolved configuration takes to quantize a graph.

    Args:
        graph: as `plain_graph` makes it.
        samples: one tensor an input of the graph, for each; not looked at where none are needed.
        config: the configuration.
        advance: called with the share that is done.

    Raises:
        VerificationError: activations that are not finite; it names the weight they meet.
        UsageError: a pattern of ``config.skip`` that matches nothing.
    """
    check_skips(graph, config)
    names = list(linears_to_quantize(graph, config))
    if not needs_samples(config):
        return Recipe(config)
    vectors: dict[str, Weight] = {}
    if config.method in ("awq", "smoothquant"):
        vectors = _vectors(graph, samples, config, names, lambda share: advance(share / 2))
        graph = smooth(graph, vectors)
    made: dict[str, Parts] = {}
    static: dict[str, Weight] = {}
    scheme = SCHEMES[config.scheme]

    def observe(name: str, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        if scheme.activations == "tensor":
            static[name] = _static_scale(name, rows)
        if config.method not in ("gptq", "awq"):
            return None
        grid, wide, gram = Grid.of(scheme, config), weight.float(), steady_gram(rows)
        if config.method == "gptq":
            found = gptq_codes(name, wide, gram, grid)
        else:
            found = clipped_codes(wide, gram, grid)
        codes, scale, zero, value = found
        made[name] = grid.parts(name, codes, scale, zero)
        return value

    if config.method in ("gptq", "awq") or scheme.activations == "tensor":
        run_in_step(graph, samples, names, observe, lambda share: advance(0.5 + share / 2))
    return Recipe(config, vectors, made, static)


def _static_scale(name: str, rows: torch.Tensor) -> Weight:
    """The largest magnitude that was met, as the largest code."""
    most = rows.float().abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    largest = torch.finfo(torch.float8_e4m3fn).max
    return Held((most / largest).reshape(1), f"{name}.input_scale")


def _vectors(
    graph: Graph, samples: Samples, config: QuantConfig, names: Sequence[str], advance: Advance
) -> dict[str, Weight]:
    """The scales of columns by name of weight; linears of one input share theirs."""
    sites = smooth_sites(graph, names)
    site_of: dict[str, Site] = {name: site for site in sites for name in site.names}
    found: dict[str, Weight] = {}

    def observe(name: str, rows: torch.Tensor, weight: torch.Tensor) -> None:
        site = site_of[name]
        if name in found:
            return
        weights = [graph.weights[other].load() for other in site.names if other != name]
        vector = _vector(rows, [weight, *weights], config, site)
        for other in site.names:
            found[other] = Held(vector, f"{site.names[0]}.smooth")

    run_in_step(graph, samples, list(site_of), observe, advance)
    return found


def _vector(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], config: QuantConfig, site: Site
) -> torch.Tensor:
    """The vector of a site: heads that read the same values share theirs."""

    def tie(vector: torch.Tensor) -> torch.Tensor:
        heads = vector.view(site.heads)
        return heads.mean(1, keepdim=True).expand(site.heads).flatten()

    whole = _of_columns(rows, weights, config, tie)
    return whole.view(site.heads)[:, 0].flatten().contiguous()


def _of_columns(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    config: QuantConfig,
    tie: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    scheme = SCHEMES[config.scheme]
    if config.method == "smoothquant":
        return smoothquant_vector(rows, weights, scheme.codes, tie)
    return awq_vector(rows, weights, Grid.of(scheme, config), tie)
