"""Compile every Triton kernel for every architecture with no GPU, and read what the machine code says.

    python bench kernels [--only lora_shrink lora_expand] [--jobs 2] [--arch 90]

The launchers themselves name what is compiled: they run on meta tensors with their `launch` captured, so a kernel is
compiled with the arguments, flags and tile it would really get. Every tile-table entry must be met on the way.
A row says registers, spills and shared memory; of a pass over an activation also the instructions of its hot loop an
element, the share of the time of its bytes that they take to issue at 4 and at 1.5 instructions a clock and processor
(sass.py), and how often its programs fill the GPU at each of the cases' shapes.
Exits 1 on a spill, on shared memory over the limit, on instructions that take longer than the bytes, on a compile error
or on a tile or kernel that no case reaches. Writes bench/results/kernels_triton<version>.json.
"""

import argparse
import concurrent.futures
import importlib
import os
import re
import sys
import tempfile
import time
from math import prod

from common import tree
from compile import cases, sass
from compile.cases import CASES, DTYPES, FP32, OPS, RANKLESS, SHAPES, ragged
from compile.signature import signature
from fastpeft.kernels._launch import captured

# Kernels whose instructions take longer than their bytes, and why that stays.
EXCEPTIONS = {
    "fp32": "products without TF32 are R multiplications an element on the general cores",
    "ragged": "rows that 16 does not divide are read and written an element at a time",
    "sm_100": "8 TB/s leave ten instructions an element: a mask takes five, rank 64 as many, an output with biases 11",
    "rank": "128 and more ranks a block: the products of an element take longer than its bytes, whatever the code",
}


def collect(arch, only):
    """Unique compile jobs of one architecture, with their programs at each of SHAPES, and the tile entries met."""
    modules = {name: importlib.import_module(f"fastpeft.kernels.{name}") for name in OPS}
    jobs, met = {}, set()

    def lookup(tiles, _, dtype, R, mode="plain"):
        tile = modules["_common"].lookup_tile(tiles, arch, dtype, R, mode)
        met.update((id(tiles), key) for key, value in tiles.items() if value is tile)
        return tile

    for name, module in modules.items():
        if name != "_common":
            module.lookup_tile = lookup
    for shape in SHAPES:
        cases.M, cases.N, cases.K = shape
        name = " ".join(map(str, shape))
        with captured((arch, 132)) as launches:
            launch_cases(arch, modules, only, shape == SHAPES[0])
        for kernel, grid, args, given in launches:
            constants = {name: value for name, value in given.items() if name not in ("num_warps", "num_stages")}
            options = {"num_warps": given["num_warps"], "num_stages": given.get("num_stages", 3)}
            sig, constexprs, attrs = signature(kernel, args, constants)
            op = next(name for name, m in modules.items() if getattr(m, kernel.__name__, None) is kernel)
            job = {"op": op, "kernel": kernel.__name__, "arch": arch, "signature": sig, "constexprs": constexprs,
                   "attrs": attrs, "options": options}  # fmt: skip
            if shape == SHAPES[0] or repr(job) in jobs:
                programs = jobs.setdefault(repr(job), job | {"programs": {}})["programs"]
                programs[name] = max(prod(grid), programs.get(name, 0))
    cases.M, cases.N, cases.K = SHAPES[0]
    tables = {name: module.TILES for name, module in modules.items() if name in CASES and (not only or name in only)}
    return list(jobs.values()), met, tables


def launch_cases(arch, modules, only, first):
    """Every launcher, with every operand of `CASES`; at the first shape, the ragged ones too."""
    for op, case in CASES.items():
        if only and op not in only:
            continue
        if op == "lora_linear_fused" and not modules[op].fused_serves(arch):
            if first:
                print(f"sm_{arch}: lora_linear_fused skipped, as it needs {modules[op].FUSED_NEEDS}")
            continue
        for x_dtype, a_dtype, ranks in DTYPES:
            if op == "lora_linear_fused" and x_dtype == FP32:
                continue
            for R in ranks[:1] if op in RANKLESS else ranks:
                case(modules[op], x_dtype, R, a_dtype)
    if first:
        ragged(modules, only or CASES)


