"""Two versions of this package in one process, so that old and new can take turns on one device.

All imports within the package are relative, so a checkout can be imported under any name: its
modules are then that name's, apart from those of the version that runs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ....errors import EngineError


class Package:
    """A checkout, imported under a name of its own.

    Args:
        root: of the checkout.
        name: that its modules get; one that is taken must be of the same checkout.

    Raises:
        EngineError: it cannot be imported.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        if name not in sys.modules:
            self._import()
        there = Path(sys.modules[name].__file__ or "").resolve().parent
        if there != root.resolve():
            raise self._unusable(f"{name} imported from {there}")

    def module(self, path: str) -> ModuleType:
        """A module by its path within the package: "runtime.engine"."""
        try:
            return import_module(f"{self.name}.{path}")
        except Exception as error:  # whatever a module of another version does at import
            raise self._unusable(f"{type(error).__name__}: {error}") from error

    def _import(self) -> None:
        init = self.root / "__init__.py"
        spec = spec_from_file_location(self.name, init, submodule_search_locations=[str(self.root)])
        if spec is None or spec.loader is None:
            raise self._unusable("no package")
        module = sys.modules[self.name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[self.name]
            raise self._unusable(f"{type(error).__name__}: {error}") from error

    def _unusable(self, found: str) -> EngineError:
        return EngineError(
            f"the code in {self.root}",
            expected="a version of this package that can be timed beside this one",
            found=found,
            remedy="Compare with a newer commit.",
        )
