"""Process 3 of 8 loads a model of LLaVA-1.5-7B's shape under FSDP2; prints what it took, as JSON, in bytes.

The other seven are a fake process group. What it receives is filled with zeros here, so that this process takes the
memory that it would take among real ones.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import shard_on_cpu
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD, RANK = 8, 3
ENVIRONMENT = {
    **{"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29999", "OMP_NUM_THREADS": "1"},
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    **{"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
}


def peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def receive(tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
    tensor.zero_()


def main() -> None:
    os.environ.update(ENVIRONMENT)
    shard_on_cpu()
    dist.broadcast = receive
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    import tuning  # before transformers: it makes torchvision importable  # noqa: F401, I001
    from accelerate import Accelerator
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from tuning.config.options import ModelArguments
    from tuning.distributed.fsdp import choose_wrap_classes, materialize_meta_params
    from tuning.model import load
    from tuning.model.loss import patch_supervised_loss

    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32064), vision_config=tower, image_token_index=32000)
    accelerator = Accelerator(cpu=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_resident()
    model = load.load_model(ModelArguments(), config, dtype=torch.bfloat16, attention="sdpa")
    patch_supervised_loss(model)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    classes = choose_wrap_classes(model)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = classes
    materialize_meta_params(model)
    optimizer = torch.optim.SGD(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters}
    for parameter in parameters:
        parameter.to_local().data.zero_()  # its part of what process 0 would scatter
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    local = sum(parameter.to_local().numel() * parameter.element_size() for parameter in parameters)
    took = peak_resident() - before
    print(json.dumps({"whole": whole, "local": local, "largest": max(sizes), "took": took, "wrapped": classes}))


if __name__ == "__main__":
    main()
