"""NumPy's dtypes as text and back, which the compiled channels call for what they carry."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
from numpy.lib import format as npy

__all__ = ["dtype_of", "text_of"]


def text_of(dtype: np.dtype[Any]) -> bytes:
    """How a dtype is written: as in the header of a `.npy` file."""
    return repr(npy.dtype_to_descr(dtype)).encode()


def dtype_of(text: bytes) -> np.dtype[Any]:
    """The dtype that is written so."""
    return npy.descr_to_dtype(ast.literal_eval(text.decode()))
