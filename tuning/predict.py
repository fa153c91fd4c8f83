"""Starts `vlm-tuning predict` by path, as `accelerate launch tuning/predict.py …` does."""

import sys
from pathlib import Path

if not __package__:  # run by path: Python puts this folder first on its path, and does not find `tuning` there
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tuning.cli import main
from tuning.distributed.processes import exit_process

if __name__ == "__main__":
    exit_process(main(["predict", *sys.argv[1:]]))
