"""What both releases of Triton are made to do alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from triton.runtime import interpreter

from tilewright.codegen.triton.compat import repair_interpreter


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
