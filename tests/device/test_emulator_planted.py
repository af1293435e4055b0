"""The emulator's own eyes: mistakes planted in kernels are found, and their mended forms are clean."""

import os
import subprocess

import pytest

from emulator import build

# kernel -> the build that finds its mistake, and what that says
PLANTED = {
    "missing_syncthreads": ("thread", "data race"),
    "missing_barrier_at_loop_end": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "shuffle_as_fence": ("thread", "data race"),
    "missing_barrier_after_copy": ("thread", "data race"),
    "two_blocks_add": ("thread", "data race"),
    "missing_copy_wait": ("", "nan"),
    "uninitialised_shared": ("", "nan"),
    "misaligned_load": ("", "misaligned address"),
    "divergent_barrier": ("", "meet __syncthreads at different lines"),
    "lanes_apart": ("", "meet in different operations"),
    "deadlock": ("", "deadlock"),
    "past_static_shared": ("address", "out of bounds"),
    "past_dynamic_shared": ("address", "heap-buffer-overflow"),
    "past_global": ("address", "heap-buffer-overflow"),
}


@pytest.fixture(scope="module")
def planted(emulator_folder):
    def program(sanitizer, mended):
        name = f"planted_{sanitizer}_{mended}"
        if not (emulator_folder / name).exists():
            build.build(
                [build.HERE / "planted.cu"], emulator_folder, name, sanitizer, True, ["-DMENDED"] if mended else []
            )
        return emulator_folder / name

    def run(kernel, sanitizer, mended):
        # Two blocks race only in memory that both may touch: each needs stacks of its own.
        apart = {"EMU_APART": "1"} if kernel == "two_blocks_add" else {}
        environment = build.plain_environment() | apart
        return subprocess.run([program(sanitizer, mended), kernel], capture_output=True, text=True, env=environment)

    return run


@pytest.mark.skipif(bool(os.environ.get("FASTPEFT_SANITIZE")), reason="builds its own sanitized programs")
@pytest.mark.parametrize("kernel", PLANTED)
def test_planted_mistake_is_found(planted, kernel):
    sanitizer, said = PLANTED[kernel]
    done = planted(kernel, sanitizer, mended=False)
    assert said in done.stdout + done.stderr
    mended = planted(kernel, sanitizer, mended=True)
    assert mended.returncode == 0 and not mended.stderr and "nan" not in mended.stdout, mended.stderr
