#!/bin/sh
# Build llama-server from the source inside llama-cpp-python's sdist, into FOLDER: the judge of benchmarks/llama_server.py.
set -eu
folder=${1:?usage: benchmarks/build_llama_server.sh FOLDER}
version=0.3.36
mkdir -p "$folder"
python3 -m pip download --no-deps --no-binary :all: "llama-cpp-python==$version" -d "$folder"
tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
cmake -S "$folder/llama_cpp_python-$version/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
cmake --build "$folder/build" --target llama-server -j "$(nproc)"
echo "Wrote $folder/build/bin/llama-server"
