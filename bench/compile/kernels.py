"""Compile every Triton kernel for every architecture with no GPU, and check registers, spills and shared memory.

    python bench kernels [--only lora_shrink lora_expand] [--jobs 2] [--arch 90]

The launchers themselves name what is compiled: they run on meta tensors with their `launch` captured, so a kernel is
compiled with the arguments, flags and tile it would really get. Every tile-table entry must be met on the way.
Exits 1 on a spill, on shared memory over the limit, on a compile error or on a tile or kernel that no case reaches.
Writes bench/results/kernels_triton<version>.json.
"""

import argparse
import concurrent.futures
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import tree
from compile.conv import convolution
from compile.signature import signature
from fastpeft.kernels._launch import captured

# A tile of the sm_80 table also serves sm_86, sm_89 and sm_120, which have 99 KB a block; sm_80 itself has 163 KB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
M, N, K = 8192, 4096, 4096
SCALE = 2.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def adapters(R, dtype):
    return meta((R, K), dtype), meta((N, R), dtype)


def shrink(op, x_dtype, R, a_dtype):
    a, seed = adapters(R, a_dtype)[0], meta((1,), torch.int64)
    for p in (0.0, 0.1):
        for copy in (None, meta((M, K + 16), x_dtype)[:, :K]):
            op.lora_shrink(meta((M, K), x_dtype), a, p, seed, copy=copy)


def expand(op, x_dtype, R, a_dtype):
    s, b = meta((M, R), x_dtype), adapters(R, a_dtype)[1]
    op.lora_expand(s, b, meta((N,), x_dtype), meta((N,), a_dtype), SCALE)
    if a_dtype == FP32:
        op.lora_expand(s, b, None, None, SCALE)
        op.lora_expand_add(meta((M, N), x_dtype), s, b, SCALE)


