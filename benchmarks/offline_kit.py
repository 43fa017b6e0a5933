"""What a machine that can download nothing needs, in pieces that a narrow way lets through.

Where there is a package index, once:

    python benchmarks/offline_kit.py pack KIT [FILE …] [--package NAME[==VERSION] …] [--python 3.12] [--piece 56]

downloads wheels for that Python (no dependencies: name each that the other machine lacks), and writes them and the
files as KIT/00/piece.00, KIT/01/piece.01, … of at most so many MB, each in a folder of its own with the list of all.
There, for every folder that has come:

    python benchmarks/offline_kit.py take KIT/00 --store STORE

which says what is still missing, and unpacks to STORE/files when nothing is. Pieces may come in any order, and again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "gguf", "setuptools")
"""What a machine with CUDA, torch, transformers, onnx and onnxscript lacks for engines of TensorRT for RTX."""

# Comes as source alone, a few lines of Python that name the other two: its wheel is made here, and serves anywhere.
_BUILT = ("tensorrt-rtx-cu13",)

_GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_17")  # pip takes these literally
_LIST = "pieces.json"


def download(packages: Sequence[str], python: str, folder: Path) -> None:
    """Wheels of packages for another Python, without what they need."""
    pip = (sys.executable, "-m", "pip")
    built = [package for package in packages if package.split("==")[0] in _BUILT]
    if built:
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), *built], check=True)
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in _GLIBC]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    packages = [package for package in packages if package not in built]
    subprocess.run([*pip, "download", "-q", "--dest", str(folder), *options, *packages], check=True)


def pack(kit: Path, files: Sequence[Path], piece_size: int) -> list[Path]:
    """Cut files into pieces.

    Args:
        kit: the folder; must not be there.
        files: by their names alone, which have to differ.
        piece_size: bytes of a piece.

    Returns:
        A folder for each piece.
    """
    names = [file.name for file in files]
    if len({*names}) < len(names):
        raise SystemExit(f"two files have the same name among: {', '.join(sorted(names))}")
    kit.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=kit) as folder:
        whole = Path(folder) / "kit.tar"
        with tarfile.open(whole, "w") as tar:
            for file in files:
                tar.add(file, file.name)
        pieces: dict[str, str] = {}
        folders = []
        with open(whole, "rb") as stream:
            while piece := stream.read(piece_size):
                number = f"{len(pieces):02}"
                folders.append(kit / number)
                folders[-1].mkdir()
                (folders[-1] / f"piece.{number}").write_bytes(piece)
                pieces[f"piece.{number}"] = hashlib.sha256(piece).hexdigest()
    for place in folders:
        (place / _LIST).write_text(json.dumps(pieces, indent=1) + "\n", encoding="utf-8")
    return folders


def take(folder: Path, store: Path) -> list[str]:
    """Put a piece into the store, and unpack the kit when all are there.

    Returns:
        The pieces that are missing.
    """
    listed = (folder / _LIST).read_text(encoding="utf-8")
    pieces: dict[str, str] = json.loads(listed)
    store.mkdir(parents=True, exist_ok=True)
    kept = store / _LIST
    if kept.exists() and kept.read_text(encoding="utf-8") != listed:
        raise SystemExit(f"{store} holds pieces of another kit; take these to another store")
    kept.write_text(listed, encoding="utf-8")
    for file in folder.glob("piece.*"):
        if hashlib.sha256(file.read_bytes()).hexdigest() != pieces.get(file.name):
            raise SystemExit(f"{file} is damaged; send it again")
        shutil.copyfile(file, store / file.name)
    missing = [name for name in pieces if not (store / name).exists()]
    if not missing:
        _unpack([store / name for name in pieces], store)
    return missing


def _unpack(pieces: Sequence[Path], store: Path) -> None:
    whole = store / "kit.tar"
    with open(whole, "wb") as stream:
        for piece in pieces:
            with open(piece, "rb") as part:
                shutil.copyfileobj(part, stream)
    with tarfile.open(whole) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(store / "files", filter="data")
        else:
            tar.extractall(store / "files")
    whole.unlink()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("kit", type=Path)
    packing.add_argument("files", type=Path, nargs="*")
    packing.add_argument("--package", action="append", help=f"[default: {' '.join(PACKAGES)}]")
    packing.add_argument("--python", default="3.12")
    packing.add_argument("--piece", type=float, default=56, help="MB")
    taking = commands.add_parser("take")
    taking.add_argument("folder", type=Path)
    taking.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args(given)
    if arguments.command == "take":
        missing = take(arguments.folder, arguments.store)
        print(f"still missing: {', '.join(missing)}" if missing else f"complete: {arguments.store / 'files'}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        download(arguments.package or PACKAGES, arguments.python, wheels)
        folders = pack(arguments.kit, [*sorted(wheels.iterdir()), *arguments.files], int(arguments.piece * 1e6))
    print(f"{len(folders)} pieces in {arguments.kit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
