#!/bin/sh
# tracekit on a machine with an NVIDIA GPU and no network: what is made elsewhere and carried, and what runs there.
# Every stage can be stopped and goes on where it was. docs/cuda.md tells the whole way.
#
#   benchmarks/cuda.sh wheel FOLDER [ARCHITECTURE]   a wheel of llama-cpp-python with CUDA; needs nvcc and no GPU. 90: H100,
#                                                    H200 (the default); 89: RTX 40; 100, 120: Blackwell. Half an hour on 2 cores
#   benchmarks/cuda.sh pack FOLDER [MB]              beside it, tracekit and whatever it needs, recompressed to be carried;
#                                                    with MB, sorted into FOLDER/trip-1, -2, ... of at most so many each
#   benchmarks/cuda.sh install FOLDER                there: every wheel in FOLDER (call it again after each trip)
#   benchmarks/cuda.sh run OUT [PLAN] [MINUTES]      there: the campaign; exit code 3 means, call it again. Where llama.cpp
#                                                    ends the process (a CUDA error) it goes on by itself, twice
#
# PYTHON: the interpreter (python3). TARGET_PYTHON: version of the one there, for pack (3.12). HAVE: names of packages that
# the machine has already and that need not be carried. SITE: where install puts them (site-cuda); empty: among PYTHON's
# own. MODELS: where the big models go (models-cuda).
set -eu
usage() { sed -n '5,11s/^#  *//p' "$0" >&2; exit 2; }
unset CDPATH # with it cd may lead elsewhere, and prints where
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
site=${SITE-$root/site-cuda}
models=${MODELS:-$root/models-cuda}

wheel() {
    folder=$1
    case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
    case $folder in *[[:space:]]*) echo "cuda.sh: $folder: CMake takes no path with blanks; choose another folder" >&2; exit 2 ;; esac
    arch=${2:-90}
    version=0.3.36
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
    [ -x "$nvcc" ] || { echo "cuda.sh: no nvcc; install NVIDIA's CUDA toolkit, or put its bin folder into PATH" >&2; exit 2; }
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    [ -x "$folder/venv/bin/pip" ] || "$python" -m venv --clear "$folder/venv"
    bin=$folder/venv/bin
    "$bin/python" -m pip install -q "scikit-build-core[pyproject]" cmake ninja wheel

    # a compiler without cuBLAS (it is a package of its own): lay NVIDIA's wheel over a copy of the toolkit made of links
    major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    cuda=$(dirname "$(dirname "$("$nvcc" --dryrun x.cu 2>&1 | sed -n 's/^#\$ _HERE_=\(.*\)$/\1\/nvcc/p')")")
    if [ -z "$(find -L "$cuda" -name cublas_v2.h 2>/dev/null | head -n 1)" ]; then
        if [ ! -f "$folder/toolkit/.complete" ]; then
            echo "no cuBLAS in $cuda: taking it from PyPI (about 450 MB)"
            "$bin/python" -m pip install -q --no-deps --target "$folder/cublas" "nvidia-cublas==$major.*"
            rm -rf "$folder/toolkit"
            mkdir "$folder/toolkit"
            cp -as "$cuda/." "$folder/toolkit/"
            rm -rf "$folder/toolkit/include" "$folder/toolkit/lib" "$folder/toolkit/lib64" "$folder/toolkit/targets"
            mkdir -p "$folder/toolkit/include" "$folder/toolkit/lib"
            cp -as "$(readlink -f "$cuda/include")/." "$folder/toolkit/include/"
            cp -as "$(readlink -f "$cuda/lib64")/." "$folder/toolkit/lib/"
            ln -s lib "$folder/toolkit/lib64"
            for target in "$cuda"/targets/*; do
                mkdir -p "$folder/toolkit/targets/$(basename "$target")"
                ln -s ../../include ../../lib "$folder/toolkit/targets/$(basename "$target")/"
            done
            for file in "$folder"/cublas/nvidia/cu"$major"/include/*; do ln -sf "$file" "$folder/toolkit/include/"; done
            for file in "$folder"/cublas/nvidia/cu"$major"/lib/*.so.*; do
                ln -sf "$file" "$folder/toolkit/lib/"
                ln -sf "$file" "$folder/toolkit/lib/$(basename "$file" ".$major")"
            done
            touch "$folder/toolkit/.complete"
        fi
        cuda=$folder/toolkit
    fi

    # processors are not this one's: AVX2 runs on every server that holds such a GPU. No VMM: libcuda is not linked
    native=OFF
    [ "$arch" = native ] && native=ON
    export CUDACXX="$cuda/bin/nvcc" CUDA_PATH="$cuda" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}"
    export CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_ARCHITECTURES=$arch -DGGML_NATIVE=$native \
        -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF -DCUDAToolkit_ROOT=$cuda"
    if [ ! -f "$folder/source/pyproject.toml" ]; then
        "$bin/python" -m pip download -q --no-deps --no-build-isolation --no-binary llama-cpp-python -d "$folder" "llama-cpp-python==$version"
        rm -rf "$folder/source" "$folder/source.partial"
        mkdir "$folder/source.partial"
        tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder/source.partial" --strip-components 1
        mv "$folder/source.partial" "$folder/source"
    fi
    "$bin/python" -m pip wheel -v --no-deps --no-build-isolation -C build-dir="$folder/build" -w "$folder/fat" "$folder/source"

    "$bin/python" "$here/cuda_repack.py" "$folder"/fat/llama_cpp_python-"$version"-*.whl "$folder"
}

pack() {
    folder=$(mkdir -p "$1" && cd "$1" && pwd)
    ls "$folder"/llama_cpp_python-*.whl >/dev/null 2>&1 || { echo "cuda.sh: no CUDA wheel in $folder; make it with: cuda.sh wheel $1" >&2; exit 2; }
    target=${TARGET_PYTHON:-3.12}
    rm -rf "$folder/all" "$folder"/tracekit-*.whl # of an earlier state, perhaps
    "$python" -m pip wheel -q --no-deps -w "$folder/all" "$root"
    abi=cp$(echo "$target" | tr -d .)
    platforms=$(for n in 5 12 17 24 27 28 31 34 35 39; do printf ' --platform manylinux_2_%s_x86_64' "$n"; done)
    # shellcheck disable=SC2086  # a list of options
    "$python" -m pip download -q --only-binary=:all: --python-version "$target" --implementation cp --abi "$abi" --abi abi3 \
        --abi none $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64 \
        --find-links "$folder" -d "$folder/all" "tracekit[engine] @ $("$python" -c 'import pathlib, sys
print(pathlib.Path(sys.argv[1]).as_uri())' "$folder"/all/tracekit-*.whl)"
    for name in ${HAVE:-}; do
        rm -f "$folder/all/$(echo "$name" | tr '-' '_')"-[0-9]*.whl
    done
    for file in "$folder"/*.whl; do # of an earlier pack: pip is offline there, and takes one version of each
        case ${file##*/} in llama_cpp_python-*) ;; *) [ -f "$folder/all/${file##*/}" ] || rm "$file" ;; esac
    done
    for file in "$folder"/all/*.whl; do
        [ -f "$folder/$(basename "$file")" ] || "$python" "$here/cuda_repack.py" "$file" "$folder"
    done
    rm -rf "$folder"/trip-*
    [ -z "${2:-}" ] || "$python" "$here/cuda_repack.py" --trips "$2" "$folder"
    du -h "$folder"/*.whl | sort -h
}

find_libraries() { # CUDA's may lie in PyTorch's packages
    libraries=$("$python" -c 'import glob, site
print(":".join(p for s in site.getsitepackages() for p in glob.glob(s + "/nvidia/*/lib")))')
    # no empty part: that is the current folder
    export PYTHONPATH="${site:+$site:}$root${PYTHONPATH:+:$PYTHONPATH}"
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+${libraries:+:}}$libraries"
}

