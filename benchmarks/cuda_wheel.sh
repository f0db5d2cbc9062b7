#!/bin/sh
# Build a wheel of llama-cpp-python with CUDA into FOLDER, for one GPU architecture. It needs a CUDA compiler and no GPU,
# so it can be made on any machine and carried: it is ctypes, one wheel fits every Python 3. Stopped, it goes on where it
# was: compiled files stay in FOLDER/build. About half an hour on 2 cores, a few minutes on 16.
#
#   benchmarks/cuda_wheel.sh FOLDER [ARCHITECTURE]     90: H100, H200 (the default); 89: RTX 40; 100, 120: Blackwell; native: this GPU
set -eu
folder=${1:?usage: benchmarks/cuda_wheel.sh FOLDER [ARCHITECTURE]}
arch=${2:-90}
version=0.3.36
python=${PYTHON:-python3}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
[ -x "$nvcc" ] || { echo "cuda_wheel.sh: no nvcc; install NVIDIA's CUDA toolkit, or put its bin folder into PATH" >&2; exit 2; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ -d "$folder/venv" ] || "$python" -m venv "$folder/venv"
bin=$folder/venv/bin
"$bin/python" -m pip install -q "scikit-build-core[pyproject]" cmake ninja wheel

# a compiler without cuBLAS (it is a package of its own): lay NVIDIA's wheel over a copy of the toolkit made of links
major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
root=$(dirname "$(dirname "$("$nvcc" --dryrun x.cu 2>&1 | sed -n 's/^#\$ _HERE_=\(.*\)$/\1\/nvcc/p')")")
if [ -z "$(find -L "$root" -name cublas_v2.h 2>/dev/null | head -n 1)" ]; then
    if [ ! -f "$folder/toolkit/.complete" ]; then
        echo "no cuBLAS in $root: taking it from PyPI (about 450 MB)"
        "$bin/python" -m pip install -q --no-deps --target "$folder/cublas" "nvidia-cublas==$major.*"
        rm -rf "$folder/toolkit"
        mkdir "$folder/toolkit"
        cp -as "$root/." "$folder/toolkit/"
        rm -rf "$folder/toolkit/include" "$folder/toolkit/lib" "$folder/toolkit/lib64" "$folder/toolkit/targets"
        mkdir -p "$folder/toolkit/include" "$folder/toolkit/lib"
        cp -as "$(readlink -f "$root/include")/." "$folder/toolkit/include/"
        cp -as "$(readlink -f "$root/lib64")/." "$folder/toolkit/lib/"
        ln -s lib "$folder/toolkit/lib64"
        for target in "$root"/targets/*; do
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
    root=$folder/toolkit
fi

# processors are not this one's: AVX2 runs on every server that holds such a GPU. No VMM: libcuda is not linked
native=OFF
[ "$arch" = native ] && native=ON
export CUDACXX="$root/bin/nvcc" CUDA_PATH="$root" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}"
export CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_ARCHITECTURES=$arch -DGGML_NATIVE=$native \
    -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF -DCUDAToolkit_ROOT=$root"
if [ ! -f "$folder/source/pyproject.toml" ]; then
    "$bin/python" -m pip download -q --no-deps --no-build-isolation --no-binary llama-cpp-python -d "$folder" "llama-cpp-python==$version"
    rm -rf "$folder/source" "$folder/source.partial"
    mkdir "$folder/source.partial"
    tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder/source.partial" --strip-components 1
    mv "$folder/source.partial" "$folder/source"
fi
"$bin/python" -m pip wheel -v --no-deps --no-build-isolation -C build-dir="$folder/build" -w "$folder/fat" "$folder/source"

"$bin/python" "$(dirname "$0")/cuda_repack.py" "$folder"/fat/llama_cpp_python-"$version"-*.whl "$folder"
