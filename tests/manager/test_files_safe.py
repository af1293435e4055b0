"""Files and folders are replaced whole: whatever fails, and whenever the process is killed."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from fastpeft import EfficientFineTuningManager, load_adapter, save_adapter
from fastpeft.files import safe, tensors
from manager_cases import Small

pytest.importorskip("safetensors")
from checks import kill_saves

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")


def write(folder, text):
    """A folder of three files that belong together."""

    def fill(aside):
        for name in "abc":
            (aside / name).write_text(text)

    safe.write_folder("test", folder, fill, lambda name: name in "abc")


def texts(folder):
    return {(folder / name).read_text() for name in "abc"}


@forks
def test_kills(tmp_path):
    """What ``python bench kills`` does a thousand times."""
    found = kill_saves.run(8, tmp_path, longest=0.1)
    assert found["kills"] == 8


EVENTS = {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree", "shutil.copytree",
          "os.symlink", "tempfile.mkdtemp", "tempfile.mkstemp", "os.listdir", "os.scandir", "fcntl.flock", "ctypes.dlsym",
          "ctypes.get_errno"}  # fmt: skip


def killed_at(number, what):
    """Run ``what`` in a process that kills itself at its ``number``-th step in the file system; False: it came through."""
    child = os.fork()
    if child == 0:
        left = [number]

        def hook(event, _):
            if event in EVENTS:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            what()
        except BaseException:
            os._exit(2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def tidy(folder):
    """What the next save would remove in a minute."""
    for path in folder.glob(".*.part*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@forks
@pytest.mark.parametrize("swaps", [True, False])
def test_killed_at_every_step(swaps, tmp_path, monkeypatch):
    """The folder is the old one or the new one; without a swap by the system, also after the next save or load."""
    if not swaps:
        monkeypatch.setattr(safe, "_exchanged", lambda one, other: False)
    folder, step, seen = tmp_path / "folder", 0, set()
    write(folder, "old")
    (folder / "d").mkdir()
    (folder / "d" / "kept").write_text("kept")
    while killed_at(step, lambda: write(folder, "new")):
        if swaps:
            assert folder.is_dir()
        now = safe.read_folder("test", folder, texts)
        assert now in ({"old"}, {"new"}) and sorted(os.listdir(folder)) == ["a", "b", "c", "d"]
        assert (folder / "d" / "kept").read_text() == "kept"
        seen |= now
        tidy(tmp_path)
        write(folder, "old")
        step += 1
    assert step > 15 and seen == {"old", "new"} and texts(folder) == {"new"}
    file, step, seen = tmp_path / "file", 0, set()
    file.write_text("old")
    while killed_at(step, lambda: safe.write_file(file, lambda aside: aside.write_text("new"))):
        seen.add(file.read_text())
        tidy(tmp_path)
        file.write_text("old")
        step += 1
    assert step > 5 and seen == {"old", "new"}


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    folder, file = tmp_path / "a", tmp_path / "a.pt"
    left = [tmp_path / ".a.abcd_123.part", tmp_path / ".a.pt.abcd_123.part.pt"]
    left[0].mkdir()
    left[1].write_text("x")
    others = [tmp_path / ".a.notes.partial", tmp_path / ".b.abcd_123.part", tmp_path / ".a.abcd_123.part.txt"]
    for path in others:
        path.write_text("mine")
    write(folder, "x")
    safe.write_file(file, lambda aside: aside.write_text("y"))
    assert all(path.exists() for path in left)  # young: a writer may be alive
    old = time.time() - 3600
    for path in (*left, *others):
        os.utime(path, (old, old))
    with safe._locked(os.open(left[0], os.O_RDONLY)):
        write(folder, "x")
        assert left[0].exists()  # a writer is
    write(folder, "x")
    safe.write_file(file, lambda aside: aside.write_text("y"))
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_reader_never_sees_two_versions(tmp_path):
    """A folder that is replaced again and again, at times twice at once, while it is read file by file."""
    folder, done = tmp_path / "a", threading.Event()
    write(folder, "0")

    def writer():
        number = 0
        while not done.is_set():
            number += 1
            write(folder, str(number))
            time.sleep(0.01 * (number % 3))  # never at rest, no read of three files would ever be of one version

    def slowly(path):
        return {(path / name).read_text() for name in "abc" if time.sleep(0.0005) is None}

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        found = [safe.read_folder("test", folder, slowly) for _ in range(60)]
    finally:
        done.set()
        thread.join()
    assert all(len(each) == 1 for each in found) and len(set.union(*found)) > 3


def test_an_error_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2)
    save_adapter(manager, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for module, name in ((tensors, "write_sharded"), (os, "fsync"), (safe, "_put")):
        with monkeypatch.context() as patch:

            def fails(*_, **__):
                raise OSError(errno.ENOSPC, "no space")

            patch.setattr(module, name, fails)
            with pytest.raises(OSError, match="no space"):
                save_adapter(manager, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert os.listdir(tmp_path) == ["a"]


def test_permissions_links_and_places(tmp_path, monkeypatch):
    folder, link = tmp_path / "real", tmp_path / "link"
    write(folder, "old")
    usual = os.stat(folder).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    assert usual == 0o777 & ~mask and os.stat(folder / "a").st_mode & 0o777 == 0o666 & ~mask
    folder.chmod(0o750)
    link.symlink_to(folder)
    (folder / "pointer").symlink_to("nowhere")
    write(link, "new")
    assert link.is_symlink() and texts(folder) == {"new"} and os.stat(folder).st_mode & 0o777 == 0o750
    assert os.readlink(folder / "pointer") == "nowhere"
    write(tmp_path / "not" / "there" / "yet", "x")
    assert texts(tmp_path / "not" / "there" / "yet") == {"x"}
    monkeypatch.chdir(folder)
    for place in (".", folder, tmp_path):
        with pytest.raises(ValueError, match="path must be no folder that the process works in"):
            write(place if place != "." else folder, "x")
    file, other = tmp_path / "f", tmp_path / "g"
    file.write_text("x")
    file.chmod(0o600)
    other.symlink_to(file)
    safe.write_file(other, lambda aside: aside.write_text("y"))
    assert other.is_symlink() and file.read_text() == "y" and os.stat(file).st_mode & 0o777 == 0o600


def test_swap_is_what_this_system_has(tmp_path):
    """On Linux, where the tests run, folders are swapped by one call, and not renamed twice."""
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert safe._exchanged(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(OSError, match="No such file"):
        safe._exchanged(tmp_path / "a", tmp_path / "c")


def test_without_safetensors(tmp_path, monkeypatch):
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2)
    save_adapter(manager, tmp_path / "l.pt", "loralib")
    save_adapter(manager, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (
        lambda: save_adapter(manager, tmp_path / "b"),
        lambda: save_adapter(manager, tmp_path / "b.safetensors", "kohya"),
        lambda: load_adapter(Small(), tmp_path / "a"),
    ):
        with pytest.raises(ImportError, match=r"pip install fastpeft\[files\]"):
            call()
    assert sorted(os.listdir(tmp_path)) == ["a", "l.pt"]
    twin = load_adapter(Small(), tmp_path / "l.pt", alpha=16)
    assert torch.equal(twin.model.body["a"].lora_A, manager.model.body["a"].lora_A)


def test_json_is_as_it_was_written(tmp_path):
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2)
    save_adapter(manager, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] and config["lora_alpha"] == 16
