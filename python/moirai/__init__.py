"""Moirai: command of a program's memory: see it, shape it, share it, stay within it.

Importing this package is cheap and imports neither NumPy nor the compiled core; its modules do.

- `moirai.memory`: resources that blocks come from, and NumPy drawing from them.
- `moirai.errors`: every exception.
- `moirai run app.py` in a shell: any program under Moirai, unchanged.
"""

from importlib import metadata as _metadata

__all__ = ["__version__"]

__version__ = _metadata.version("moirai-runtime")
