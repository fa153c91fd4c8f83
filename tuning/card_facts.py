"""A run that has ended → the facts that its model card states."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_utils import has_length

from tuning.config.arguments import RunConfig
from tuning.config.validate import DATA_SUFFIXES, hide_paths, is_local_path
from tuning.files import CARD_FILE
from tuning.model.parts import count_parameters
from tuning.model_card import CardFacts
from tuning.run_facts import find_versions
from tuning.training.checkpoint import step_of
from tuning.training.trainer import SupervisedTrainer

OF_THIS_MACHINE = (
    *("output_dir", "save_model_dir", "resume_from_checkpoint", "overwrite_output_dir", "accelerate_launch_args"),
    *("cache_vision_features", "run_name"),
)


def gather_facts(trainer: SupervisedTrainer, config: RunConfig) -> CardFacts:
    """What is known of this run, for its card. Nothing in it leads to this machine or its user."""
    options, state, name = config.to_dict(), trainer.state, config.model.model_name_or_path
    given = config.data.training_data_path
    data: list[Any] = [entry["path"] for entry in given] if isinstance(given, list) else [given]
    validation = config.data.validation_data_path
    named = [name, *data, *filter(None, [validation])]
    rows = trainer.train_dataset
    return CardFacts(
        name=trainer.hub.repo_id if trainer.hub else Path(config.save_model_dir).absolute().name,
        options={key: hide_paths(value) for key, value in options.items() if key not in OF_THIS_MACHINE},
        base_model=hide_paths(name),
        datasets=[hide_paths(path) for path in data],
        validation=hide_paths(validation),
        on_hub=frozenset(filter(is_hub_id, named)),
        parts=count_parameters(trainer.model, trainer.parts),
        dtype=str(next(iter(trainer.dtypes.values()))).removeprefix("torch."),
        processes=trainer.args.world_size,
        rows=len(rows) if has_length(rows) else None,
        rows_left_out=len(trainer.rows.skipped),
        steps=state.global_step,
        epochs=state.epoch or 0.0,
        log_history=state.log_history,
        best_step=step_of(best) if (best := trainer.final_source(None)) else None,
        base_metadata=read_metadata(name),
        versions=find_versions(),
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` is a name on the Hub and not a place here."""
    if is_local_path(name) or name.endswith(DATA_SUFFIXES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_metadata(model: str) -> dict[str, Any]:
    """The head of a base model's card, where it is on this machine; nothing is fetched."""
    cached = try_to_load_from_cache(model, CARD_FILE) if is_hub_id(model) else None
    card = Path(cached if isinstance(cached, str) else Path(model).expanduser() / CARD_FILE)
    if not card.is_file():
        return {}
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):  # somebody else's card: what cannot be read is left out
        return {}
