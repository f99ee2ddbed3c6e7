"""Registers loramix with PEFT the moment both are there, without importing PEFT for a mere `import loramix`.

`import loramix` must be enough for `PeftModel.from_pretrained` to know the method, and must not cost the ten seconds
that torch and PEFT take to import, since every `loramix --help` would pay them. So: if PEFT is imported already,
register now; else wait for its import (docs/decisions/0002-registration-on-import.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _register() -> None:
    import loramix.tuner  # noqa: F401  # importing it registers


class _ThenRegister(Loader):
    """Executes PEFT as its own loader would, then registers and lets the waiting end."""

    def __init__(self, loader: Loader, waiting: _WaitForPeft) -> None:
        self.loader = loader
        self.waiting = waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
        _register()


class _WaitForPeft(MetaPathFinder):
    """Meets the import of `peft`. It stays until PEFT was executed: transformers asks for the spec first, to see
    whether PEFT is installed, and throws that spec away."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec("peft")
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


def register_with_peft() -> None:
    """Registers now if PEFT is there, else when it comes."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WaitForPeft())
