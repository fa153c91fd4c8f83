"""python tests/cuda/run.py OPTIONS.json, in the environment of setup.sh: trains on the stand-in for a GPU.

With words of a command line, such as `predict --data_path …`, it runs that command of `vlm-tuning`. Training writes
`result-RANK.json` beside the options: losses, attention kernels, and where the host waited in the last step. The exit
code is 1 where training failed. Device 0 stands in for an H100, unless `NULL_CUDA_CAPABILITY` is not 90.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import cuda_on_cpu  # first: it starts the program again
import torch
from transformers.trainer_callback import CallbackHandler

import tuning
from tuning import cli


def record(device: cuda_on_cpu.CudaOnCpu) -> tuple[list[float], list[tuple[Counter, int]]]:
    """Losses as they are logged; after each step, what the device had seen by then: waits by place, kernels."""
    losses, steps = [], [(Counter(), 0)]
    on_log, on_step_end = CallbackHandler.on_log, CallbackHandler.on_step_end

    def log(handler, args, state, control, logs):
        losses.extend([logs["loss"]] if "loss" in logs else [])
        return on_log(handler, args, state, control, logs)

    def step_end(handler, args, state, control):
        control = on_step_end(handler, args, state, control)
        steps.append((Counter(device.syncs), cuda_on_cpu.launches()))
        return control

    CallbackHandler.on_log, CallbackHandler.on_step_end = log, step_end
    return losses, steps


def main(file: Path) -> None:
    torch.set_num_threads(1)
    cuda_on_cpu.gloo_for_nccl()
    device = cuda_on_cpu.CudaOnCpu()
    losses, steps = record(device)
    with device:
        tuning.train(json.loads(file.read_text()))
    (before, launched_before), (after, launched) = steps[-2:]
    result = {
        "losses": losses,
        "attention": dict(device.attention),
        "collectives": dict(device.collectives),
        "waits": dict((after - before).most_common()),
        "kernels": launched - launched_before,
    }
    file.with_name(f"result-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        torch.set_num_threads(1)
        with cuda_on_cpu.CudaOnCpu():
            sys.exit(cli.main(sys.argv[1:]))
    main(Path(sys.argv[1]))
