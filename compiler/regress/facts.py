"""From a compiled image to its snapshot: what was generated, and what it must cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ...codegen.program import Program
from ...codegen.triton.occupancy import occupancy
from ...codegen.triton.package import (
    FOLDER,
    Binary,
    KernelPackage,
    argument_type,
    launch_key,
    read_package,
)
from ...codegen.triton.source import Launch, Pointer, Variant
from ...ir.parser import parse_graph
from ...runtime.image import EngineImage
from ...targets import Target
from ..inspect.facts import kv_bytes_per_token, weight_bytes
from ..inspect.kernels import VIEWS, kernel_name
from .counting import PYTHON, Counts
from .instructions import cubin_hash, instruction_series, read_instructions
from .phases import Costs, Phase, PhaseFacts, lm_phases
from .snapshot import (
    PROGRAM,
    PROGRAMS,
    DecodeSnapshot,
    KernelSnapshot,
    Number,
    Snapshot,
    numbered,
    sha256,
)

_KINDS = ("generated", "template", "library", "aten", "eager")


def snapshot_of(
    image: EngineImage,
    case: str,
    definition: str,
    versions: Mapping[str, str],
    sizes: Mapping[str, int] | None = None,
    counts: Mapping[str, Counts] | None = None,
) -> Snapshot:
    """All that tiers 1 and 2 know of an image.

    Args:
        image: compiled, with the texts of its graphs.
        case, definition, versions: what it was compiled from, and with.
        sizes: of the symbols, for an image of a graph; a causal LM has phases of its own.
        counts: the work of compiling, by its part.
    """
    programs = programs_of(image)
    packages = _packages(image.files, programs)
    subjects = numbered(kernel_name(call) for program in programs for call in program.calls)
    at = _phase_facts(image, packages, subjects, sizes or {})
    series: dict[str, dict[str, Number]] = {
        name: dict(_call_series(program)) for name, program in zip(PROGRAMS, programs, strict=False)
    }
    series[PROGRAM] |= _code_series(image, packages)
    series |= {name: dict(found.series) for name, found in at.items()}
    compiling, shares = _compiling(counts or {})
    if compiling:
        series["compile"] = compiling
    target = Target.parse(image.target)
    read = read_instructions(b.cubin for p in packages.values() for b in p.binaries.values())
    kernels = (
        _kernel(subjects[id], package, read, target, _programs(subjects[id], at))
        for id, package in packages.items()
    )
    return Snapshot(
        case,
        image.target,
        definition,
        versions,
        tuple(kernels),
        series,
        {name: found.parts for name, found in at.items()},
        tuple((name, sha256(text)) for name, text in image.graphs),
        image.graphs[-1][1],
        program_text(image.program),
        {name: found.running for name, found in at.items()},
        shares,
        _decode(image),
    )


def programs_of(image: EngineImage) -> tuple[Program, ...]:
    """The general Program, then that of decode steps where there is one."""
    return (image.program, *(() if image.decode is None else (image.decode.program,)))


def program_text(program: Program) -> str:
    """A Program as JSON, a line for each buffer and each call."""
    data = program.to_json()
    assert isinstance(data, dict)
    lines = []
    for key, value in data.items():
        head = json.dumps(key)
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{head}: {{\n{inner}\n}}")
        elif key == "calls" and isinstance(value, list):
            lines.append(f"{head}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]")
        else:
            lines.append(f"{head}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def launch_lines(variants: Sequence[Variant]) -> tuple[str, ...]:
    """Variants and launches for reading and comparing, a line each."""
    lines = []
    for variant in variants:
        guard = " and ".join(f"{size} >= 0" for size in variant.guard)
        spaces = ", ".join(f"{dtype}[{count}]" for dtype, count in variant.workspaces)
        lines.append(
            f"{f'if {guard}' if guard else 'always'}{f', workspace {spaces}' if spaces else ''}:"
        )
        lines += [_launch_line(launch) for launch in variant.launches]
    return tuple(lines)


def launch_labels(package: KernelPackage) -> dict[str, str]:
    """A label for each launch key, in the launches' order: the function, numbered where it is
    compiled several times; empty for a kernel with one binary.
    """
    launches = {
        launch_key(launch): launch.function
        for variant in package.source.variants
        for launch in variant.launches
    }
    if len(launches) == 1:
        return dict.fromkeys(launches, "")
    seen: dict[str, int] = {}
    found = {}
    for key, function in launches.items():
        count = seen[function] = seen.get(function, 0) + 1
        found[key] = function if count == 1 else f"{function}#{count}"
    return found


def _launch_line(launch: Launch) -> str:
    arguments = [
        f"{a.name}: {argument_type(a)} = {a.role} {a.index}"
        if isinstance(a, Pointer)
        else f"{a.name}: {a.type} = {a.value}"
        for a in launch.arguments
    ]
    constants = [f"{name}={value!r}" for name, value in launch.constexprs.items()]
    grid = ", ".join(map(str, launch.grid))
    return (
        f"  {launch.function}[{grid}]({', '.join((*arguments, *constants))}), "
        f"{launch.num_warps} warps, {launch.num_stages} stages"
    )


def _packages(files: Mapping[str, bytes], programs: Sequence[Program]) -> dict[str, KernelPackage]:
    """The Programs' kernels, in the order of their first calls."""
    there = {PurePosixPath(path).parts[1] for path in files if path.startswith(f"{FOLDER}/")}
    names = dict.fromkeys(kernel_name(call) for program in programs for call in program.calls)
    return {name: read_package(files.__getitem__, name) for name in names if name in there}


