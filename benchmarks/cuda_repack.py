"""Make a wheel small enough to carry: compressed with xz inside the archive, which ``pip`` reads like any other.

    python benchmarks/cuda_repack.py WHEEL FOLDER

llama-cpp-python's build stores each library under three names in two folders; of that wheel one copy is kept. What is
loaded is in ``llama_cpp/lib``: ``libllama.so`` by name and the others by their soname.
"""

from __future__ import annotations

import base64
import hashlib
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


if __name__ == "__main__":
    made = repack(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"Wrote {made} ({made.stat().st_size / 1e6:.0f} MB)")
