"""The command line: its table of commands, and scripts that run as Python runs them."""

import json
import subprocess
import sys
import types
import zipfile

import pytest

import fastpeft
from fastpeft import cli
from fastpeft.cli import run

PROBE = """
import atexit, json, pickle, sys

class Mine:
    pass

def seen():
    assert type(pickle.loads(pickle.dumps(Mine()))) is Mine
    main = sys.modules["__main__"]
    names = {name: repr(value) for name, value in vars(main).items() if name.startswith("__") and name != "__loader__"}
    names["loader"] = type(__loader__).__name__
    names["spec"] = getattr(__spec__, "name", None)
    names.pop("__spec__")
    return names, sys.argv, sys.path[0], sorted(set(vars(main)) - {"__warningregistry__"}), vars(main) is globals()

print(json.dumps(seen()))
atexit.register(lambda: print(json.dumps(seen())))
sys.exit(len(sys.argv))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The probe as a script, a module, a folder and a zip file; in that folder, and patched no longer than the test."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(PROBE)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastpeft"])
    monkeypatch.setattr(sys, "path", ["set by Python", *sys.path])
    monkeypatch.setattr("atexit.register", lambda end: None)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    yield tmp_path
    fastpeft.unpatch()


@pytest.mark.parametrize("arguments", [
    ["./probe.py", "a", "--report"], ["-m", "probe", "-m", "b"], ["folder", "c"], ["archive.zip"],
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_as_python_runs_it(files, arguments, capsys, monkeypatch):
    """The same globals, arguments, search path, exit status; names can be looked up to the end of the process."""
    plain = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    ends = []
    monkeypatch.setattr("atexit.register", ends.append)
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == plain.returncode
    summary, end = ends
    end()
    printed = capsys.readouterr()
    wanted = [json.loads(line) for line in plain.stdout.splitlines()]
    assert len(wanted) == 2 and [json.loads(line) for line in printed.out.splitlines()] == wanted
    summary()
    assert capsys.readouterr().err == "fastpeft: adapters injected: 0, layers accelerated: 0\n"


def test_a_script_whose_adapters_are_accelerated(files, capsys, monkeypatch):
    pytest.importorskip("peft", reason="peft is not installed")
    (files / "train.py").write_text(
        "import peft, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))\n"
    )
    ends = []
    monkeypatch.setattr("atexit.register", ends.append)
    for rank, told in (("0", "fastpeft: 1 of 1 PEFT layers accelerated\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["--report", "train.py"]) == 0
        model = sys.modules["__main__"].model
        assert len(fastpeft.status(model).layers) == 1 and capsys.readouterr().err == told
        fastpeft.unpatch()
    assert len(ends) == 1
    assert cli.main(["--quiet", "train.py"]) == 0 and len(ends) == 1


def test_errors_pass(files):
    (files / "wrong.py").write_text("raise LookupError('mine')\n")
    with pytest.raises(LookupError, match="mine"):
        cli.main(["wrong.py"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--reprot", "probe.py"], "must be one of --report, --quiet, -m, got '--reprot'"),
    (["no_such.py"], "script must be a file, got 'no_such.py'"),
    (["-m"], "a script must be given, got none"),
])  # fmt: skip
def test_bad_command_line(files, arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)
    assert fastpeft.unpatch() == 0, "nothing is patched before the command line is understood"


def test_commands(capsys):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in cli.COMMANDS) and all(option in usage for option in run.OPTIONS)
    assert cli.main([]) == 2 and capsys.readouterr().err.startswith("usage:")
    assert cli.main(["info"]) == 0 and capsys.readouterr().out == f"{fastpeft.info()}\n"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastpeft", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastpeft ")
