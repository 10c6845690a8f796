"""A decode Program that takes one launch where it has one sequence, and its own calls elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from ...errors import UnsupportedError
from ...ir.graph import Graph
from ...targets import Target
from ..base import Lowered
from ..program import Call, Program
from ..triton.package import KernelPackage, launch_key
from ..triton.source import KernelSource, has_e4m3
from .beside import PERSISTENT_PREFIX, beside
from .decode import INPUTS, weight_names
from .reading import Shape, read_decode
from .ring import ring_of
from .ring_source import ARCH, RingCut
from .source import compile_persistent, source_of
from .tiling import Tiling

_NARROW = 2048  # columns of a weight
_AHEAD = 4  # chunks of bfloat16
_CPU = Tiling(rows=8, num_warps=1, ahead=1, splits=4, block_n=16, programs=1)


def with_one_launch(
    lowered: Lowered,
    graph: Graph,
    target: Target,
    batches: Sequence[int] = (1,),
    cut: Tiling | RingCut | None = None,
) -> Lowered:
    """A decode Program whose steps of so many sequences are one launch and the sampling.

    Args:
        lowered: the Program of ``graph``, a fused decode graph.
        graph: what it computes.
        target: a GPU, or the CPU for Triton's interpreter.
        batches: numbers of sequences; each has a kernel of its own.
        cut: how the kernel is cut, which also says of which kind it is; the default is for target,
            model and number.

    Raises:
        UnsupportedError: a call that the one launch does not know, which is named; a kernel that
            Triton does not compile.
    """
    shape = read_decode(graph)
    _check_codes(shape, target)
    cuts = [_of_batch(cut or cut_for(target, shape, batch), batch) for batch in batches]
    sources = [source_of(shape, one, device=not target.is_cpu) for one in cuts]
    packages = _packages(sources, target)
    program = lowered.program
    made = [
        _call(program, shape, one, graph, package.id)
        for one, package in zip(cuts, packages, strict=True)
    ]
    numbers = ", ".join(map(str, batches))
    note = f"steps of {numbers} sequences decode in one launch (experimental)"
    files = {name: data for package in packages for name, data in package.files().items()}
    return replace(
        lowered,
        program=replace(program, calls=beside(program, made, batches)),
        files={**lowered.files, **files},
        notes=(*lowered.notes, note),
    )


def launch_digest(shape: Shape, target: Target, batch: int) -> str:
    """SHA-256, in hex, of the source of the kernel that `with_one_launch` makes for steps of so
    many sequences; nothing is compiled.
    """
    cut = _of_batch(cut_for(target, shape, batch), batch)
    return source_of(shape, cut, device=not target.is_cpu).digest


def _check_codes(shape: Shape, target: Target) -> None:
    codes = shape.codes
    if codes is not None and codes.bits == 8 and not has_e4m3(target):
        raise UnsupportedError(
            "one launch for all layers: products with weights in f8e4m3",
            expected="a device that converts them, sm_89 or later",
            found=f"sm_{target.arch}",
            remedy="Its decode steps run as a graph of separate kernels.",
        )


def cut_for(target: Target, shape: Shape, batch: int = 1) -> Tiling | RingCut:
    """The default cut: a ring of weights where one fits."""
    if target.is_cpu or target.arch != ARCH or batch > 1:
        return tiling_for(target, shape, batch)
    try:
        fits = ring_of(shape).programs <= target.sms
    except UnsupportedError:
        fits = False
    if not fits:
        return tiling_for(target, shape, batch)
    # Codes are to be unpacked, which takes more warps; numbers take x's way to fewer of them.
    return RingCut(programs=target.sms, num_warps=4 if shape.codes is None else 8)


def _of_batch(cut: Tiling | RingCut, batch: int) -> Tiling | RingCut:
    return cut if isinstance(cut, RingCut) else replace(cut, batch=batch)


def tiling_for(target: Target, shape: Shape, batch: int = 1) -> Tiling:
    """The default cut by tiles: a program a multiprocessor, all of them resident.

    Rows of a narrow model leave most threads of a wide chunk idle, and tiles of 16 rows most
    multiprocessors; sums of many sequences take the registers of half the rows. Chunks of codes
    have a half or a quarter of the bytes, so that more of them are asked for.
    """
    if target.is_cpu:
        return _CPU
    narrow = max(form.k for form in shape.products) <= _NARROW
    rows = 8 if batch == 1 and not narrow else 4
    return Tiling(
        rows if batch <= 4 else 2,
        num_warps=4 if narrow else 8,
        ahead=_AHEAD * 16 // (16 if shape.codes is None else shape.codes.bits),
        programs=target.sms,
        batch=batch,
    )


def _packages(sources: Sequence[KernelSource], target: Target) -> list[KernelPackage]:
    if target.is_cpu:
        return [KernelPackage(source, {}) for source in sources]
    found = []
    for source, binary in zip(sources, compile_persistent(sources, target.arch), strict=True):
        if binary.resources.shared > target.shared_memory_per_block:
            raise UnsupportedError(
                f"one launch for all layers: {source.name}",
                expected=f"at most {target.shared_memory_per_block} bytes of shared memory",
                found=f"{binary.resources.shared}",
                remedy="Its decode steps run as a graph of separate kernels.",
            )
        (launch,) = source.variants[0].launches
        found.append(KernelPackage(source, {launch_key(launch): binary}))
    return found


def _call(program: Program, shape: Shape, cut: Tiling | RingCut, graph: Graph, id: str) -> Call:
    """The one launch: inputs and caches in, logits and the same caches out."""
    outputs = dict(program.outputs)
    caches = cache_names(shape)
    taken = (*INPUTS, *caches)
    results = ("logits", *caches)
    if not {*taken} <= {*program.inputs} or not {*results} <= {*outputs}:
        raise UnsupportedError(
            "one launch for all layers",
            expected=f"a Program with inputs {', '.join(INPUTS)}, caches, and their outputs",
            found=f"inputs {', '.join(program.inputs)}",
            remedy="Its decode steps run as a graph of separate kernels.",
        )
    return Call(
        f"{PERSISTENT_PREFIX}{id}",
        taken,
        tuple(outputs[name] for name in results),
        {"graph": str(graph), **asdict(cut)},
        tuple(weight_names(shape)),
        tuple((1 + index, len(INPUTS) + index) for index in range(len(caches))),
        origin=("one launch",),
    )


def cache_names(shape: Shape) -> tuple[str, ...]:
    """The caches of keys and values, by the names of the graph's inputs, in order."""
    return tuple(name for step in shape.calls for name in step.caches if name)
