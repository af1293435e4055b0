"""Prints the cost model's prediction beside every measured row on the H100; exits 1 beyond 15 % deviation.

Rows: one H100 80GB HBM3, torch 2.11, triton 3.6, bf16, M = 8192, L2 flushed, medians; a GEMM moves +-5 % with heat.
Fit of kernels/_cost.py's H100 (each constant from the rows that isolate it, once, by hand):
    copy_bw          slope of a pass between K = 4096 and 14336: 2.94 (shrink), 2.75 (expand, da), 2.5 (ds + db) TB/s
    launch + ramp    intercept of the same lines: 14 us for a pass that reads and reduces, 8 us for one that only writes
    mask_seconds     dropout's extra time over M * K: 0.24 to 0.33 ps a mask, applied twice where dx0 is written
    mma_*            the r = 64 passes, which leave the memory roof: 115 TFLOP/s with, 195 without a masked operand
    gemm_*           cuBLAS alone at 4096^2 and at 14336; the same product measured 347, 363 and 418 us in three runs
"""

import sys

from fastpeft.kernels import _cost

M = 8192
LIMIT = 0.15
UP, DOWN, SQUARE = (14336, 4096), (4096, 14336), (4096, 4096)  # (N, K): 4096 -> 14336 widens

# us, forward + dX; 4096^2 twice, from the r = 16 and the r = 64 run
FROZEN = [(SQUARE, 16, 727), (UP, 16, 2778), (DOWN, 16, 2866), (SQUARE, 64, 837)]

# (N, K), r, fwd / frozen fwd, bwd / frozen dX, total p = 0, total p = 0.1
STRATEGY_A = [
    (SQUARE, 16, 1.24, 1.24, 1.24, 1.34),
    (UP, 16, 1.11, 1.09, 1.10, 1.10),
    (DOWN, 16, 1.23, 0.98, 1.09, 1.14),
    (SQUARE, 64, 1.12, 1.30, 1.22, 1.32),
]

# pass, (N, K), r, p, us
PARTS = [
    ("shrink", SQUARE, 16, 0, 37), ("shrink", SQUARE, 16, 0.1, 45), ("expand", SQUARE, 16, 0, 32),
    ("grad_b", SQUARE, 16, 0, 42), ("grad_a", SQUARE, 16, 0, 42), ("grad_a", SQUARE, 16, 0.1, 53),
    ("grad_a_dx", SQUARE, 16, 0, 66), ("grad_a_dx", SQUARE, 16, 0.1, 85),
    ("expand", UP, 16, 0, 93), ("grad_b", UP, 16, 0, 109),
    ("shrink", DOWN, 16, 0, 94), ("shrink", DOWN, 16, 0.1, 131.5), ("grad_a", DOWN, 16, 0, 103),
    ("grad_a_dx", DOWN, 16, 0, 194), ("grad_a_dx", DOWN, 16, 0.1, 272),
    ("shrink", SQUARE, 64, 0.1, 61), ("grad_b", SQUARE, 64, 0, 61), ("grad_a_dx", SQUARE, 64, 0.1, 122),
]  # fmt: skip

# [M, K] x [K, N]: N, K, cuBLAS alone, best Triton GEMM with the LoRA K-step (r = 16)
STRATEGY_B = [
    ("fwd 4096^2", 4096, 4096, 347, 370), ("fwd 4096->14336", 14336, 4096, 1338, 1330),
    ("fwd 14336->4096", 4096, 14336, 1310, 1358), ("dX 4096^2", 4096, 4096, 351, 368),
    ("dX 4096->14336", 4096, 14336, 1349, 1319), ("dX 14336->4096", 14336, 4096, 1375, 1370),
]  # fmt: skip

# Rows left out of the limit, with the reason; they are printed all the same.
UNMET = {
    "A 14336->4096 r=16 bwd": "a backward with two more passes cannot beat the frozen dX (0.98): the two sides of the "
    "ratio ran at different heat; the row's total, 1.09, is met",
}


def _name(shape: tuple[int, int]) -> str:
    n, k = shape
    return f"{k}^2" if n == k else f"{k}->{n}"


def rows() -> list[tuple[str, float, float, str]]:
    """(label, measured, predicted, unit) of every measured row."""
    out = []
    for shape, r, measured in FROZEN:
        out.append((f"frozen {_name(shape)} r={r} run", measured, 1e6 * _cost.predict(M, *shape, r)["frozen"], "us"))
    for name, (n, k), r, p, measured in PARTS:
        label = f"{name} {_name((n, k))} r={r}" + (f" p={p}" if p else "")
        out.append((label, measured, 1e6 * _cost.pass_time(name, M, n, k, r, p, "bf16"), "us"))
    for shape, r, fwd, bwd, total, total_drop in STRATEGY_A:
        quiet, drop = (_cost.predict(M, *shape, r, p) for p in (0.0, 0.1))
        label = f"A {_name(shape)} r={r}"
        out += [
            (f"{label} fwd", fwd, quiet["fwd"] / quiet["frozen_fwd"], "x"),
            (f"{label} bwd", bwd, quiet["bwd"] / quiet["frozen_bwd"], "x"),
            (f"{label} total", total, quiet["ratio"], "x"),
            (f"{label} total p=0.1", total_drop, drop["ratio"], "x"),
        ]
    for label, n, k, vendor, fused in STRATEGY_B:
        out.append((f"B {label} cuBLAS", vendor, 1e6 * _cost.gemm_time(M, n, k, "bf16"), "us"))
        out.append((f"B {label} fused", fused, 1e6 * _cost.fused_gemm_time(M, n, k, 16, "bf16"), "us"))
    return out


def deviations() -> dict[str, float]:
    """label -> predicted / measured - 1."""
    return {label: predicted / measured - 1 for label, measured, predicted, _ in rows()}


def main(argv: list[str] | None = None) -> int:
    print(f"{'row':34} {'measured':>9} {'predicted':>9}    deviation")
    failed = 0
    for label, measured, predicted, unit in rows():
        deviation = predicted / measured - 1
        note = ""
        if abs(deviation) > LIMIT:
            note = f"  not held to the limit: {UNMET[label]}" if label in UNMET else "  BEYOND 15 %"
            failed += label not in UNMET
        print(f"{label:34} {measured:9.4g} {predicted:9.4g} {unit:2} {deviation:+8.1%}{note}")
    print("\nfrozen = 1, predicted for M = 8192, r = 16, p = 0.1:")
    for shape in (SQUARE, UP, DOWN):
        both = {s: _cost.predict(M, *shape, 16, 0.1, strategy=s)["ratio"] for s in _cost.STRATEGIES}
        chosen = _cost.choose_strategy(M, *shape, 16, 0.1, "bf16", 90)
        print(f"  {_name(shape):12}" + "".join(f"  {s} {r:.3f}" for s, r in both.items()) + f"  -> {chosen}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
