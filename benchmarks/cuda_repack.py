"""Make a wheel small enough to carry: compressed with xz inside the archive, which ``pip`` reads like any other.

    python benchmarks/cuda_repack.py WHEEL FOLDER
    python benchmarks/cuda_repack.py --trips MEGABYTES FOLDER

The second sorts FOLDER's wheels into FOLDER/trip-1, trip-2, ... of at most so many megabytes each (links to the same
files).

llama-cpp-python's build stores each library under three names in two folders; of that wheel one copy is kept. What is
loaded is in ``llama_cpp/lib``: ``libllama.so`` by name and the others by their soname.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path

LOADED = re.compile(r"llama_cpp/lib/(libllama\.so|libggml[-a-z]*\.so\.\d+)$")


def repack(wheel: Path, folder: Path) -> Path:
    """Write the small wheel into ``folder`` under the same name; returns its path."""
    out, partial = folder / wheel.name, folder / (wheel.name + ".partial")
    llama = wheel.name.startswith("llama_cpp_python-")
    record: list[str] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as small:
        recorded = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for info in source.infolist():
            name = info.filename
            built = llama and (".so" in name or name.startswith(("lib/", "include/", "bin/")))
            if name == recorded or info.is_dir() or (built and not LOADED.match(name)):
                continue
            content = source.read(info)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}")
            small.writestr(info, content, compress_type=zipfile.ZIP_LZMA)
        small.writestr(recorded, "\n".join([*record, f"{recorded},,", ""]))
    if llama and not any(LOADED.match(line.split(",")[0]) for line in record):
        partial.unlink()
        raise SystemExit(f"{wheel}: no llama.cpp libraries in it")
    partial.replace(out)
    return out


def trips(folder: Path, most_mb: float) -> list[list[Path]]:
    """The wheels of ``folder``, largest first, each in the first trip with room for it. Ends where one has no room."""
    sizes = {wheel: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    found: list[list[Path]] = []
    for wheel in sorted(sizes, key=lambda w: (-sizes[w], w.name)):
        if sizes[wheel] > 1e6 * most_mb:
            raise SystemExit(f"{wheel}: {sizes[wheel] / 1e6:.0f} MB, but a trip takes {most_mb:g}")
        room = (t for t in found if sum(sizes[w] for w in [*t, wheel]) <= 1e6 * most_mb)
        trip = next(room, None)
        if trip is None:
            found.append(trip := [])
        trip.append(wheel)
    for i, trip in enumerate(found, 1):
        place = folder / f"trip-{i}"
        if place.exists():
            raise SystemExit(f"{place}: exists; remove it first")
        place.mkdir()
        for wheel in trip:
            os.link(wheel, place / wheel.name)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", metavar="WHEEL")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--trips", type=float, metavar="MEGABYTES")
    args = parser.parse_args()
    if (args.wheel is None) == (args.trips is None):
        parser.error("a wheel, or --trips")
    read = args.folder if args.wheel is None else args.wheel
    if not read.exists():
        parser.error(f"{read}: no such file or folder")
    if args.trips is not None:
        for i, trip in enumerate(trips(args.folder, args.trips), 1):
            print(f"trip-{i}: {sum(w.stat().st_size for w in trip) / 1e6:.0f} MB, {len(trip)} wheels")
        sys.exit()
    made = repack(args.wheel, args.folder)
    print(f"Wrote {made} ({made.stat().st_size / 1e6:.0f} MB)")
