"""The checklist of a new operator: every operator of the package fulfils it, and a dummy fails it for each step left out."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")
ROOT = Path(__file__).resolve().parents[2]

import fastpeft
from checklist import House, left_out, native_schemas, plain, registered
from checks import lora as gpu_checks
from compile import kernels as compile_kernels
from fastpeft import dispatch, ops
from fastpeft.dispatch import CPP, EAGER, ROWS, TRITON, Row
from fastpeft.kernels import _common, _launch
from fastpeft.ops import _flops, _library
from tune import fourbit as tune_fourbit
from tune import tiles as tune

# Checks that cannot run without a GPU, or that need other packages.
ELSEWHERE = {"PEFT", "torch.compile", "4-bit bitsandbytes"}


def launched_by(checks, wanted, monkeypatch):
    """The launchers that checks run here on tiny shapes, by record or by name, until all that are wanted have run."""
    seen, load = set(), dispatch.load
    with monkeypatch.context() as patch, _launch.count_launches() as launches:
        patch.setattr(
            dispatch, "load", lambda op, backend: (seen.add(op) if backend == "triton" else None, load(op, backend))[1]
        )
        for check in checks:
            check(gpu_checks.Ctx("cpu", True))
            seen |= {launch.name for launch in launches}
            if wanted <= seen:
                break
    return seen


@pytest.mark.skipif(
    "Interpreted" not in type(_common._reduce_splits_kernel).__name__, reason="needs TRITON_INTERPRET=1"
)
def test_every_operator(monkeypatch):
    checks = [check for name, check in gpu_checks.CHECKS.items() if name not in ELSEWHERE]
    wanted = {op for op, row in ROWS.items() if row.get("triton")}
    timed = {*tune.JOBS, *((op, mode) for op, mode, _ in tune_fourbit.TILES)}
    house = House(ROOT, compile_kernels.CASES, timed, launched_by(checks, wanted, monkeypatch))
    missing = {op: left_out(op, house) for op in sorted({*registered(), *ROWS})}
    assert not any(missing.values()), missing


def test_native_schemas_are_those_that_run():
    """The extension of this test was built from this csrc/library.cpp."""
    pytest.importorskip("fastpeft._C", reason="the extension is not built")
    for op, schema in native_schemas(ROOT).items():
        if hasattr(torch.ops.fastpeft_cpp, op):
            loaded = str(getattr(torch.ops.fastpeft_cpp, op).default._schema)
            assert plain(loaded) == plain(str(torch._C.parse_schema(schema))), op


OP = "dummy_scale"
REFERENCE = f"""
import torch


