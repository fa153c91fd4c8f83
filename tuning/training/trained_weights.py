"""The trained weights under the names that they have on disk, gathered from all processes where FSDP shards them."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from tuning.distributed import zero3

LARGE_WEIGHTS = 20e9  # bytes


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of checkpointing and compiling wrappers."""
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP sharded, or a parameter that ZeRO-3 did, on every process; any other one as it is."""
    if zero3.is_zero3(tensor):
        return zero3.gather_weight(tensor)
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # offloaded shards are on the CPU


def gather_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """All of the gradient of a parameter that FSDP or ZeRO-3 sharded, on every process; any other one as it is."""
    if zero3.is_zero3(parameter):
        return zero3.gather_gradient(parameter)
    return None if parameter.grad is None else gather_tensor(parameter.grad)


def gather_trained(
    model: nn.Module, dtypes: Mapping[str, torch.dtype], *, is_main_process: bool, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """The weights of a model, or of its adapter, by plain name; on the main process only.

    What FSDP or ZeRO-3 shards is gathered to the CPU. FSDP may hold trained weights in float32: they get the dtypes to
    save. All processes must call this then, and each holds one gathered tensor at a time. Tied weights are one tensor
    under several names. Where they have more than 20 GB, they lie in `folder`, if it has room (`keep_on_disk`): the
    main memory need not have room for a second model.
    """
    is_large = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()) > LARGE_WEIGHTS
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if isinstance(model, PeftModel) and name not in trained and f".{model.active_adapter}." not in name:
            continue
        if id(parameter) not in gathered:
            tensor = gather_tensor(parameter).detach()
            if isinstance(parameter, DTensor) or zero3.is_zero3(parameter):
                dtype = dtypes.get(plain_name(name)) if isinstance(parameter, DTensor) else None
                tensor = tensor.to(dtype or tensor.dtype).cpu() if is_main_process else torch.empty(0)
                tensor = keep_on_disk(tensor, folder) if folder and is_large and is_main_process else tensor
            gathered[id(parameter)] = tensor
        weights[plain_name(name)] = gathered[id(parameter)]
    return weights if is_main_process else {}


def keep_on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same numbers in a file of `folder`, which has no name any more and goes with the tensor.

    The tensor itself where the disk has no room. To write to mapped memory without room for it would kill the process,
    and an error would leave the others waiting.
    """
    file = folder / f".gathered-{uuid4().hex}"
    try:
        with open(file, "wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(1, tensor.numel() * tensor.element_size()))
        mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)
    except OSError:
        return tensor
    finally:
        with suppress(OSError):
            file.unlink()


def repeated_names(model: nn.Module) -> set[str]:
    """Every name but the first of tied parameters."""
    names = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return names - {plain_name(name) for name, _ in model.named_parameters()}
