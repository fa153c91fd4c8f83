"""Whether PEFT reads back the adapter that it saves: it rewrites names and settings of some models' adapters."""

import warnings
from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel

from tuning.errors import UserError, describe_failure, try_optional
from tuning.model.lora import ADAPTER_NAME


def check_readable(adapted: PeftModel, skeleton: PreTrainedModel) -> None:
    """Raises `UserError` if PEFT, as a user calls it, would not find the place of every tensor of a saved adapter.

    `adapted`: the skeleton that is trained with its adapter. `skeleton`: another one, to load the adapter on. Nothing is
    written: a tensor is one number, a different one for each, spread over its shape without taking memory.
    """
    saved = {
        key: torch.tensor(float(number)).expand(tensor.shape)
        for number, (key, tensor) in enumerate(get_peft_model_state_dict(adapted).items(), start=1)
    }
    attempt = try_optional(lambda: _read_back(saved, adapted.peft_config[ADAPTER_NAME], skeleton))
    found = attempt.value or {}
    lost = [key for key, tensor in saved.items() if not _is_same(found.get(key), tensor)]
    if lost or attempt.error or len(found) > len(saved):
        names = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in lost})
        reason = f" ({describe_failure(attempt.error)})" if attempt.error else ""
        raise UserError(
            where="target_modules",
            problem=(
                f"PEFT cannot read the adapter of this {type(adapted.get_base_model()).__name__} back{reason}. It loses"
                f" {len(lost)} of {len(saved)} tensors, those of {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
            ),
            fix="Leave these modules out of target_modules.",
        )


def _read_back(
    saved: dict[str, torch.Tensor], config: PeftConfig, skeleton: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """What arrives in a model that PEFT gives the adapter with this `config`, under the names of a saved adapter."""
    arrived: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is copied into weights on the meta device
        stored = PeftConfig.from_peft_type(**{**config.to_dict(), "inference_mode": True})
        other = PeftModel(skeleton, stored)
        other.register_load_state_dict_pre_hook(lambda _, state, *rest: arrived.update(state))
        set_peft_model_state_dict(other, saved)
        return get_peft_model_state_dict(other, state_dict=arrived)


def _is_same(found: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    """Whether a tensor kept its shape and its one number."""
    return found is not None and found.shape == tensor.shape and bool((found == tensor.flatten()[0]).all())