def {OP}(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor
"""
FAKE = f'''
import torch
from fastpeft import dispatch
from fastpeft.ops import _library


def _fake(x: torch.Tensor, factor: float, backend: str) -> torch.Tensor:
    return torch.empty_like(x)


def _describe(x: torch.Tensor, factor: float) -> _library.Call:
    return _library.described("{OP}", x, flop=x.numel(), elements=2 * x.numel(), size=x.numel())

'''
REGISTER = f'''
_library.register("{OP}", _fake, describe=_describe)
'''
PUBLIC = f'''

def {OP}(x: torch.Tensor, factor: float, *, backend: str | None = None) -> torch.Tensor:
    return _library.call("{OP}", dispatch.select("{OP}", backend, x.device.type, x.dtype), x, factor)
'''
KERNEL = f'''
import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import lookup_tile
from fastpeft.kernels._launch import arch_of, launch, record

MODES = ("plain",)
TILES = {{(80, "half", "plain", 0): dict(BLOCK=64, num_warps=4), (80, "float32", "plain", 0): dict(BLOCK=64, num_warps=4)}}


@triton.jit
def _{OP}_kernel(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * factor, mask=offs < n)


def {OP}(x, factor, *, tile=None):
    out = torch.empty_like(x)
    tile = tile or lookup_tile(TILES, arch_of(x), x.dtype, 0)
    record("{OP}", x.numel(), x.nbytes, out.nbytes)
    launch(_{OP}_kernel, (triton.cdiv(x.numel(), tile["BLOCK"]),), x, (x, out, x.numel(), float(factor)), tile)
    return out
'''
SCHEMA = f'  m.def("{OP}(Tensor x, float factor) -> Tensor");\n'
# step -> the file that it writes
FILES = {
    "reference": ("fastpeft/reference/dummy_scale.py", REFERENCE),
    "kernel": ("kernels/dummy_scale.py", KERNEL),
    "test": ("tests/ops/test_dummy_scale.py", ""),
    "schema": ("csrc/library.cpp", SCHEMA),
    "implementation": ("csrc/cpu/dummy_scale.cpp", f'm.impl("{OP}", TORCH_BOX(&{OP}));'),
    "native": ("fastpeft/_native.py", f"{OP} = _ops.{OP}.default._op\n"),
}
# step -> what the checklist says where it was left out
SAYS = {
    "row": "fastpeft/dispatch.py: ROWS has no line for dummy_scale",
    "reference": "fastpeft/reference/dummy_scale.py: no such file",
    "ops": "fastpeft/ops/dummy_scale.py: no such file",
    "register": "fastpeft/ops/dummy_scale.py: dummy_scale is not registered",
    "describe": "fastpeft/ops/dummy_scale.py: no describe for dummy_scale, which explain does not show",
    "export": "fastpeft/ops/__init__.py: exports nothing of dummy_scale",
    "kernel": "kernels/dummy_scale.py: no such file",
    "compile": "bench/compile/kernels.py: no case compiles dummy_scale",
    "time": "bench/tune/tiles.py: no job times mode 'plain' of dummy_scale",
    "check": "bench/checks: no check launches dummy_scale",
    "schema": "csrc/library.cpp: no schema of dummy_scale",
    "implementation": "csrc: nothing implements dummy_scale",
    "native": "fastpeft/_native.py: no dummy_scale",
    "test": "tests/ops/test_dummy_scale.py: no such file",
}


@pytest.fixture
def add(tmp_path, monkeypatch):
    """add(*omitted, cpp=False): a dummy operator by the checklist, less the omitted steps; the house that it stands in."""
    library = torch.library.Library("fastpeft", "FRAGMENT")
    monkeypatch.setattr(_library, "_LIBRARY", library)
    for package, folder in (("reference", "fastpeft/reference"), ("ops", "fastpeft/ops"), ("kernels", "kernels")):
        module = importlib.import_module(f"fastpeft.{package}")
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path / folder)])

    def build(*omitted, cpp=False):
        def does(step):
            return step not in omitted

        ours = FAKE + (REGISTER if does("register") else "") + PUBLIC
        ours = ours if does("describe") else ours.replace(", describe=_describe", "")
        files = {
            step: file for step, file in FILES.items() if cpp or not {step} & {"schema", "implementation", "native"}
        }
        for step, (path, text) in {**files, "ops": ("fastpeft/ops/dummy_scale.py", ours)}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            if does(step):
                (tmp_path / path).write_text(text)
        if does("row"):
            monkeypatch.setitem(ROWS, OP, Row(OP, (CPP, TRITON, EAGER) if cpp else (TRITON, EAGER)))
        if does("ops") and does("row"):
            module = importlib.import_module(f"fastpeft.ops.{OP}")
            if does("export"):
                monkeypatch.setattr(ops, "__all__", [*ops.__all__, OP])
                monkeypatch.setattr(ops, OP, getattr(module, OP), raising=False)
        check = (
            [lambda ctx: dispatch.load(OP, "triton")(torch.ones(3), 2.0)]
            if not {"check", "kernel", "row"} & {*omitted}
            else []
        )
        checked = launched_by(check, {OP}, monkeypatch)
        compiled, timed = [OP] if does("compile") else [], [(OP, "plain")] if does("time") else []
        return House(tmp_path, compiled, timed, checked)

    yield build
    library._destroy()
    _library._described.pop(OP, None)
    _flops.FORMULAS.pop(OP, None)
    for name in [name for name in sys.modules if name.endswith(f".{OP}")]:
        del sys.modules[name]
    dispatch.load.cache_clear()
    dispatch._select.cache_clear()


def test_a_dummy_operator_runs(add):
    """By the checklist alone: eager and Triton agree, torch's own checks of registration pass, explain shows it."""
    house = add()
    assert left_out(OP, house) == []
    x = torch.randn(100)
    assert torch.equal(ops.dummy_scale(x, 3.0), x * 3.0)
    assert torch.equal(ops.dummy_scale(x, 3.0, backend="triton"), x * 3.0)
    for backend in ("eager", "triton"):
        torch.library.opcheck(
            torch.ops.fastpeft.dummy_scale.default, (x, 3.0, backend), test_utils=("test_schema", "test_faketensor")
        )

    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.dummy_scale(x, 3.0, backend="triton")

    (call,) = fastpeft.explain(Module(), x).calls
    assert (call.op, call.backend, call.shape, call.strategy) == (
        OP,
        "triton",
        (("size", 100),),
        "direct: kernels of its own",
    )
    with pytest.raises(ValueError, match=r"which requires an implementation of dummy_scale$"):
        ops.dummy_scale(x, 3.0, backend="cpp")


@pytest.mark.parametrize("step", SAYS)
def test_each_step_left_out(add, step):
    cpp = step in {"schema", "implementation", "native"}
    house = add(step, cpp=cpp)
    said = left_out(OP, house)
    assert SAYS[step] in said
    if step not in {"ops", "kernel"}:  # with these, what they hold is missing too
        assert said == [SAYS[step]]
    if step == "row":
        with pytest.raises(AssertionError, match="dummy_scale has no row"):
            importlib.import_module(f"fastpeft.ops.{OP}")


def test_a_schema_that_differs(add):
    house = add(cpp=True)
    assert left_out(OP, house) == []
    file = house.root / "csrc" / "library.cpp"
    file.write_text(SCHEMA.replace("float factor", "float factor, bool exact"))
    (said,) = left_out(OP, house)
    assert said.startswith(
        "csrc/library.cpp: the schema of dummy_scale differs from fastpeft::dummy_scale(Tensor x, float factor"
    )
