"""What all releases of Triton are made to do alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import triton.language as tl
from triton.experimental.gluon.language import shared_memory_descriptor
from triton.runtime import interpreter

from tilewright.codegen.triton.compat import assembler, in_its_words, repair_interpreter

KERNEL = """from triton.experimental import gluon
    boxes = tiles._reinterpret(tiles.dtype, [COUNT, PAGE], desc.layout)
    tma.async_copy_global_to_shared(desc, [row, 0], ready, boxes.index(0))
"""


def test_a_kernel_in_gluon_reaches_a_release_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory_descriptor, "_reinterpret", None, raising=False)  # to 3.8
    assert in_its_words(KERNEL) == KERNEL
    monkeypatch.delattr(shared_memory_descriptor, "_reinterpret")
    said = in_its_words(KERNEL)
    assert "tiles.reinterpret(tiles" in said and " tma.async_load(desc, [row" in said
    plain = KERNEL.replace("gluon", "language")
    assert in_its_words(plain) == plain


@pytest.mark.parametrize("arch, name", [(80, "ptxas"), (100, "ptxas-blackwell")])
def test_the_assembler_is_the_one_of_the_architecture(arch: int, name: str) -> None:
    path = Path(assembler(arch))
    assert path.name == name and path.is_file()


def test_a_comparison_in_the_interpreter_finds_bits() -> None:
    """A scalar's integers would be no mask beside a block."""
    repair_interpreter()
    one = interpreter.TensorHandle(np.array([1, 2], np.int32), tl.int32)
    other = interpreter.TensorHandle(np.array([2, 1], np.int32), tl.int32)
    found = interpreter.interpreter_builder.create_icmpSLT(one, other)
    assert found.dtype == tl.int1 and found.data.tolist() == [True, False]


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
