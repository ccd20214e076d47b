"""Imports modules of the benchmarks for a test, and forgets them."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@contextlib.contextmanager
def importable(monkeypatch, *folders: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Within the block modules in these folders can be imported, as by scripts there. They are forgotten before it and
    after it: several folders have modules of the same name, and the classes of one import do not fit those of another.
    """
    forget()
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    forget()


def forget() -> None:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]
