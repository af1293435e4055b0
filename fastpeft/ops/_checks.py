"""The only place that words an error: ``<op>: <argument> must <rule>, got <value>``.

A check that runs at every call has a quick twin, `<check>_fits`, right below it. The twin makes the same tests and
returns True or False; an exception in it (`UNFIT`) counts as False. tests/ops/test_checks_agree.py proves that they
agree.
"""

from __future__ import annotations

import numbers

import torch

UNFIT = (AttributeError, TypeError, ValueError, IndexError, RuntimeError)
"""What a quick twin may raise on an argument of an unexpected kind; a nested tensor, for one, has no shape."""

STRIDED = torch.strided

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require(holds: bool, op: str, argument: str, rule: str, got: object) -> None:
    """Raise a ValueError in the package's wording unless ``holds``."""
    if not holds:
        raise ValueError(f"{op}: {argument} must {rule}, got {got}")


def require_dtype(holds: bool, op: str, argument: str, rule: str, got: object) -> None:
    """Raise a TypeError in the package's wording unless ``holds``."""
    if not holds:
        raise TypeError(f"{op}: {argument} must {rule}, got {got}")


def tensor(op: str, argument: str, value: object) -> None:
    require_dtype(isinstance(value, torch.Tensor), op, argument, "be a tensor", type(value).__name__)


def dense(op: str, argument: str, value: object) -> None:
    """An ordinary strided tensor: not sparse, not nested, not in a vendor's layout."""
    tensor(op, argument, value)
    assert isinstance(value, torch.Tensor)
    plain = value.layout is STRIDED and not value.is_nested
    got = "a nested tensor" if value.is_nested else value.layout
    require_dtype(plain, op, argument, "be a dense tensor (torch.strided)", got)


def floats(op: str, argument: str, dtype: object) -> None:
    require_dtype(dtype in FLOATS, op, argument, "be float32, bfloat16, float16 or float64", dtype)


def activation(op: str, x: torch.Tensor) -> None:
    dense(op, "x", x)
    floats(op, "x", x.dtype)
    require(x.dim() >= 1, op, "x", "have at least one dimension", "a 0-d tensor")


