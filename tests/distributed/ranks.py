"""One rank of a launch: runs the jobs of a JSON file one after the other, as `tuning.train` would be called.

A job is the options of a run, and what to set in the environment under `environ`.

Starting a process costs seconds, so every test of a strategy shares one launch. With `FSDP_ON_CPU` set, accelerate is
made to take the CPU for an accelerator: it shards parameters on accelerators only, but FSDP2 itself runs on gloo.
"""

import json
import os
import sys
from pathlib import Path


def shard_on_cpu() -> None:
    from accelerate import state
    from accelerate.utils import DistributedType

    make = state.PartialState.__init__

    def pretend(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    state.PartialState.__init__ = pretend


def main(path: str) -> None:
    import torch

    import tuning

    torch.set_num_threads(1)
    if os.environ.get("FSDP_ON_CPU"):
        shard_on_cpu()
    for job in json.loads(Path(path).read_text()):
        os.environ.update(job.pop("environ", {}))
        tuning.train(job)


if __name__ == "__main__":
    main(sys.argv[1])
