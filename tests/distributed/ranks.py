"""One rank of a launch: runs the jobs of a JSON file one after the other, as `tuning.train` would be called.

A job is the options of a run; `environ`: what to set in the environment; `fault`: the rank that is to meet one, and
which; `constants`: other values of our modules' constants, by full name. How each rank ended goes to `outcome-RANK`
beside the job's output_dir.

Starting a process costs seconds, so every test of a strategy shares one launch. With `FSDP_ON_CPU` set, accelerate is
made to take the CPU for an accelerator: it shards parameters on accelerators only, but FSDP2 itself runs on gloo.
ZeRO-3 is made to shard small weights, too.
"""

import errno
import gc
import json
import os
import signal
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path


def shard_on_cpu() -> None:
    from accelerate import state
    from accelerate.utils import DistributedType
    from torch.nn.parallel import DistributedDataParallel

    make = state.PartialState.__init__

    def pretend(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    state.PartialState.__init__ = pretend
    make_ddp = DistributedDataParallel.__init__

    def without_devices(self, module, device_ids=None, output_device=None, **settings):
        make_ddp(self, module, **settings)

    DistributedDataParallel.__init__ = without_devices


def shard_small_weights() -> None:
    """ZeRO-3 keeps small weights whole, and gathered ones for later use: each of a tiny model would stay whole."""
    from accelerate.utils import DeepSpeedPlugin

    make = DeepSpeedPlugin.__post_init__
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")

    def configure(self):
        make(self)
        self.deepspeed_config["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}

    DeepSpeedPlugin.__post_init__ = configure


def no_number(trainer, compute_loss, *args, **kwargs):
    return compute_loss(trainer, *args, **kwargs) * float("nan" if trainer.state.global_step == 2 else 1)


def asked_to_stop(trainer, compute_loss, *args, **kwargs):
    if trainer.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return compute_loss(trainer, *args, **kwargs)


def no_room(trainer, write, folder):
    if trainer.state.global_step == 4:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(trainer, folder)


def half_a_tensor(trainer, save, target, *args):
    from safetensors.torch import load_file, save_file

    names = save(trainer, target, *args)
    (file,) = target.glob("*.safetensors")
    weights = load_file(file)
    weights[min(weights)] /= 2
    save_file(weights, file, {"format": "pt"})
    return names


def frozen_moved(trainer, create_optimizer, *args):
    def move(*_):  # FSDP has other parameters than there were before, of which this process holds a share
        frozen = next(parameter for parameter in trainer.model.parameters() if not parameter.requires_grad)
        frozen = getattr(frozen, "ds_tensor", frozen).data  # DeepSpeed's name for this process's share
        mine = frozen.to_local() if hasattr(frozen, "to_local") else frozen
        mine.view(-1)[:1] += 1

    optimizer = create_optimizer(trainer, *args)
    optimizer.register_step_post_hook(move)
    return optimizer


FAULTS = {
    "nan": ("compute_loss", no_number),
    "signal": ("compute_loss", asked_to_stop),
    "frozen": ("create_optimizer", frozen_moved),
    "disk": ("_write_trainer_state", no_room),
    "save": ("save_final", half_a_tensor),
}


@contextmanager
def met(fault: dict | None):
    """Let this rank's trainer meet a fault, if it is the one to."""
    from tuning.training.trainer import SupervisedTrainer

    if fault is None or str(fault["rank"]) != os.environ["RANK"]:
        yield
        return
    name, faulty = FAULTS[fault["kind"]]
    sound = getattr(SupervisedTrainer, name)
    setattr(SupervisedTrainer, name, lambda trainer, *args, **kwargs: faulty(trainer, sound, *args, **kwargs))
    yield
    setattr(SupervisedTrainer, name, sound)


@contextmanager
def changed(constants: dict[str, int]):
    """Other values of `module.NAME`."""
    places = [(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in constants]
    usual = [getattr(*place) for place in places]
    for place, value in zip(places, constants.values(), strict=True):
        setattr(*place, value)
    yield
    for place, value in zip(places, usual, strict=True):
        setattr(*place, value)


def main(path: str) -> None:
    import torch

    import tuning
    from tuning.errors import RunEnded, UserError

    torch.set_num_threads(1)
    if os.environ.get("FSDP_ON_CPU"):
        shard_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        shard_small_weights()
    for job in json.loads(Path(path).read_text()):
        gc.collect()
        gc.freeze()  # what was imported by now need not be looked through again: a run collects garbage a few times
        os.environ.update(job.pop("environ", {}))
        outcome = Path(f"{job['output_dir']}-outcome-{os.environ['RANK']}")
        with met(job.pop("fault", None)), changed(job.pop("constants", {})):
            try:
                tuning.train(job)
                outcome.write_text("done")
            except (UserError, RunEnded) as error:
                outcome.write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
    from tuning.distributed.processes import exit_process

    exit_process(0)