def _phase_facts(
    image: EngineImage,
    packages: Mapping[str, KernelPackage],
    subjects: Mapping[str, str],
    sizes: Mapping[str, int],
) -> dict[str, PhaseFacts]:
    """What each phase comes to, by the Program that runs it."""
    labels = {id: launch_labels(package) for id, package in packages.items()}

    def costs(one: EngineImage) -> Costs:
        return Costs(one, parse_graph(one.graphs[-1][1]), packages, subjects, labels)

    general = costs(image)
    decode = general if image.decode is None else costs(image.decoding)
    if image.lm is None:
        phases: tuple[Phase, ...] = (Phase("call", dict(sizes)),)
    else:
        phases = lm_phases(image.lm, general.graph, decode.graph)
    return {phase.name: (decode if phase.decodes else general).at(phase) for phase in phases}


def _decode(image: EngineImage) -> DecodeSnapshot | None:
    decode = image.decode
    if decode is None:
        return None
    _, *own = decode.graphs  # the first is one of the general graphs
    passes = tuple((name, sha256(text)) for name, text in own)
    return DecodeSnapshot(passes, decode.graphs[-1][1], program_text(decode.program))


def _kernel(
    subject: str,
    package: KernelPackage,
    counts: Mapping[str, Mapping[str, int]],
    target: Target,
    programs: Mapping[str, Number],
) -> KernelSnapshot:
    series: dict[str, Number] = {}
    cubins = {}
    for key, label in launch_labels(package).items():
        binary = package.binaries[key]
        hash = cubins[label] = cubin_hash(binary.cubin)
        some = {**_resources(binary, target), **instruction_series(counts[hash])}
        series |= {f"{name} ({label})" if label else name: n for name, n in some.items()}
    source = package.source
    return KernelSnapshot(
        subject,
        package.id,
        source.kind,
        source.digest,
        source.text,
        launch_lines(source.variants),
        cubins,
        {**series, **programs},
    )


def _programs(subject: str, at: Mapping[str, PhaseFacts]) -> dict[str, Number]:
    """How many programs a kernel launches in each phase where it runs."""
    found = {name: facts.programs.get(subject, 0) for name, facts in at.items()}
    return {f"programs ({name})": count for name, count in found.items() if count}


def _compiling(
    counts: Mapping[str, Counts],
) -> tuple[dict[str, Number], dict[str, Mapping[str, int]]]:
    """The series of compiling, and who has how much of each. Their names say which Python counted:
    with another one they are not to be compared.
    """
    if not counts:
        return {}, {}
    whole, of = f"python calls ({PYTHON})", "python calls of {} ({})"
    series: dict[str, Number] = {whole: sum(some.calls for some in counts.values())}
    series |= {of.format(part, PYTHON): some.calls for part, some in counts.items()}
    shares: dict[str, Mapping[str, int]] = {whole: {k: some.calls for k, some in counts.items()}}
    for part, some in counts.items():
        if some.passes:
            shares[of.format(part, PYTHON)] = some.passes
    return series, shares


def _resources(binary: Binary, target: Target) -> dict[str, Number]:
    taken = binary.resources
    series: dict[str, Number] = {
        "registers": taken.registers,
        "spills": taken.spills,
        "local bytes": taken.local_bytes,
        "shared": taken.shared,
        "threads": taken.threads,
        "pdl": int(binary.pdl),
        "scratch": binary.scratch_bytes,
    }
    fit = occupancy(taken, target)
    if fit is not None:
        series["warps per SM"] = fit.warps
    return series


def _call_series(program: Program) -> dict[str, int]:
    counts = dict.fromkeys(_KINDS, 0)
    for call in program.calls:
        if call.kernel.split("/", 1)[1] not in VIEWS or call.kind != "eager":
            counts[call.kind] = counts.get(call.kind, 0) + 1
    return {f"{kind} calls": count for kind, count in counts.items()}


def _code_series(image: EngineImage, packages: Mapping[str, KernelPackage]) -> dict[str, Number]:
    series: dict[str, Number] = {}
    binaries = [binary for p in packages.values() for binary in p.binaries.values()]
    series["kernels"] = len(packages)
    series["binaries"] = len(binaries)
    series["code bytes"] = sum(map(len, {binary.cubin for binary in binaries}))
    if image.lm is not None:
        series["weight bytes"] = weight_bytes(image)
        series["KV bytes a token"] = kv_bytes_per_token(image)
    return series
