"""What a kernel's machine code says with no GPU: registers, spills, instructions an element, programs and waves.

A pass over an activation is bound by its bytes only while its instructions take less time to issue. A scheduler issues
one instruction of a warp a clock, and a processor has four: `IPC_PERFECT` is the gate, which nothing real reaches;
`IPC_MEASURED` is what such kernels reached on an H100, and is printed.
"""

import importlib
import re
import subprocess
import tempfile
from math import prod
from pathlib import Path
from typing import NamedTuple

from fastpeft.kernels._cost import ARCHES, Arch

IPC_PERFECT, IPC_MEASURED = 4.0, 1.5  # instructions of a warp a clock and processor


class Machine(NamedTuple):
    """The GPU that stands for an architecture; its processors and its rate of copying are the cost model's."""

    gpu: Arch
    clock: float  # hertz, as under load
    shared: int  # bytes of a processor
    shared_block: int  # of a block; a tile of sm_80 also serves sm_86, sm_89 and sm_120, which have 99 KB


MACHINES = {
    80: Machine(ARCHES["a100"], 1.41e9, 164 * 1024, 99 * 1024),
    90: Machine(ARCHES["h100"], 1.755e9, 228 * 1024, 227 * 1024),
    100: Machine(ARCHES["b200"], 1.85e9, 228 * 1024, 227 * 1024),
}

# Elements of the wide operand that one trip of the hot loop takes, or one program of a kernel whose loop is over ranks,
# and how often each of them is read or written.
_ACTIVATION = {
    "_lora_shrink_kernel": (("BLOCK_M", "BLOCK_K"), lambda c: 1 + c["COPY"]),
    "_lora_expand_kernel": (("BLOCK_M", "BLOCK_N"), lambda c: 1 + c["ADD"]),
    "_lora_grad_a_kernel": (("BLOCK_M", "BLOCK_K"), lambda c: c["NEED_DA"] + c["NEED_DX"]),
    "_lora_grad_b_kernel": (("BLOCK_M", "BLOCK_N"), lambda c: 1),
    "_lora_grad_b_rows_kernel": (("BLOCK_M", "BLOCK_N"), lambda c: 1),
}


_LOOP_OVER_RANKS = {"_lora_expand_kernel"}


class Code(NamedTuple):
    registers: int
    spilled: int  # bytes of stack: spills, as no kernel has an array of its own
    hot: int  # instructions of one trip of the longest loop, or all without a loop
    all: int


def _tool(*args):
    tools = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin"
    return subprocess.run([tools / "cuobjdump", *args], capture_output=True, text=True, check=True).stdout


def counted(listing):
    """(instructions between a backward branch and its target, the pair furthest apart, loops within once; all)."""
    instructions = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing)
    addresses = [int(address, 16) for address, _ in instructions]
    jumps = (
        (at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, (_, text) in zip(addresses, instructions, strict=True)
    )
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, addresses[-1]))
    return sum(first <= at <= last for at in addresses), len(addresses)


def read(cubin):
    """`Code` of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = _tool("-res-usage", file.name), _tool("-sass", file.name)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Code(int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), *counted(listing))


def issue(kernel, constants, arch, warps, item, code):
    """(instructions an element, share of the bytes' time that they take to issue at a perfect rate), or None."""
    if kernel not in _ACTIVATION:
        return None
    sides, passes = _ACTIVATION[kernel]
    instructions = code.all if kernel in _LOOP_OVER_RANKS else code.hot
    per_element = instructions * 32 * warps / prod(constants[side] for side in sides)
    machine = MACHINES[arch]
    seconds = per_element / (32 * IPC_PERFECT * machine.gpu.sms * machine.clock)
    return per_element, seconds / (passes(constants) * item / machine.gpu.copy_bw)


def resident(arch, registers, shared, warps):
    """Programs that fit a processor at once."""
    of_registers = 65536 // (-(-max(registers, 1) // 8) * 8 * 32 * warps)
    return max(1, min(of_registers, MACHINES[arch].shared // (shared + 1024), 64 // warps, 32))


def waves(arch, programs, resident_programs):
    """How many times the GPU fills: 1.00 is full once, 1.06 leaves a second wave almost empty."""
    return programs / (MACHINES[arch].gpu.sms * resident_programs)
