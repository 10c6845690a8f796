"""What all releases of Triton are made to do alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import triton.language as tl
from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.runtime import interpreter

from tilewright.codegen.triton.compat import assembler, in_its_words, repair_interpreter

KERNEL = """from triton.experimental import gluon
    boxes = tiles._reinterpret(tiles.dtype, [COUNT, PAGE], desc.layout)
    tma.async_copy_global_to_shared(desc, [row, 0], ready, boxes.index(0))
"""


def test_a_kernel_in_gluon_reaches_a_release_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shared_memory_descriptor, "reinterpret", raising=False)  # as to 3.8
    monkeypatch.delattr(tma, "async_load", raising=False)  # and to 3.7
    assert in_its_words(KERNEL) == KERNEL
    monkeypatch.setattr(tma, "async_load", None, raising=False)
    said = in_its_words(KERNEL)
    assert "tiles._reinterpret(tiles" in said and " tma.async_load(desc, [row" in said
    monkeypatch.setattr(shared_memory_descriptor, "reinterpret", None, raising=False)
    said = in_its_words(KERNEL)
    assert "tiles.reinterpret(tiles" in said and " tma.async_load(desc, [row" in said
    plain = KERNEL.replace("gluon", "language")
    assert in_its_words(plain) == plain


@pytest.mark.parametrize("arch, name", [(80, "ptxas"), (100, "ptxas-blackwell")])
@pytest.mark.parametrize("contracts", [False, True])
def test_the_assembler_is_the_one_of_the_architecture(
    arch: int, name: str, contracts: bool
) -> None:
    path, *options = assembler(arch, contracts=contracts)
    assert Path(path).name == name and Path(path).is_file()
    assert ("--fmad=false" in options) != contracts


def test_a_comparison_in_the_interpreter_finds_bits() -> None:
    """A scalar's integers would be no mask beside a block."""
    repair_interpreter()
    one = interpreter.TensorHandle(np.array([1, 2], np.int32), tl.int32)
    other = interpreter.TensorHandle(np.array([2, 1], np.int32), tl.int32)
    found = interpreter.interpreter_builder.create_icmpSLT(one, other)
    assert found.dtype == tl.int1 and found.data.tolist() == [True, False]
    halves = [interpreter.TensorHandle(np.array([x], np.float32), tl.float32) for x in (0.5, 1.5)]
    assert interpreter.interpreter_builder.create_fcmpOLT(*halves).dtype == tl.int1


def test_a_number_in_the_interpreter_is_an_index() -> None:
    """It is an array of one; Triton 3.6 leaves it to NumPy to make an integer of that."""
    repair_interpreter()

    class Tensor:
        handle = SimpleNamespace(data=np.array([3]))

    interpreter._patch_lang_tensor(Tensor, SimpleNamespace(set_attr=setattr))
    assert range(5)[Tensor()] == 3


def test_it_is_repaired_once() -> None:
    repair_interpreter()
    repaired = interpreter._patch_lang_tensor
    repair_interpreter()
    assert interpreter._patch_lang_tensor is repaired
