"""Moirai: command of a program's memory: see it, shape it, share it, stay within it.

Importing this package is cheap and imports neither NumPy nor the compiled core; its modules do.

- `moirai.memory`: resources that blocks come from, and NumPy drawing from them.
- `moirai.pools`: objects, buffers and vectors, kept for their next user.
- `moirai.pressure`: what is used of the memory limit, and responses before it is reached.
- `moirai.errors`: every exception.
- `moirai run app.py` in a shell: any program under Moirai, unchanged.
"""

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    # Looked up when asked for: reading the metadata costs more than the rest of the import.
    if name != "__version__":
        raise AttributeError(f"module 'moirai' has no attribute {name!r}")
    from importlib import metadata

    return metadata.version("moirai-runtime")
