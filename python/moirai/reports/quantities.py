"""Numbers as people read them: bytes in binary units, seconds, counts, shares."""

__all__ = ["bytes_text", "count_text", "seconds_text", "share_text"]


def bytes_text(size_bytes: float) -> str:
    """Write a size in the largest binary unit that leaves at least 1: 1536 is "1.5 KiB"."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes:.0f} B"
    value = float(size_bytes)
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    value /= 1024
    while abs(value) >= 1023.5 and unit != "PiB":
        unit = next(units)
        value /= 1024
    return f"{value:.0f} {unit}" if abs(value) >= 99.95 else f"{value:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """Write a duration with at most three digits that count: "85 ms", "2.41 s", "312 s"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.995 else f"{seconds:.0f} s"


def count_text(count: int) -> str:
    """Write a count with its thousands set apart: "1 234 567"."""
    return f"{count:,}".replace(",", " ")


def share_text(part: float, whole: float) -> str:
    """Write a share in percent; "-" of nothing. Never 100 % or 0 % unless it is exactly that."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 1:
        return "< 1 %"
    if 99 < percent < 100:
        return "> 99 %"
    return f"{percent:.0f} %"
