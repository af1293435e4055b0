"""The GPU for which a table or a model is consulted. Only the standard library is imported."""


class Gpu(int):
    """A compute capability, 90 for 9.0, that knows its device; a plain 90 stands for any device of that capability.

    name         as the driver gives it, "NVIDIA H200"
    bytes_per_s  of its memory by clock and bus width; 0.0 where unknown
    """

    name: str
    bytes_per_s: float

    def __new__(cls, cc: int, name: str = "", bytes_per_s: float = 0.0) -> "Gpu":
        self = super().__new__(cls, cc)
        self.name, self.bytes_per_s = name, bytes_per_s
        return self

    def __eq__(self, other: object) -> bool:
        return int.__eq__(self, other) is True and self.name == getattr(other, "name", "")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def as_gpu(cc) -> Gpu:
    """A Gpu unchanged; 90 or (9, 0) as a Gpu without a name."""
    return cc if isinstance(cc, Gpu) else Gpu(cc if isinstance(cc, int) else 10 * cc[0] + cc[1])


def table_keys(cc) -> tuple[str, ...]:
    """Keys to try in a tuned table, in order: the device's own name, then its compute capability."""
    gpu = as_gpu(cc)
    return (gpu.name, f"sm{int(gpu)}") if gpu.name else (f"sm{int(gpu)}",)
