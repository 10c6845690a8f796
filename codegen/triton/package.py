"""Compiled kernels as they lie in the engine folder: text, launch facts, machine code.

kernels/<name>-<hash>/kernel.py        the source, for reading: nothing ever runs it from there
kernels/<name>-<hash>/meta.json        arguments, grids, and what each binary needs to be launched
kernels/<name>-<hash>/<n>.sm_90.cubin  machine code of one (function, constants) pair
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import EngineError, GraphError
from ...ir.dims import parse_size
from ...ir.dtypes import DTYPE_NAMES
from .source import (
    TRITON_TYPES,
    Argument,
    Described,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
)

FOLDER = "kernels"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread or block of a compiled kernel takes.

    Attributes:
        registers: 32-bit registers a thread.
        local_bytes: local memory a thread: spilled registers, and arrays that are indexed at run
            time.
        spills: bytes that a thread moves to or from spilled registers; 0 in a healthy kernel.
        shared: bytes of shared memory a block.
        threads: of a block.
    """

    registers: int
    local_bytes: int
    spills: int
    shared: int
    threads: int


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code of one launch, and what the driver must be told.

    Attributes:
        function: its entry point.
        arch: compute capability it runs on, 90 for sm_90.
        cubin: the code.
        resources: registers, shared memory, threads.
        parameters: type of each kernel parameter as in its PTX ("u64", "u32", "b8" for the bytes of
            a tensor map), the two scratch pointers that Triton appends included.
        scratch_bytes, scratch_align: global scratch memory of one block (tensor descriptors).
        cluster: blocks in a cluster, 1 for none.
        pdl: whether it may start before the kernel before it has ended.
        cooperative: whether all blocks must be resident at once.
    """

    function: str
    arch: int
    cubin: bytes
    resources: Resources
    parameters: tuple[str, ...]
    scratch_bytes: int = 0
    scratch_align: int = 1
    cluster: int = 1
    pdl: bool = False
    cooperative: bool = False


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """A kernel source with the binaries of all its launches.

    Attributes:
        source: what was compiled.
        binaries: by launch key (`launch_key`), for one architecture.
    """

    source: KernelSource
    binaries: Mapping[str, Binary]

    @property
    def id(self) -> str:
        """Name and hash: what Programs call it, and its folder."""
        return kernel_id(self.source)

    @property
    def resources(self) -> tuple[Resources, ...]:
        """Of each binary."""
        return tuple(binary.resources for binary in self.binaries.values())

    def files(self) -> dict[str, bytes]:
        """The artifacts by their path within the engine folder."""
        folder = f"{FOLDER}/{self.id}"
        found = {f"{folder}/kernel.py": self.source.text.encode()}
        described = {}
        for index, (key, binary) in enumerate(self.binaries.items()):
            name = f"{index}.sm_{binary.arch}.cubin"
            found[f"{folder}/{name}"] = binary.cubin
            facts = asdict(binary)
            del facts["cubin"]
            described[key] = {"file": name, **facts}
        meta = {
            "name": self.source.name,
            "kind": self.source.kind,
            "contracts": self.source.contracts,
            "variants": [_variant_to_json(variant) for variant in self.source.variants],
            "binaries": described,
        }
        found[f"{folder}/meta.json"] = json.dumps(meta, indent=1).encode()
        return found


def read_package(read: Callable[[str], bytes], id: str) -> KernelPackage:
    """A package by its id, from its files, which ``read`` gives by their paths.

    Raises:
        EngineError: a file is missing, or its meta.json is not what `KernelPackage.files` wrote.
    """
    folder = f"{FOLDER}/{id}"
    try:
        meta = json.loads(read(f"{folder}/meta.json"))
        variants = tuple(_read_variant(variant) for variant in meta["variants"])
        text = read(f"{folder}/kernel.py").decode()
        source = KernelSource(meta["name"], meta["kind"], text, variants, bool(meta["contracts"]))
        binaries = {
            key: _read_binary(facts, read(f"{folder}/{facts['file']}"))
            for key, facts in meta["binaries"].items()
        }
        _check(variants, binaries)
    except _MALFORMED as error:
        raise EngineError(
            f"kernel {id}",
            expected="its kernel.py, meta.json and binaries as this version writes them",
            found=f"{type(error).__name__}: {error}",
            remedy="Compile the model again with this version.",
        ) from error
    return KernelPackage(source, binaries)


_MALFORMED = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    GraphError,
)


def _check(variants: tuple[Variant, ...], binaries: Mapping[str, Binary]) -> None:
    """ValueError for what no launch could follow without leaving its memory."""
    if not variants or variants[-1].guard:
        raise ValueError("no variant for all sizes")
    for variant in variants:
        for launch in variant.launches:
            pointers = [a for a in launch.arguments if isinstance(a, Pointer)]
            if any(a.index < 0 for a in pointers):
                raise ValueError("an argument of a negative index")
            if not binaries:  # what the interpreter runs
                continue
            binary = binaries[launch_key(launch)]  # LookupError: refused too
            declared = [type_ for a in launch.arguments for type_ in _ptx_types(a)]
            given = list(binary.parameters)
            if given[: len(declared)] != declared or given[len(declared) :] != ["u64"] * 2:
                raise ValueError(f"{launch.function} takes {given}")
            if binary.scratch_bytes < 0 or binary.cluster != 1:
                raise ValueError(f"{launch.function}: scratch or cluster")


def kernel_id(source: KernelSource) -> str:
    """A kernel's name and the head of its hash."""
    return f"{source.name}-{source.digest[:8]}"


