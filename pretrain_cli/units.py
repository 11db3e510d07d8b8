"""Human-readable numbers, sizes and durations."""

import re
from decimal import Decimal

COUNTS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3, "": 1}


def amount(number: float) -> str:
    """Format a number in short form: 1234567 is 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Format bytes in decimal units: 1.2 GB."""
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {letter}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format seconds as 5d03h, 1h02m, 3m20s or 12s."""
    seconds = round(seconds)
    if seconds >= 2 * 86400:
        return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def in_number(words: str) -> int:
    """Parse 5B, 1.5T, 200M, 10k or 1000000 as an int. Raises ValueError for any other text, for a
    fraction and for a number below 1."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([TBMK]?)", words.strip().upper())
    number = Decimal(match[1]) * COUNTS[match[2]] if match else Decimal(0)
    if number < 1 or number != int(number):
        raise ValueError(words)
    return int(number)
