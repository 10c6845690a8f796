"""What differs between the releases of Triton that we support, 3.6 to 3.9, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

_COMPARISONS = ("create_icmp", "create_fcmp")


def compile_ahead_of_time(
    function: Any,
    types: Sequence[str],
    constexprs: Mapping[str, object],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    contracts: bool,
    pdl: bool = False,
) -> Any:
    """Compiles a ``@triton.jit`` or ``@gluon.jit`` function without a device.

    Args:
        function: the function; its first parameters are the run-time ones.
        types: of the run-time parameters, in order, as Triton spells them. Pointers are taken to
            be divisible by 16.
        constexprs: value of each of the other parameters.
        arch: compute capability, 90 for sm_90.
        contracts: whether a product and a sum may become one instruction that rounds once.
        pdl: whether the kernel is launched before what it depends on has ended.

    Returns:
        Triton's compiled kernel: ``asm`` by kind, ``metadata``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(function.arg_names)
    signature = dict(zip(names, types, strict=False))
    signature.update(dict.fromkeys(names[len(types) :], "constexpr"))
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    pointers = {
        (index,): [["tt.divisibility", 16]]
        for index, type_ in enumerate(types)
        if type_.startswith("*")
    }
    kind: Any = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    source = kind(function, signature, constants, pointers)
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": contracts,
        "launch_pdl": pdl,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def assembler(arch: int, *, contracts: bool) -> list[str]:
    """The command that Triton makes machine code for an architecture with, but for its files. It
    brings two assemblers, and 3.9 takes the newer one from sm_90 on, where it was from sm_100 on.

    Args:
        arch, contracts: as `compile_ahead_of_time` takes them.
    """
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    command = [get_ptxas(arch).path]
    if not contracts:
        command.append("--fmad=false")
    if not triton.__version__.startswith("3.6."):
        command.append("--regAllocOptLevel=2")
    return command


def in_its_words(text: str) -> str:
    """A kernel's text in the words of the Triton at hand, for its compiler.

    Texts are in the words of 3.6, whatever compiles them: records, engines and baselines know a
    kernel by a digest of its text, and what a release calls its functions makes no other kernel.
    """
    if "gluon" not in text:
        return text
    from triton.experimental.gluon.language import shared_memory_descriptor
    from triton.experimental.gluon.language.nvidia.hopper import tma

    for owner, ours, theirs in (
        (tma, "async_copy_global_to_shared", "async_load"),  # 3.9 keeps ours, to raise
        (shared_memory_descriptor, "_reinterpret", "reinterpret"),
    ):
        if hasattr(owner, theirs):
            text = text.replace(f".{ours}(", f".{theirs}(")
    return text


def repair_interpreter() -> None:
    """Lets Triton's interpreter compute with bfloat16 and e4m3 as devices do.

    All releases cut float32 off where hardware rounds to nearest even, lose subnormal numbers,
    take other types' bits for bfloat16's, multiply its matrices as if they were integers, and give
    the half of an e4m3 that is rounded up to a power of two. And every sum and product of integers
    is computed twice, to see whether it overflows, which no device does and takes a third of the
    time. What a comparison finds has its operands' type, so that a scalar beside a block becomes
    their integers, which Triton 3.9 refuses as a mask. Triton 3.6 makes an index of an array of one
    number, which NumPy 2.4 refuses.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "tilewright_repaired", False):
        return
    convert, cast, dot = interpreter._convert_float, builder.cast_impl, builder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float8e4nv, tl.float32):
            codes = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return codes.float().numpy().view(np.uint32)
        if (source, target) == (tl.float32, tl.float8e4nv):  # devices saturate
            wide = torch.from_numpy(np.ascontiguousarray(data)).clamp(-448.0, 448.0)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        quiet = (bits >> 16) | 0x40
        return np.where(np.isnan(data), quiet, nearest).astype(np.uint16)

    def through_float32(self: Any, value: Any, type_: Any) -> Any:
        source, target = value.dtype.scalar, type_.scalar
        if tl.bfloat16 in (source, target) and tl.float32 not in (source, target):
            value = cast(self, value, tl.float32)
        return cast(self, value, type_)

    def wide_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = [_widened(self, x) for x in (a, b)]
        return dot(self, *wide, d, *options)

    def _widened(self: Any, x: Any) -> Any:
        if x.dtype.scalar == tl.float8e4nv:
            return self.create_fp_to_fp(x, tl.float32, None)
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def of_bits(compare: Any) -> Any:
        def compared(self: Any, a: Any, b: Any) -> Any:
            found = compare(self, a, b)
            found.dtype = tl.int1
            return found

        return compared

    names = [name for name in vars(builder) if name.startswith(_COMPARISONS)]
    assert names, "the interpreter compares elsewhere"
    for name in names:
        setattr(builder, name, of_bits(getattr(builder, name)))
    interpreter._convert_float = rounded
    interpreter._patch_lang_tensor = with_index
    builder.create_dot = wide_dot
    builder.cast_impl = through_float32
    builder.tilewright_repaired = True
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def interpret_programs(
    function: Any,
    grid: tuple[int, int, int],
    programs: Iterable[tuple[int, int, int]],
    arguments: Sequence[Any],
    constexprs: Mapping[str, object],
) -> None:
    """Runs some programs of a launch in Triton's interpreter, one after the other.

    Triton's own way in runs them all, and patches ``triton.language`` anew for each function that
    a program calls, which takes a third of the time; here it is patched once a launch.

    Args:
        function: the ``@triton.jit`` function.
        grid: of the whole launch.
        programs: the index of each that is run.
        arguments: the run-time ones, in order; tensors are on the CPU.
        constexprs: value of each of the other parameters.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    # Library functions see the language as ``core``, kernels as ``tl``.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch = interpreter._patch_lang
    scope = patch(both)
    interpreter._patch_lang = lambda _: None
    try:
        body = function.rewrite()
        given = [interpreter._implicit_cvt(argument) for argument in arguments]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for program in programs:
            interpreter.interpreter_builder.set_grid_idx(*program)
            body(*given, **constexprs)
    finally:
        interpreter._patch_lang = patch
        if scope is not None:  # some releases leave the language patched
            scope.restore()
