"""The token by which a running task learns that it is to end."""

from __future__ import annotations

from moirai._native import CancelToken, current_token

__all__ = ["CancelToken", "current_token"]