def one_of(op: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    require(value in choices, op, argument, f"be one of {', '.join(map(str, choices))}", repr(value))


def size_of(op: str, argument: str, value: object, choices: tuple[int, ...]) -> None:
    """An int among ``choices``; an equal float, such as 64.0, fits no operator's schema."""
    require_dtype(type(value) is int, op, argument, "be an int", repr(value))
    one_of(op, argument, value, choices)


def matrix(op: str, argument: str, value: torch.Tensor, shape: tuple[int | None, int | None], names: str) -> None:
    """A float tensor of two dimensions; None in ``shape`` leaves that one free."""
    dense(op, argument, value)
    ok = value.dim() == 2 and all(want is None or have == want for have, want in zip(value.shape, shape, strict=True))
    sizes = ", ".join("any" if want is None else str(want) for want in shape)
    require(ok, op, argument, f"have shape {names} = [{sizes}]", list(value.shape))
    require_dtype(value.is_floating_point(), op, argument, "be a floating point tensor", value.dtype)


def vector(op: str, argument: str, value: torch.Tensor | None, size: int, name: str) -> None:
    if value is None:
        return
    dense(op, argument, value)
    require(value.shape == (size,), op, argument, f"have shape [{name}] = [{size}]", list(value.shape))
    require_dtype(value.is_floating_point(), op, argument, "be a floating point tensor", value.dtype)


def bits(op: str, argument: str, value: torch.Tensor | None, rows: int, columns: int) -> None:
    """A mask of one bit per element of [rows, columns], each row padded to whole bytes."""
    if value is None:
        return
    tensor(op, argument, value)
    require_dtype(value.dtype == torch.uint8, op, argument, "be uint8", value.dtype)
    shape = [rows, -(-columns // 8)]
    require(list(value.shape) == shape, op, argument, f"have shape {shape}, a bit an element", list(value.shape))
    require(value.is_contiguous(), op, argument, "be contiguous", f"strides {value.stride()}")


def masks(op: str, value: object, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
    """A pair of bit masks, for A and for Bᵀ, on their device."""
    pair = isinstance(value, tuple) and len(value) == 2
    require_dtype(pair, op, "masks", "be a pair of bits for lora_A and lora_B", type(value).__name__)
    assert isinstance(value, tuple)
    for name, each, rows, columns in (
        ("masks[0]", value[0], *lora_A.shape),
        ("masks[1]", value[1], lora_B.shape[1], lora_B.shape[0]),
    ):
        bits(op, name, each, rows, columns)
        same_device(op, lora_A.device, **{name: each})


def vector_fits(value: torch.Tensor | None, size: int, device: torch.device) -> bool:
    """Same tests as ``vector`` and ``same_device``, returning a bool."""
    return value is None or (
        value.shape == (size,) and value.device == device and value.is_floating_point() and value.layout is STRIDED
    )


def entrance(
    op: str, x: torch.Tensor, name: str, width: int, device: torch.device, *, sure: tuple[bool, bool] = (True, True)
) -> None:
    """Check x against the first parameter, ``name``, which takes inputs of ``width`` on ``device``.

    On a mismatch the error names x, because x is new in each call, unless another parameter contradicts the first
    one: ``sure`` says whether all agree on its width and on its device.
    """
    rule = f"have shape [..., in_features] = [..., {width}]"
    require(x.shape[-1] == width or not sure[0], op, "x", rule, list(x.shape))
    require(x.device == device or not sure[1], op, "x", f"be on the device of {name}, {device}", x.device)


def same_device(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    for argument, value in tensors.items():
        if value is not None and value.device != device:
            require(False, op, argument, f"be on the device of x, {device}", value.device)


def adapter(
    op: str,
    x: torch.Tensor,
    N: int | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_bias: torch.Tensor | None,
    dropout: float,
) -> None:
    """Check the factors of an adapter from x's last dimension to N; with N = None lora_B sets it."""
    matrix(op, "lora_A", lora_A, (None, x.shape[-1]), "[rank, in_features]")
    require(lora_A.shape[0] >= 1, op, "lora_A", "have a rank of at least 1", 0)
    matrix(op, "lora_B", lora_B, (N, lora_A.shape[0]), "[out_features, rank]")
    vector(op, "lora_bias", lora_bias, lora_B.shape[0], "out_features")
    same_device(op, x.device, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias)
    probability(op, "dropout", dropout)


def adapter_fits(
    K: int,
    N: int,
    device: torch.device,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_bias: torch.Tensor | None,
    dropout: float,
) -> bool:
    """Same tests as ``adapter`` for x [..., K] on ``device``, returning a bool."""
    # Size by size: comparing two torch.Size costs a tiny call another per cent.
    (rank, width), (out, inner) = lora_A.shape, lora_B.shape
    return (
        width == K
        and out == N
        and inner == rank > 0
        and lora_A.device == device == lora_B.device
        and lora_A.is_floating_point()
        and lora_B.is_floating_point()
        and lora_A.layout is STRIDED is lora_B.layout
        and (lora_bias is None or vector_fits(lora_bias, N, device))
        and (type(dropout) is float or (isinstance(dropout, (float, int)) and dropout is not False))
        and 0.0 <= dropout < 1.0
    )


def probability(op: str, argument: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        require_dtype(False, op, argument, "be a float", type(value).__name__)
    require(0.0 <= value < 1.0, op, argument, "be in [0, 1)", value)


def scale(op: str, value: object) -> None:
    """One factor for the whole update: more elements would broadcast, over the rank or the rows of B."""
    rule = "be a real number or a 0-d tensor of one"
    if isinstance(value, torch.Tensor):
        require(value.dim() == 0, op, "scale", rule, f"shape {list(value.shape)}")
        require_dtype(value.dtype != torch.bool and not value.is_complex(), op, "scale", rule, value.dtype)
    else:
        # Real covers numpy's numbers; a SymFloat is a float traced with its value left open.
        known = isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
        require_dtype(known, op, "scale", rule, type(value).__name__)


def seed(op: str, value: torch.Tensor | None, p: float) -> None:
    """A mask needs its seed: an int64 tensor of one element."""
    if p == 0.0:
        return
    require(value is not None, op, "seed", "be given where p > 0", None)
    assert value is not None
    require_dtype(value.dtype == torch.int64, op, "seed", "be int64", value.dtype)
    require(value.numel() == 1, op, "seed", "have one element", value.numel())
