"""Kernel packages: what is written reads back, damage is refused, arguments fit the PTX."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tilewright.codegen.triton.aot import ARCHS, compile_sources, worker_environment
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.package import (
    Binary,
    KernelPackage,
    Resources,
    launch_key,
    read_package,
)
from tilewright.codegen.triton.source import (
    Described,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
)
from tilewright.errors import EngineError, UnsupportedError
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.types import TensorType

T = symbol("T")
TEXT = """import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, out_ptr, T, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < T)
    tl.store(out_ptr + index, x + x, mask=index < T)
"""


def doubled(text: str = TEXT, block: int = 64) -> KernelSource:
    launch = Launch(
        "doubled",
        (
            Pointer("x_ptr", DType.F32, "operand", 0),
            Pointer("out_ptr", DType.F32, "result", 0),
            Scalar("T", T),
        ),
        ((T + (block - 1)) // block, 1, 1),
        {"BLOCK": block},
    )
    return KernelSource("doubled", "generated", text, (Variant((launch,)),))


RESULT = TensorType(DType.F32, (T,))


def test_a_package_reads_back_from_its_files() -> None:
    (package,) = compile_sources([doubled()], 90)
    files = package.files()
    assert read_package(files.__getitem__, package.id) == package
    assert files[f"kernels/{package.id}/kernel.py"].decode() == TEXT
    meta = json.loads(files[f"kernels/{package.id}/meta.json"])
    assert meta["variants"][0]["launches"][0]["grid"] == ["(T + 63) // 64", "1", "1"]


def described(**changed: object) -> KernelPackage:
    """A kernel of one tensor map, as if it were compiled."""
    q = Described("q", DType.BF16, "operand", 0, 8, (T, 4, 64), (T * 2, 64, 1), (16, 4, 64))
    launch = Launch("f", (q, Pointer("out", DType.BF16, "result", 0)), (T, 1, 1))
    taken = ("b8", *["u32"] * 3, *["u64"] * 6)
    binary = Binary("f", 90, b"code", Resources(1, 0, 0, 0, 128), changed.get("types", taken))
    source = KernelSource("f", "template", "text", (Variant((launch,)),))
    return KernelPackage(source, {launch_key(launch): binary})


@pytest.mark.quick
def test_a_tensor_map_reads_back_from_its_files() -> None:
    package = described()
    files = package.files()
    assert read_package(files.__getitem__, package.id) == package
    (key,) = package.binaries
    lines = "swizzle_byte_width=128, element_bitwidth=16, rank=3"
    assert key.startswith(f"f(tensordesc<bf16[16, 4, 64],NVMMASharedLayout({lines})>,*bf16)")


@pytest.mark.quick
@pytest.mark.parametrize(
    "place, value", [(4, "T +"), (5, ["T", "4"]), (7, []), (8, 64), (2, "weight")]
)
def test_a_damaged_tensor_map_is_refused(place: int, value: object) -> None:
    package = described()
    files = package.files()
    path = f"kernels/{package.id}/meta.json"
    meta = json.loads(files[path])
    meta["variants"][0]["launches"][0]["arguments"][0][place] = value
    files[path] = json.dumps(meta).encode()
    with pytest.raises(EngineError, match="as this version writes them"):
        read_package(files.__getitem__, package.id)


@pytest.mark.quick
def test_a_binary_that_takes_no_map_is_refused() -> None:
    package = described(types=("u64", "u64", "u64", "u64"))
    with pytest.raises(EngineError, match="f takes"):
        read_package(package.files().__getitem__, package.id)


@pytest.mark.parametrize("name", ["kernel.py", "meta.json", "0.sm_90.cubin"])
def test_a_package_that_lacks_a_file_is_refused(name: str) -> None:
    (package,) = compile_sources([doubled()], 90)
    files = package.files()
    del files[f"kernels/{package.id}/{name}"]
    with pytest.raises(EngineError, match=f"kernel {package.id}: expected its kernel.py"):
        read_package(files.__getitem__, package.id)


@pytest.mark.parametrize("field", ["variants", "binaries", "name"])
def test_a_package_with_another_meta_is_refused(field: str) -> None:
    (package,) = compile_sources([doubled()], 90)
    files = package.files()
    path = f"kernels/{package.id}/meta.json"
    files[path] = json.dumps({k: v for k, v in json.loads(files[path]).items() if k != field})
    with pytest.raises(EngineError, match="as this version writes them"):
        read_package(files.__getitem__, package.id)


@pytest.mark.parametrize("arch", ARCHS)
def test_arguments_are_those_of_the_ptx_and_two_scratch_pointers(arch: int) -> None:
    (package,) = compile_sources([doubled()], arch)
    (binary,) = package.binaries.values()
    assert binary.arch == arch and binary.cubin[:4] == b"\x7fELF"
    assert binary.parameters == ("u64", "u64", "u32", "u64", "u64")
    assert binary.resources.local_bytes == 0 and binary.resources.threads == 128


def test_another_text_constant_or_target_is_another_kernel(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    kept = lambda: len(list(tmp_path.glob("kernels/*.json")))  # noqa: E731
    compile_sources([doubled(), doubled()], 90)
    compile_sources([doubled()], 90)
    assert kept() == 1
    compile_sources([doubled(block=128)], 90)
    compile_sources([doubled()], 80)
    compile_sources([doubled(TEXT.replace("x + x", "2 * x"))], 90)
    assert kept() == 4


@pytest.mark.parametrize(
    "name",
    # Which names are switches is tested below.
    [
        "PTXAS_OPTIONS",
        pytest.param("DISABLE_PTXAS_OPT", marks=pytest.mark.nightly),
        pytest.param("DISABLE_LLVM_OPT", marks=pytest.mark.nightly),
    ],
)
def test_switches_of_the_environment_change_no_code(name, tmp_path, monkeypatch) -> None:
    binaries = []
    for value in (None, "--opt-level 0" if name == "PTXAS_OPTIONS" else "1"):
        monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / str(value)))  # each compiles anew
        if value is not None:
            monkeypatch.setenv(name, value)
        binaries.append(compile_sources([doubled()], 90)[0].binaries)
    assert binaries[0] == binaries[1]


# What Triton reads that changes no code: compilers of launchers, and folders.
HARMLESS = {"CC", "LD_LIBRARY_PATH"}


@pytest.mark.quick
def test_workers_see_no_switch_that_triton_knows(monkeypatch) -> None:
    knobs = find_spec("triton").origin.replace("__init__.py", "knobs.py")
    known = set(re.findall(r'env_\w+\(\s*"([A-Z][A-Z0-9_]+)"', Path(knobs).read_text()))
    assert {"USE_IR_LOC", "DISABLE_PTXAS_OPT", "TRITON_OVERRIDE_ARCH", "CC"} <= known
    # Those that its C++ reads have no list; these stand in its library.
    known |= {"MLIR_ENABLE_DUMP", "LLVM_IR_ENABLE_DUMP", "DISABLE_LLVM_OPT", "DISABLE_MMA_V5"}
    for name in (*known, "LD_LIBRARY_PATH", "SOME_VARIABLE"):
        monkeypatch.setenv(name, "1")
    seen = worker_environment()
    assert known & seen.keys() - HARMLESS == {"TRITON_DISABLE_LINE_INFO"}
    assert seen["TRITON_DISABLE_LINE_INFO"] == "1"
    assert seen["CC"] == seen["LD_LIBRARY_PATH"] == seen["SOME_VARIABLE"] == "1"


def test_a_damaged_cache_entry_is_made_anew(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    (first,) = compile_sources([doubled()], 90)
    (entry,) = tmp_path.glob("kernels/*.json")
    entry.write_text(entry.read_text()[:100])
    assert compile_sources([doubled()], 90) == [first]


def test_an_architecture_that_triton_does_not_know_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"sm_52.*one of sm_80, .*backend='eager'"):
        compile_sources([doubled()], 52)


def test_a_kernel_that_does_not_compile_is_named_and_its_neighbours_are_not_lost() -> None:
    bad = doubled(TEXT.replace("index < T)", "index < unknown)"))
    with pytest.raises(UnsupportedError, match=r"(?s)kernel doubled.*sm_90.*unknown"):
        compile_sources([doubled(block=32), bad], 90)


def test_a_plan_takes_the_first_variant_that_fits_and_leaves_empty_grids_out() -> None:
    (one,) = doubled().variants
    (other,) = doubled(block=256).variants
    source = KernelSource("x", "generated", TEXT, (Variant(one.launches, (), (8 - T,)), other))
    small, large = (plan_call(source, [RESULT], {"T": n}) for n in (8, 300))
    assert small.launches[0][:2] == (one.launches[0], (1, 1, 1))
    assert large.launches[0][:2] == (other.launches[0], (2, 1, 1)) and large.results == ((300,),)
    assert plan_call(source, [RESULT], {"T": 0}).launches == ()


def test_the_interpreter_runs_it_at_any_size() -> None:
    kernel = InterpretedKernel(doubled(), [RESULT], (), torch.device("cpu"))
    for size in (1, 63, 64, 65, 0):
        x = torch.randn(size)
        assert torch.equal(kernel([x], {"T": size})[0], x + x)


def test_binaries_are_told_apart_by_all_that_is_compiled_in() -> None:
    keys = {
        launch_key(variant.launches[0])
        for source in (doubled(), doubled(block=32))
        for variant in source.variants
    }
    assert len(keys) == 2
