"""Attention of vision towers that keep pictures, or windows of a picture, apart by their lengths.

transformers runs such a tower's SDPA once for each picture or window. A tower whose attention has "flash" in its name
gets all lengths in one call. So does this one, which is registered through transformers' attention interface:
https://huggingface.co/docs/transformers/attention_interface
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuning.model.batch_trial import GPU_TOLERANCE, distance
from tuning.model.decoder_calls import run_quietly
from tuning.model.packed_attention import _VARLEN_OPTIONS, _autocast, _can_use_flash
from tuning.model.padding_free import HALF_TOLERANCE, TOLERANCE
from tuning.model.row_by_row import BOUNDS
from tuning.model.vision_tower import find_tower, keeps_pictures_apart

TOWER = "tower_flash"  # a name with "flash", for which transformers hands over lengths


def tower_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each segment, in both directions. `query`, `key`, `value` `[1, H, T, D]` → `[1, T, H, D]`.

    `cu_seq_lens_q` `[segments + 1]`: where each segment begins, and where the last one ends. Without it this is
    transformers' SDPA. On a CUDA GPU, in 16 bits, FlashAttention runs all segments in one kernel. Elsewhere SDPA runs
    neighbours of equal length together. Raises `NotImplementedError` for causal attention.
    """
    others |= {"scaling": scaling, "dropout": dropout}
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    if others.pop("is_causal", getattr(module, "is_causal", True)):
        raise NotImplementedError("a causal vision tower")
    query, key, value = _autocast(query, key, value)
    if _can_use_kernel(query, key, dropout):
        return _in_one_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling), None

    def attend(*states: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, *states, None, is_causal=False, **others)[0]

    return _by_length(attend, query, key, value, cu_seq_lens_q), None


def _can_use_kernel(query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    fits = query.shape[1] == key.shape[1] and query.shape[-1] % 8 == 0
    return fits and _can_use_flash(query, dropout, None, None) and torch.cuda.get_device_capability() >= (8, 0)


@torch.compiler.disable
def _in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int | None,
    scaling: float | None,
) -> torch.Tensor:
    options: dict[str, Any] = {"window_size": (-1, -1)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": False}
    if scaling is not None and "scale" in _VARLEN_OPTIONS:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    bounds = bounds.to(query.device, torch.int32)
    longest = max(_lengths(bounds)) if longest is None else int(longest)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)[None]


@torch.compiler.disable
def _by_length(attend: Callable, *states_and_bounds: torch.Tensor) -> torch.Tensor:
    """`attend(query, key, value)` for each run of segments of equal length, which become the rows of a batch.

    To sort the segments by length first would leave fewer runs, but on a CPU the copies cost more than it saves.
    """
    *states, bounds = states_and_bounds
    runs = [(length, len([*run])) for length, run in groupby(filter(None, _lengths(bounds)))]
    sizes = [length * number for length, number in runs]
    parts = zip(runs, *(tensor[0].transpose(0, 1).split(sizes) for tensor in states), strict=True)
    attended = []
    for (length, number), *run in parts:
        rows = (tensor.unflatten(0, (number, length)).transpose(1, 2) for tensor in run)
        attended.append(attend(*rows).flatten(0, 1))
    return torch.cat(attended)[None]


_known_lengths = WeakTensorKeyDictionary()


def _lengths(bounds: torch.Tensor) -> list[int]:
    """The lengths of segments. A GPU is asked for them once, not in every layer."""
    if bounds not in _known_lengths:
        _known_lengths[bounds] = bounds.diff().tolist()
    return _known_lengths[bounds]


AttentionInterface.register(TOWER, tower_attention)
AttentionMaskInterface.register(TOWER, sdpa_mask)


def find_tower_configs(model: PreTrainedModel | PeftModel) -> list[PreTrainedConfig]:
    """The configurations that only the vision tower reads, if some layer of it can take lengths; else none."""
    tower = find_tower(model)
    if tower is None or not keeps_pictures_apart(tower):
        return []
    inside = set(tower.modules())
    read_outside = {id(getattr(module, "config", None)) for module in model.modules() if module not in inside}
    configs = {id(module.config): module.config for module in inside if hasattr(module, "config")}
    return [config for number, config in configs.items() if number not in read_outside]


def set_attention(configs: Iterable[PreTrainedConfig], name: str | None) -> None:
    """Run the modules that read these configurations with the attention called `name` from now on."""
    for config in configs:
        config._attn_implementation = name


def drop_row_lengths(model: PreTrainedModel | PeftModel) -> None:
    """Keep the lengths of the rows of a padding-free batch from the tower: most models hand on whatever they get.

    Layers that take the lengths of pictures as `cu_seq_lens_q` fail where they get another one (Kimi K2.5). And a tower
    that gets more than pictures is not cached, nor run a few pictures at a time (`only_images`).
    """

    def drop(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name not in BOUNDS}

    tower = find_tower(model)
    if tower is not None:
        tower.register_forward_pre_hook(drop, with_kwargs=True)


def find_tower_difference(
    model: PreTrainedModel | PeftModel, forward: Callable[..., Any], batch: dict[str, Any], *, half: bool
) -> str:
    """How the tower's output for a batch with pictures differs with our attention; "" where it does not.

    `forward`: the model as it is wrapped for training, see `find_packing`. `half`: it computes in 16 bits.
    The attention and the mode of the model stay as they were. Every process makes the same calls.
    """
    tower, configs = find_tower(model), find_tower_configs(model)
    assert tower is not None
    stock, was_training = [config._attn_implementation for config in configs], model.training
    model.eval()
    outputs: list[list[torch.Tensor]] = []
    hook = tower.register_forward_hook(lambda tower, args, output: outputs.append(_float_leaves(output)))
    try:
        run_quietly(forward, batch)
        set_attention(configs, TOWER)
        run_quietly(forward, batch)
    finally:
        hook.remove()
        for config, name in zip(configs, stock, strict=True):
            set_attention([config], name)
        model.train(was_training)
    expected, found = outputs
    apart = [distance(ours, theirs, half=half) for ours, theirs in zip(found, expected, strict=True)]
    limit = GPU_TOLERANCE if found[0].device.type != "cpu" else TOLERANCE
    wrong = [value for value in apart if not value <= (HALF_TOLERANCE if half else limit)]  # also where it is NaN
    return f"its output would differ by {wrong[0]:.1g} of its norm" if wrong else ""


def _float_leaves(output: Any) -> list[torch.Tensor]:
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    return [leaf.float() for leaf in leaves]
