"""What `make gpu` has to compile on a cold cache, kernel by kernel, and how long that should take; no GPU needed.

    python bench budget

The launchers of the parts, the headline and each check run on meta tensors with their launch captured; a kernel counts
what its like (same kernel, with or without dropout) took for sm_90 in bench/results/kernels_triton*.json, the slower of
the releases there.
"""

from checks import lora as checks
from compile.pool import STARTUP, captured, compile_seconds, expected_seconds, makespan
from fastpeft.kernels._gpu import Gpu
from gpu.replay import replay, specialisations
from gpu.stages import OPTIONAL, SECONDS, TOTAL

# Seconds of checks that are not replayed here: imports, a second compiler; ten kernels.
OTHER = {"PEFT": 40, "torch.compile": 40, "rank space": 14}
REST = 20  # of each of the others, some with a dozen kernels


def expected() -> dict[str, tuple[int, float]]:
    """Kernels and seconds of compiling, by check; no kernels for one that is not replayed."""
    each, out = compile_seconds(), {}
    for name in checks.CHECKS:
        with captured() as found:
            known = replay(name)
        seconds = sum(expected_seconds(s.like, each) for s in found.values()) if known else float(OTHER.get(name, REST))
        out[name] = len(found), seconds
    return out


def main(argv: list[str] | None = None) -> None:
    found = expected()
    for name, (kernels, seconds) in found.items():
        print(f"{name:24} {kernels or '?':>4} kernels {seconds:5.0f} s")
    each, unique = compile_seconds(), specialisations(Gpu(90))
    seconds = [expected_seconds(one.like, each) for one in unique.values()]
    print(f"\n{sum(n for n, _ in found.values())} compiles by check, {len(unique)} kernels of all stages, each once: "
          f"{sum(seconds):.0f} s of one core here")  # fmt: skip
    for cores in (4, 8, 16):
        first, checked = makespan(seconds, cores - 1) + STARTUP, [own for _, own in found.values()]
        alone = makespan(checked, min(cores, checks.WORKERS), STARTUP)
        print(f"{cores:2} cores: {first:4.0f} s of the compile stage's {SECONDS['compile']}; "
              f"without it the checks alone take {alone:.0f} s of {SECONDS['correctness']}")  # fmt: skip
    print(f"stages: {', '.join(f'{name} {s}' for name, s in SECONDS.items() if name not in OPTIONAL)}; "
          f"{sum(s for name, s in SECONDS.items() if name not in OPTIONAL)} s in all, stop by {TOTAL}")  # fmt: skip


if __name__ == "__main__":
    main()
