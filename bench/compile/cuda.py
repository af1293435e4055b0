"""Compile every csrc/cuda/*.cu for every architecture with no GPU, and check registers, spills and shared memory.

    python bench cuda [--arch 90a]

Exits 1 on a warning, on a spill, on static shared memory over 48 KB or on a compile error. What a kernel takes of
dynamic shared memory, its source asserts. Writes bench/results/kernels_cuda<version>.json.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import tree

ARCHS = ("80", "86", "89", "90a", "100", "120")  # those of setup.py
STATIC_SHARED_LIMIT = 48 * 1024
CSRC = tree.ROOT / "csrc"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'.*?"
    r"(?P<spill>\d+) bytes spill stores, (?P<load>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
TYPES = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "f": "fp32"}


def version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def describe(mangled):
    """The kernel's name and its template arguments, read off the mangled name."""
    name = re.search(r".*\d(_[a-z]\w*?_kernel)I(6__half|13__nv_bfloat16|f)", mangled)
    if name is None:
        return mangled, ""
    numbers = re.findall(r"Li(\d+)E", mangled[name.end() :])
    return name[1], " ".join([TYPES[name[2]], *(f"<{', '.join(numbers)}>" for _ in numbers[:1])])


def compile_file(nvcc, source, arch, out):
    """Rows of one file for one architecture."""
    command = [nvcc, "-c", "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills", "-gencode",
               f"arch=compute_{arch},code=sm_{arch}", "-I", CSRC, source, "-o", out / "o"]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 1)
    known = {"file": source.name, "arch": arch, "seconds": seconds}
    rows = []
    for entry in ENTRY.finditer(done.stderr):
        kernel, arguments = describe(entry["name"])
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        row = known | {"kernel": kernel, "arguments": arguments, "registers": int(entry["registers"])}
        row |= {"spilled": int(entry["spill"]) + int(entry["load"]), "shared": int(shared[1]) if shared else 0}
        row["fault"] = "spills" if row["spilled"] else "shared memory" if row["shared"] > STATIC_SHARED_LIMIT else ""
        rows.append(row)
    # -warn-spills says again, as a warning, what the rows say.
    if done.returncode and not any(row["spilled"] for row in rows):
        said = " ".join(done.stderr.split())[:300]
        rows.append(known | {"kernel": "", "arguments": "", "registers": 0, "spilled": 0, "shared": 0, "fault": said})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append")
    options = parser.parse_args(argv)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("compile_cuda: no nvcc on PATH, nothing compiled")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch or ARCHS:
            for source in sorted(CSRC.rglob("*.cu")):
                for row in compile_file(nvcc, source, arch, Path(folder)):
                    rows.append(row)
                    size = f"{row['registers']:>3} reg {row['spilled']:>4} spill {row['shared'] / 1024:>5.1f} KB"
                    print(f"sm_{row['arch']:<4} {size}  {row['kernel']} {row['arguments']}  {row['fault']}", flush=True)
    seconds = sum({(row["file"], row["arch"]): row["seconds"] for row in rows}.values())
    faults = sum(bool(row["fault"]) for row in rows)
    print(f"nvcc {version(nvcc)}: {len(rows)} kernels compiled in {seconds:.0f} s, {faults} faults")
    if not options.arch:
        tree.save_json(f"kernels_cuda{version(nvcc)}", {"nvcc": version(nvcc), "rows": rows})
    sys.exit(1 if faults or not rows else 0)


if __name__ == "__main__":
    main()