def launch_key(launch: Launch) -> str:
    """What tells binaries of one source apart: function, argument types, constants, warps."""
    types = ",".join(argument_type(argument) for argument in launch.arguments)
    constants = ",".join(f"{name}={value}" for name, value in launch.constexprs.items())
    return f"{launch.function}({types})[{constants}]w{launch.num_warps}s{launch.num_stages}"


def argument_type(argument: Argument) -> str:
    """An argument's type as Triton's signatures spell it."""
    if isinstance(argument, Described):
        bits, rank = 8 * argument.dtype.bytes, len(argument.box)
        lines = f"swizzle_byte_width={argument.swizzle}, element_bitwidth={bits}, rank={rank}"
        element = TRITON_TYPES[argument.dtype]
        return f"tensordesc<{element}{list(argument.box)},NVMMASharedLayout({lines})>"
    return f"*{TRITON_TYPES[argument.dtype]}" if isinstance(argument, Pointer) else argument.type


def _ptx_types(argument: Argument) -> list[str]:
    """The parameters that an argument is in PTX: of a map itself, its shape and its strides."""
    if isinstance(argument, Described):
        rank = len(argument.box)
        return ["b8", *["u32"] * rank, *["u64"] * rank]
    return ["u32" if argument_type(argument) == "i32" else "u64"]


def _variant_to_json(variant: Variant) -> dict[str, Any]:
    return {
        "guard": [str(size) for size in variant.guard],
        "workspaces": [[str(dtype), str(count)] for dtype, count in variant.workspaces],
        "counters": str(variant.counters),
        "launches": [
            {
                "function": launch.function,
                "arguments": [_argument_to_json(argument) for argument in launch.arguments],
                "grid": [str(size) for size in launch.grid],
                "constexprs": dict(launch.constexprs),
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
            }
            for launch in variant.launches
        ],
    }


def _argument_to_json(argument: Argument) -> list[Any]:
    if isinstance(argument, Scalar):
        return [argument.name, argument.type, str(argument.value)]
    if isinstance(argument, Described):
        places = [[str(size) for size in sizes] for sizes in (argument.shape, argument.strides)]
        where = [str(argument.offset), *places, list(argument.box), argument.swizzle]
        return [argument.name, f"&{argument.dtype}", argument.role, argument.index, *where]
    return [argument.name, f"*{argument.dtype}", argument.role, argument.index]


def _read_variant(data: Mapping[str, Any]) -> Variant:
    return Variant(
        tuple(_read_launch(launch) for launch in data["launches"]),
        tuple((DTYPE_NAMES[dtype], parse_size(count)) for dtype, count in data["workspaces"]),
        tuple(parse_size(text) for text in data["guard"]),
        parse_size(data["counters"]),
    )


def _read_launch(data: Mapping[str, Any]) -> Launch:
    x, y, z = (parse_size(text) for text in data["grid"])
    return Launch(
        str(data["function"]),
        tuple(_read_argument(argument) for argument in data["arguments"]),
        (x, y, z),
        dict(data["constexprs"]),
        int(data["num_warps"]),
        int(data["num_stages"]),
    )


def _read_argument(data: list[Any]) -> Argument:
    if data[1].startswith(("*", "&")):
        name, dtype, role, index, *where = data
        if role not in ("operand", "result", "workspace", "counter"):
            raise ValueError(f"an argument of role {role}")
        pointer = Pointer(str(name), DTYPE_NAMES[dtype[1:]], role, int(index))
        return _read_described(pointer, *where) if dtype.startswith("&") else pointer
    name, type_, value = data
    return Scalar(str(name), parse_size(value), "i64" if type_ == "i64" else "i32")


def _read_described(
    pointer: Pointer,
    offset: str,
    shape: list[str],
    strides: list[str],
    box: list[int],
    swizzle: int = 128,
) -> Described:
    if not 0 < len(shape) == len(strides) == len(box) <= 5:
        raise ValueError(f"{pointer.name}: dimensions of a tensor map")
    if swizzle not in (0, 128):
        raise ValueError(f"{pointer.name}: lines of {swizzle} bytes in a tensor map")
    sizes, steps = (tuple(map(parse_size, texts)) for texts in (shape, strides))
    buffer = (pointer.name, pointer.dtype, pointer.role, pointer.index)
    return Described(*buffer, parse_size(offset), sizes, steps, tuple(map(int, box)), swizzle)


def _read_binary(facts: Mapping[str, Any], cubin: bytes) -> Binary:
    return Binary(
        str(facts["function"]),
        int(facts["arch"]),
        cubin,
        Resources(**{name: int(value) for name, value in facts["resources"].items()}),
        tuple(map(str, facts["parameters"])),
        int(facts["scratch_bytes"]),
        int(facts["scratch_align"]),
        int(facts["cluster"]),
        bool(facts["pdl"]),
        bool(facts["cooperative"]),
    )
