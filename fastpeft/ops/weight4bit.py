"""Weight4bit: the packed bytes, their scales, and conversion to and from both of bitsandbytes' forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256

_OP = "Weight4bit"
_INTS = (int, torch.SymInt)
_STATE = "quant_state.bitsandbytes__"
_STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def blocks_of(quant_type: str, block_size: int, double_quant: bool = False) -> str:
    """The format in words."""
    return f"{quant_type} in blocks of {block_size}{', absmax in 8 bits' if double_quant else ''}"


@dataclass(eq=False, repr=False)
class Weight4bit:
    """A weight of n elements in 4 bits each.

    packed      uint8 [⌈n/2⌉], or [⌈n/2⌉, 1] as bitsandbytes has it: two elements of the row-major weight to a byte, the
                first in the high nibble
    scales      [absmax]: fp32 [nblocks], or doubly quantised [codes, code, scale, offset]: uint8 [nblocks], fp32 [256],
                fp32 [⌈nblocks/256⌉], fp32 []
    shape       of the weight
    dtype       of the weight that was quantised, and of what ``dequantize_4bit`` gives unless told
    quant_type  "nf4" | "fp4"
    block_size  elements that share an absmax
    """

    packed: torch.Tensor
    scales: list[torch.Tensor]
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int

    @property
    def double_quant(self) -> bool:
        return len(self.scales) == 4

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + sum(scale.nbytes for scale in self.scales)

    def __repr__(self) -> str:
        parts = {"shape": list(self.shape), "dtype": self.dtype, "quant_type": self.quant_type}
        parts |= {"block_size": self.block_size, "double_quant": self.double_quant, "device": self.device}
        return f"{_OP}({', '.join(f'{name}={value}' for name, value in parts.items())})"

    def absmax(self) -> torch.Tensor:
        """fp32 [nblocks], dequantised if it is quantised itself."""
        if not self.double_quant:
            return self.scales[0]
        codes, code, scale, offset = self.scales
        return code[codes.long()] * scale.repeat_interleave(NESTED_BLOCK)[: codes.numel()] + offset

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight4bit:
        """The same weight with ``change`` applied to every tensor; ``change`` keeps dtype and shape."""
        return replace(self, packed=change(self.packed), scales=[change(scale) for scale in self.scales])

    def to(self, device: torch.device | str | int) -> Weight4bit:
        """On ``device``; a dtype is refused, because the bytes and their scales mean nothing in another one."""
        known = isinstance(device, (torch.device, str, int)) and not isinstance(device, bool)
        _checks.require_dtype(known, _OP, "device", "be a device", repr(device))
        return self.map(lambda tensor: tensor.to(device))

    def clone(self) -> Weight4bit:
        return self.map(torch.clone)

    def sound(self) -> bool:
        """Same tests as ``check`` in one cheap conjunction; may raise (`UNFIT`) if a part is no tensor."""
        if self.quant_type not in QUANT_TYPES or type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            return False
        if not all(isinstance(size, _INTS) and size >= 0 for size in self.shape):
            return False
        packed, scales, n = self.packed, self.scales, math.prod(self.shape)
        blocks, device, absmax, nested = -(-n // self.block_size), packed.device, scales[0], len(scales) == 4
        return (
            packed.numel() == (n + 1) // 2
            and packed.dtype is torch.uint8
            and packed.is_contiguous()
            and absmax.shape == (blocks,)
            and absmax.dtype is (torch.uint8 if nested else torch.float32)
            and absmax.device == device
            and absmax.is_contiguous()
            and (
                len(scales) == 1
                or (
                    nested
                    and scales[1].shape == (256,)
                    and scales[2].shape == (-(-blocks // NESTED_BLOCK),)
                    and scales[3].dim() == 0
                    and scales[1].dtype is scales[2].dtype is scales[3].dtype is torch.float32
                    and scales[1].device == scales[2].device == scales[3].device == device
                    and scales[1].is_contiguous()
                    and scales[2].is_contiguous()
                )
            )
        )

    def check(self, op: str = _OP, argument: str = "weight") -> None:
        """Check that every part has the size, dtype and device that shape, quant_type and block_size ask for.

        Raises     ValueError, TypeError.
        """
        shape, n = list(self.shape), math.prod(self.shape)  # in Python's integers, which do not wrap
        ints = all(isinstance(size, _INTS) for size in shape)
        _checks.require_dtype(ints, op, f"{argument}.shape", "hold ints", shape)
        _checks.require(min(shape, default=0) >= 0, op, f"{argument}.shape", "hold no negative size", shape)
        _checks.one_of(op, f"{argument}.quant_type", self.quant_type, QUANT_TYPES)
        _checks.size_of(op, f"{argument}.block_size", self.block_size, BLOCK_SIZES)
        blocks = -(-n // self.block_size)
        _checks.require(
            len(self.scales) in (1, 4), op, f"{argument}.scales", "have 1 tensor or 4", f"{len(self.scales)} of them"
        )
        f32, u8 = torch.float32, torch.uint8
        parts: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]]
        parts = [("absmax", self.scales[0], u8 if self.double_quant else f32, (blocks,))]
        if self.double_quant:
            _, code, scale, offset = self.scales
            parts += [("code", code, f32, (256,)), ("scale", scale, f32, (-(-blocks // NESTED_BLOCK),))]
            parts += [("offset", offset, f32, ())]
        for name, tensor, dtype, sizes in [("packed", self.packed, u8, ((n + 1) // 2,)), *parts]:
            _checks.tensor(op, f"{argument}.{name}", tensor)
            # Kernels read the bytes in memory order, whatever their shape.
            fits = tensor.numel() == sizes[0] if name == "packed" else tensor.shape == sizes
            _checks.require(fits, op, f"{argument}.{name}", f"have shape {list(sizes)}",
                            list(tensor.shape))  # fmt: skip
            _checks.require_dtype(tensor.dtype == dtype, op, f"{argument}.{name}", f"be {dtype}", tensor.dtype)
            _checks.require(tensor.is_contiguous(), op, f"{argument}.{name}", "be contiguous", tensor.stride())
            _checks.require(tensor.device == self.device, op, f"{argument}.{name}",
                            f"be on the device of packed, {self.device}", tensor.device)  # fmt: skip

    def quant_map(self) -> torch.Tensor:
        """The 16 values of quant_type, fp32 [16]."""
        out = torch.empty(16, dtype=torch.float32)
        nibbles = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8)
        dispatch.load("dequantize_4bit", "eager")(nibbles, [torch.ones(1)], self.quant_type, 32, out)
        return out.to(self.device)

    def to_quant_state(self) -> tuple[torch.Tensor, Any]:
        """(data, state) as bitsandbytes.functional.quantize_4bit returns them: data [⌈n/2⌉, 1], and a QuantState.

        The tensors are shared, not copied.  Raises ImportError: bitsandbytes is not installed.
        """
        from bitsandbytes.functional import QuantState

        known = {"shape": torch.Size(self.shape), "blocksize": self.block_size, "dtype": self.dtype}
        known |= {"quant_type": self.quant_type, "code": self.quant_map()}
        if not self.double_quant:
            return self.packed.view(-1, 1), QuantState(self.scales[0], **known)
        codes, code, scale, offset = self.scales
        nested = QuantState(scale, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return self.packed.view(-1, 1), QuantState(codes, offset=offset, state2=nested, **known)

    @classmethod
    def from_quant_state(cls, data: torch.Tensor, state: Any) -> Weight4bit:
        """A weight from bitsandbytes' packed ``data``, of any storage dtype and shape, and its QuantState; no copy.

        Raises     ValueError, TypeError: a part that is missing or does not fit, or a CPU's repacked data.
        """
        repacked = getattr(state, "packing_format_for_cpu", False)
        _checks.require(not repacked, _OP, "data", "be in bitsandbytes' storage format",
                        "the format that it repacks a weight to for inference on a CPU")  # fmt: skip
        scales = [state.absmax]
        if state.nested:
            nested = state.state2
            _checks.require(
                nested.blocksize == NESTED_BLOCK, _OP, "state2.blocksize", f"be {NESTED_BLOCK}", nested.blocksize
            )
            # bitsandbytes reads the offset from JSON, in torch's default dtype at that time.
            offset = state.offset.to(state.absmax.device, torch.float32).reshape(())
            scales = [state.absmax, nested.code, nested.absmax, offset]
        _checks.tensor(_OP, "data", data)
        weight = cls(_bytes(data), scales, state.shape, state.dtype, state.quant_type, state.blocksize)
        weight.check(argument="state")
        return weight

    def to_parts(self) -> dict[str, torch.Tensor]:
        """What bitsandbytes' Linear4bit adds to its state dict under "weight.": tensors, and the rest as JSON bytes.

        On meta the tensors are meta. The JSON bytes are real, but hold null for the offset of doubly quantised scales:
        only ``from_parts`` with meta data reads them again.
        """
        rest: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.block_size}
        rest |= {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        parts = {"absmax": self.scales[0], "quant_map": self.quant_map()}
        if self.double_quant:
            _, code, scale, offset = self.scales
            # A copy: safetensors refuses tensors that share memory, and layers may share this one.
            parts |= {"nested_absmax": scale, "nested_quant_map": code.clone()}
            rest |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            # A meta tensor has no value to write: null instead, which no reader of real data accepts.
            rest["nested_offset"] = None if offset.is_meta else offset.item()
        text = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
        return parts | {_STATE + self.quant_type: text}

    def part_names(self) -> list[str]:
        """The keys of ``to_parts``, in its order, without making or reading a tensor."""
        return _part_names(self.quant_type, self.double_quant)

    @classmethod
    def from_parts(cls, data: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> Weight4bit:
        """A weight from ``data`` and the entries of ``to_parts``; no copy.

        Raises     ValueError, TypeError: a part that is missing, unknown or does not fit.
        """
        _checks.tensor(_OP, "data", data)
        for name, part in parts.items():
            _checks.tensor(_OP, name, part)
        states = [_STATE + name for name in QUANT_TYPES]
        named = [name for name in states if name in parts]
        _checks.require(len(named) == 1, _OP, "parts", f"hold one of {' and '.join(states)}", sorted(parts))
        rest = _read_json(parts[named[0]])
        quant_type = named[0].removeprefix(_STATE)
        # bitsandbytes finds the bytes by the key's name, but reads the quant_type inside them.
        _checks.require(rest["quant_type"] == quant_type, _OP, f"quant_type in {named[0]}", f"be {quant_type}",
                        rest["quant_type"])  # fmt: skip
        double = "nested_offset" in rest
        expected = sorted(_part_names(quant_type, double))
        _checks.require(sorted(parts) == expected, _OP, "parts", f"be {expected}", sorted(parts))
        _checks.one_of(_OP, "dtype", rest["dtype"], tuple(_DTYPES))
        scales = [parts["absmax"]]
        if double:
            size = rest.get("nested_blocksize")
            _checks.require(size == NESTED_BLOCK, _OP, "nested_blocksize", f"be {NESTED_BLOCK}", size)
            value = math.nan if data.is_meta else _offset(rest["nested_offset"])
            offset = torch.tensor(value, dtype=torch.float32, device=data.device)
            scales += [parts["nested_quant_map"], parts["nested_absmax"], offset]
        weight = cls(
            _bytes(data),
            scales,
            torch.Size(rest["shape"]),
            _DTYPES[rest["dtype"]],
            quant_type,
            rest["blocksize"],
        )
        weight.check(argument="parts")
        table, found = weight.quant_map(), parts["quant_map"]
        same = found.is_meta or (found.shape == table.shape and torch.allclose(found.to(table), table, atol=1e-6))
        if not same:
            _checks.require(False, _OP, "quant_map", f"be the table of {weight.quant_type}", found.tolist())
        return weight


def _part_names(quant_type: str, double_quant: bool) -> list[str]:
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    return ["absmax", "quant_map", *nested, _STATE + quant_type]


def _bytes(data: torch.Tensor) -> torch.Tensor:
    """The bytes of ``data`` as a 1-D view, also if they are stored under a float dtype."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORAGE)
    _checks.require_dtype(data.dtype in _STORAGE, _OP, "data", f"be stored as {names}", data.dtype)
    return data.detach().reshape(-1).view(torch.uint8)


def _offset(value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _checks.require_dtype(number, _OP, "nested_offset", "be a number", repr(value))
    assert isinstance(value, (int, float))
    # The offset is added to every absmax: if it is not finite in fp32, no weight is.
    _checks.require(abs(value) <= torch.finfo(torch.float32).max, _OP, "nested_offset", "be finite in fp32", value)
    return float(value)


def _read_json(text: torch.Tensor) -> dict[str, Any]:
    rule = "be JSON bytes with quant_type, blocksize, dtype and shape"
    try:
        rest = json.loads(bytes(text.tolist()))
        known = rest["quant_type"], rest["blocksize"], rest["dtype"], torch.Size(rest["shape"])
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{_OP}: quant_state must {rule}, got {error!r}") from error
    _checks.require(isinstance(known[2], str), _OP, "quant_state", rule, known)
    return rest


# Lets torch.load(weights_only=True) read a Weight4bit.
torch.serialization.add_safe_globals([Weight4bit])
