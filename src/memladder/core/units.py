"""Bytes are integers everywhere inside; MiB exists only where something is printed."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def mib(size: int) -> float:
    """Bytes as MiB.

    >>> mib(3 * MIB // 2)
    1.5
    """
    return size / MIB


def format_bytes(size: int | None) -> str:
    """Bytes for a person: MiB below 10 GiB, GiB from there on, always with the unit.

    >>> format_bytes(1632 * MIB), format_bytes(24 * GIB), format_bytes(None)
    ('1632.0 MiB', '24.0 GiB', 'unknown')
    """
    if size is None:
        return "unknown"
    if abs(size) < 10 * GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.1f} GiB"