install() {
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade ${site:+--target "$site"} "$1"/*.whl
    # what tracekit asks for and is not there yet: it may come with another trip
    missing=$(PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} "$python" -c '
from importlib.metadata import PackageNotFoundError, requires, version
import re
try:
    wanted = [re.match("[A-Za-z0-9_.-]+", r)[0] for r in requires("tracekit") if "extra" not in r or "engine" in r]
except PackageNotFoundError:
    wanted = ["tracekit"]
for name in wanted:
    try:
        version(name)
    except PackageNotFoundError:
        print(name, end=" ")')
    [ "${missing% }" != vl-convert-python ] || { echo "without vl-convert-python: no pictures"; missing=; }
    [ -z "$missing" ] || { echo "cuda.sh: still missing: $missing(carry them here, and call install again)"; return; }
    find_libraries
    "$python" -m tracekit doctor
}

left() { # of the minutes that were given; 0: there is no limit
    awk -v all="$minutes" -v gone=$(($(date +%s) - began)) 'BEGIN {
        rest = all - gone / 60; print(all == 0 ? 0 : (rest > 0 ? rest : "nothing")) }'
}

run() {
    minutes=${3:-0}
    case $minutes in *[!0-9.]* | *.*.* | .) echo "cuda.sh: $minutes: minutes are a number" >&2; exit 2 ;; esac
    find_libraries
    began=$(date +%s)
    for try in 1 2 3; do
        rest=$(left)
        [ "$rest" != nothing ] || exit 3
        code=0
        "$python" -m tracekit campaign "${2:-cuda}" -o "$1" --models "$models" --minutes "$rest" || code=$?
        case $code in
            0) break ;;
            134 | 139) [ "$try" = 3 ] || echo "cuda.sh: llama.cpp ended the process; going on with what is missing" >&2 ;;
            *) exit "$code" ;;
        esac
    done
    [ "$code" = 0 ] || exit "$code"
    model=$(find "$models" -name '*.gguf' ! -name '*sidecar*' | sort | head -n 1)
    for script in backend_sampling overhead; do # what copying logits costs, and what recording does: a minute or two each
        [ -f "$1/$script.txt" ] && continue
        [ "$(left)" != nothing ] || exit 3
        options="--repeats 2 --max-tokens 48 --every 5"
        [ "$script" = backend_sampling ] || options="--repeats 2 --max-tokens 64 --prompts 3 --starts 2"
        # shellcheck disable=SC2086  # a list of options
        "$python" "$here/$script.py" $options "$model" >"$1/$script.partial" 2>&1 || code=$?
        cat "$1/$script.partial"
        [ "$code" = 0 ] || { echo "cuda.sh: $script.py failed; the same command tries it again" >&2; exit "$code"; }
        mv "$1/$script.partial" "$1/$script.txt"
    done
}

[ $# -ge 2 ] || usage
stage=$1
shift
case $stage in
    wheel | pack | install | run) "$stage" "$@" ;;
    *) usage ;;
esac
