#!/usr/bin/env bash
# bash tests/cuda/setup.sh FOLDER, from the project's root: makes a virtual environment with PyTorch's CUDA build and the
# CUDA runtime of null_cuda.c. It needs gcc, 5.2 GB and about two minutes. PYTHON: another interpreter than python3;
# CUDA_HOME: headers of an installed toolkit in place of the wheels'.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
"$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >"$folder/requirements.txt"
# Three equals signs: that very version, so that pip leaves a 2.13.0+cpu alone. The crt wheel completes the headers.
"$python" -m pip install --quiet "torch===2.13.0" "nvidia-cuda-crt==13.0.*" -r "$folder/requirements.txt"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
out=$folder/null_cuda
mkdir -p "$out"
gcc -O1 -fPIC -w -I "${CUDA_HOME:-$site/nvidia/cu13}/include" -c "$here/null_cuda.c" -o "$out/null_cuda.o"

# Whatever else PyTorch calls of the runtime, cuBLAS and the driver succeeds and does nothing.
names() { nm "$@" | grep -oE ' [UT] (cuda|cublas|cu[A-Z])[A-Za-z0-9_]+' | cut -c4- | sort -u; }
names -D --undefined-only "$site"/torch/lib/lib{torch_{cuda,cuda_linalg,cpu,python},c10_cuda,caffe2_nvrtc}.so >"$out/called"
names --defined-only "$out/null_cuda.o" >"$out/defined"
comm -23 "$out/called" "$out/defined" | sed 's/.*/int &(void) { return 0; }/' >"$out/stubs.c"
gcc -O1 -fPIC -w -shared -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1" "$out/null_cuda.o" "$out/stubs.c"