def kind(job, item):
    """Which of EXCEPTIONS a job is, if any."""
    stride = next((n for n in ("stride_xm", "stride_dym", "stride_ym") if n in job["signature"]), None)
    if item == 4:
        return "fp32"
    if job["constexprs"]["BLOCK_R"] >= 128:
        return "rank"
    if (list(job["signature"]).index(stride),) not in job["attrs"]:
        return "ragged"
    heavy = job["constexprs"].get("DROPOUT") or job["constexprs"]["BLOCK_R"] > 16 or "expand" in job["kernel"]
    return "sm_100" if job["arch"] == 100 and heavy else None


def measures(job, row, code):
    """Adds instructions an element, issue time beside the bytes', programs, waves; a fault where issue is longer."""
    warps, types = job["options"]["num_warps"], row["types"]
    item = 4 if types.startswith("*fp32") else 2
    row["resident"] = sass.resident(job["arch"], row["registers"], row["shared"], warps)
    row["programs"] = job["programs"]
    row["waves"] = {k: round(sass.waves(job["arch"], n, row["resident"]), 2) for k, n in job["programs"].items()}
    found = sass.issue(job["kernel"], job["constexprs"], job["arch"], warps, item, code)
    if found:
        row["per_element"], row["issue_share"] = round(found[0], 2), round(found[1], 3)
        if row["issue_share"] > 1:
            row["known"] = EXCEPTIONS.get(kind(job, item), "")
            row["fault"] = row["fault"] or ("" if row["known"] else "instructions take longer than bytes")
    return row


def shown(row):
    """One printed line."""
    size = f"{row['registers']:>3} reg {row['spilled']:>4} spill {row['shared'] / 1024:>5.0f} KB"
    if "per_element" in row:
        at = [row["issue_share"] * sass.IPC_PERFECT / ipc for ipc in (sass.IPC_PERFECT, sass.IPC_MEASURED)]
        size += f" {row['per_element']:>5.1f} instr/el {at[0]:>5.2f} {at[1]:>5.2f} of bytes"
    else:
        size += " " * 34
    filled = "/".join(f"{each:.2f}" for each in row.get("waves", {}).values())
    what = f"{row['kernel']:<28} {row['types']:<18} {row['config']}  {row['fault']}"
    return f"sm_{row['arch']:<3} {size} waves {filled:<19} {what}{' (known)' if row.get('known') else ''}"


def compile_job(job):
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"fastpeft.kernels.{job['op']}"), job["kernel"])
    row = {key: job[key] for key in ("op", "kernel", "arch")}
    flags = {k: v for k, v in job["constexprs"].items() if k.isupper() and k != "R"} | job["options"]
    shown_types = ("x_ptr", "dy_ptr", "y_ptr", "a_ptr", "b_ptr", "w_ptr", "out_ptr", "x_desc", "dy_desc")
    types = [t for n, t in job["signature"].items() if n in shown_types]
    config = (f"{k}={v if isinstance(v, tuple) else int(v)}" for k, v in flags.items())
    row |= {"types": " ".join(types), "config": " ".join(config)}
    started = time.perf_counter()
    try:
        source = ASTSource(kernel, job["signature"], job["constexprs"], job["attrs"])
        compiled = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])
        code = sass.read(compiled.asm["cubin"])
        row |= {
            "registers": code.registers,
            "spilled": code.spilled,
            "shared": compiled.metadata.shared,
        }
        spilled, over = code.spilled, row["shared"] > sass.MACHINES[job["arch"]].shared_block
        row["fault"] = "spills" if spilled else "shared memory" if over else ""
        row = measures(job, row, code)
    except Exception as error:  # a compiler crash is a result of this check, reported in its row
        row |= {"registers": 0, "spilled": 0, "shared": 0, "fault": f"{type(error).__name__}: {str(error)[:200]}"}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, nargs="+", default=[])
    parser.add_argument("--arch", type=int, choices=sorted(sass.MACHINES), action="append")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    archs = options.arch or sorted(sass.MACHINES)
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
                print(shown(row), flush=True)
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
