"""From a kernel's text to its functions: Triton reads the source of functions from files."""

from __future__ import annotations

import hashlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def module_of(text: str, folder: Path) -> ModuleType:
    """The module that ``text``, which this process generated, makes, by way of a file in
    ``folder``.
    """
    name = f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