def grad_b(op, x_dtype, R, a_dtype):
    dy, s, b = meta((M, N), x_dtype), meta((M, R), x_dtype), adapters(R, a_dtype)[1]
    op.lora_grad_b(dy, s, b, SCALE, True, True)
    if a_dtype == FP32:
        for need_db, mask in ((True, None), (False, None), (True, meta((R, N // 8), torch.uint8))):
            op.lora_grad_b(dy, s, b, SCALE, need_db, False, mask)


def grad_a(op, x_dtype, R, a_dtype):
    x, ds, a, seed = meta((M, K), x_dtype), meta((M, R), x_dtype), adapters(R, a_dtype)[0], meta((1,), torch.int64)
    for p in (0.0, 0.1):
        op.lora_grad_a(x, ds, a, p, seed, True, True)
        if a_dtype == FP32:
            op.lora_grad_a(x, ds, a, p, seed, False, True)
            op.lora_grad_a(x, ds, a, p, seed, True, True, meta((R, K // 8), torch.uint8))
            if R in (16, 64, 128):
                op.lora_grad_a(x, ds, a, p, seed, True, False)


def linear_fused(op, x_dtype, R, a_dtype):
    (a, b), seed = adapters(R, a_dtype), meta((1,), torch.int64)
    x, w, s, dy = meta((M, K), x_dtype), meta((N, K), x_dtype), meta((M, R), x_dtype), meta((M, N), x_dtype)
    op.lora_linear_fused_fwd(x, w, s, b, meta((N,), x_dtype), meta((N,), a_dtype), SCALE)
    if a_dtype == FP32:
        op.lora_linear_fused_fwd(x, w, s, b, None, None, SCALE)
        op.lora_linear_fused_dx(dy, w, s, a, 0.0, None)
    op.lora_linear_fused_dx(dy, w, s, a, 0.1, seed)


def packed_weight(block_size, double, n=N * K):
    """(packed, scales) of a weight of n values."""
    blocks = -(-n // block_size)
    absmax = [meta((blocks,), torch.uint8), meta((256,), FP32), meta((-(-blocks // 256),), FP32), meta((), FP32)]
    return meta(((n + 1) // 2,), torch.uint8), absmax if double else [meta((blocks,), FP32)]


# Formats of a 4-bit weight: what transformers quantises to, the other table, and blocks longer than a tile.
FORMATS = (("nf4", 64, True), ("fp4", 64, False), ("nf4", 32, False), ("nf4", 4096, True))


def ragged(modules, only):
    """Rows that 16 does not divide, which take smaller tiles of the three passes."""
    M, K, N = 8191, 4097, 4095
    seed = meta((1,), torch.int64)
    for x_dtype, R in ((BF16, 16), (BF16, 64), (FP32, 16)):
        x, s, a, b = meta((M, K), x_dtype), meta((M, R), x_dtype), meta((R, K), FP32), meta((N, R), FP32)
        for p in (0.0, 0.1):
            if "lora_shrink" in only:
                modules["lora_shrink"].lora_shrink(x, a, p, seed)
            if "lora_grad_a" in only:
                modules["lora_grad_a"].lora_grad_a(x, s, a, p, seed, True, True)
        if "lora_expand" in only:
            modules["lora_expand"].lora_expand(s, b, meta((N,), x_dtype), meta((N,), FP32), SCALE)
            modules["lora_expand"].lora_expand_add(meta((M, N), x_dtype), s, b, SCALE)


def quantize_4bit(op, x_dtype, R, a_dtype):
    for quant_type, block_size, _ in FORMATS:
        op.quantize_4bit(meta((N, K), x_dtype), quant_type, block_size)
    op.quantize_absmax(meta((N * K // 64,), FP32), meta((256,), FP32))


def dequantize_4bit(op, x_dtype, R, a_dtype):
    for quant_type, block_size, double in FORMATS:
        wide = meta((N, K + 16), x_dtype)
        for out in (meta((N, K), x_dtype), wide[:, :K], wide[:, : K - 16]):  # the last: blocks that span two rows
            op.dequantize_4bit(*packed_weight(block_size, double), quant_type, block_size, out)


def linear4bit_small(op, x_dtype, R, a_dtype):
    """Every count of rows that has a tile; the other formats, the biases and the smallest rank at one of them."""
    b = adapters(16, a_dtype)[1]
    for M in (1, 16, 32, 64):
        x, dy, s = meta((M, K), x_dtype), meta((M, N), x_dtype), meta((M, 16), x_dtype)
        for quant_type, block_size, double in FORMATS if M == 16 and a_dtype == FP32 else FORMATS[:1]:
            weight = (*packed_weight(block_size, double), quant_type, block_size)
            op.linear4bit_small(x, *weight, N, s, b, None, None, SCALE)
            op.linear4bit_small_dx(dy, *weight, K, meta((M, K), x_dtype))
    weight = (*packed_weight(64, True), "nf4", 64)
    op.linear4bit_small(x, *weight, N, meta((M, 64), x_dtype), adapters(64, a_dtype)[1], b[:, 0], b[:, 0], SCALE)
    if a_dtype == FP32:
        op.linear4bit_small(x, *weight, N, None, None, None, None, SCALE)
        op.linear4bit_small_dx(dy, *weight, K, None)


# (x dtype, adapter dtype, ranks): fp32 adapters on a bf16 base are the first-class case and meet every rank.
DTYPES = [
    (BF16, FP32, (16, 32, 64, 128, 256, 320)),
    (BF16, BF16, (16, 64)),
    (FP16, FP32, (16,)),
    (FP32, FP32, (16, 64, 256)),
]
CASES = {
    "lora_shrink": shrink, "lora_expand": expand, "lora_grad_b": grad_b, "lora_grad_a": grad_a,
    "lora_linear_fused": linear_fused, "quantize_4bit": quantize_4bit, "dequantize_4bit": dequantize_4bit,
    "linear4bit_small": linear4bit_small, "conv_shrink": convolution, "conv_grad_a": convolution,
}  # fmt: skip
OPS = ("_common", *CASES)
RANKLESS = {"quantize_4bit", "dequantize_4bit", "linear4bit_small"}  # which one call for each dtype covers


def collect(arch, only):
    """Unique compile jobs of one architecture, and the tile entries they came from."""
    modules = {name: importlib.import_module(f"fastpeft.kernels.{name}") for name in OPS}
    jobs, met = {}, set()

    def lookup(tiles, _, dtype, R, mode="plain"):
        tile = modules["_common"].lookup_tile(tiles, arch, dtype, R, mode)
        met.update((id(tiles), key) for key, value in tiles.items() if value is tile)
        return tile

    for name, module in modules.items():
        if name != "_common":
            module.lookup_tile = lookup
    with captured((arch, 132)) as launches:
        launch_cases(arch, modules, only)
    for kernel, _, args, given in launches:
        constants = {name: value for name, value in given.items() if name not in ("num_warps", "num_stages")}
        options = {"num_warps": given["num_warps"], "num_stages": given.get("num_stages", 3)}
        sig, constexprs, attrs = signature(kernel, args, constants)
        op = next(name for name, m in modules.items() if getattr(m, kernel.__name__, None) is kernel)
        job = {"op": op, "kernel": kernel.__name__, "arch": arch, "signature": sig, "constexprs": constexprs,
               "attrs": attrs, "options": options}  # fmt: skip
        jobs.setdefault(repr(job), job)
    tables = {name: module.TILES for name, module in modules.items() if name in CASES and (not only or name in only)}
    return list(jobs.values()), met, tables


def launch_cases(arch, modules, only):
    """Every launcher, with every operand of `CASES`."""
    for op, case in CASES.items():
        if only and op not in only:
            continue
        if op == "lora_linear_fused" and not modules[op].fused_serves(arch):
            print(f"sm_{arch}: lora_linear_fused skipped, as it needs {modules[op].FUSED_NEEDS}")
            continue
        for x_dtype, a_dtype, ranks in DTYPES:
            if op == "lora_linear_fused" and x_dtype == FP32:
                continue
            for R in ranks[:1] if op in RANKLESS else ranks:
                case(modules[op], x_dtype, R, a_dtype)
    ragged(modules, only or CASES)


def resources(compiled):
    """Registers and stack bytes (spills, where a kernel has no local arrays) from the cubin."""
    tool = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def compile_job(job):
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"fastpeft.kernels.{job['op']}"), job["kernel"])
    row = {key: job[key] for key in ("op", "kernel", "arch")}
    shown = {k: v for k, v in job["constexprs"].items() if k.isupper() and k != "R"} | job["options"]
    shown_types = ("x_ptr", "dy_ptr", "y_ptr", "a_ptr", "b_ptr", "w_ptr", "out_ptr", "x_desc", "dy_desc")
    types = [t for n, t in job["signature"].items() if n in shown_types]
    config = (f"{k}={v if isinstance(v, tuple) else int(v)}" for k, v in shown.items())
    row |= {"types": " ".join(types), "config": " ".join(config)}
    started = time.perf_counter()
    try:
        source = ASTSource(kernel, job["signature"], job["constexprs"], job["attrs"])
        compiled = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])
        registers, spilled = resources(compiled)
        row |= {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}
        over = row["shared"] > SHARED_LIMIT[job["arch"]]
        row["fault"] = "spills" if spilled else "shared memory" if over else ""
    except Exception as error:  # a compiler crash is a result of this check, reported in its row
        row |= {"registers": 0, "spilled": 0, "shared": 0, "fault": f"{type(error).__name__}: {str(error)[:200]}"}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, nargs="+", default=[])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), action="append")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    archs = options.arch or sorted(SHARED_LIMIT)
    import triton

    jobs, met, tables = [], set(), {}
    for arch in archs:
        found, seen, tables = collect(arch, options.only)
        jobs, met = jobs + found, met | seen
    rows, faults = [], 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
            for row in pool.map(compile_job, jobs):
                rows.append(row)
                faults += bool(row["fault"])
                size = f"{row['registers']:>3} reg {row['spilled']:>5} spill {row['shared'] / 1024:>6.1f} KB"
                what = f"{row['kernel']:<31} {row['types']:<22} {row['config']}  {row['fault']}"
                print(f"sm_{row['arch']:<3} {size} {what}", flush=True)
    unmet = [f"tile {op} {key}" for op, t in tables.items() for key in t if (id(t), key) not in met]
    launched = {job["kernel"] for job in jobs}
    sources = {op: (tree.ROOT / "kernels" / f"{op}.py").read_text() for op in tables}
    unmet += [f"kernel {name} of {op}" for op, text in sources.items()
              for name in re.findall(r"def (_\w+_kernel)\(", text) if name not in launched]  # fmt: skip
    unmet = [] if options.arch else unmet
    for entry in unmet:
        print(f"no case reaches the {entry}")
    seconds = sum(row["seconds"] for row in rows)
    total = f"{len(rows)} kernels compiled in {seconds:.0f} s, {faults} faults, {len(unmet)} not reached"
    print(f"triton {triton.__version__}: {total}")
    if not options.only and not options.arch:
        tree.save_json(f"kernels_triton{triton.__version__}", {"triton": triton.__version__, "rows": rows})
    sys.exit(1 if faults or unmet else 0)


if __name__ == "__main__":
    main()
