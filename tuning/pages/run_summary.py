"""What a run is, as pure data: its model card, `run_facts.json` and through it the run's page are made of it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tuning.files import hide_paths
from tuning.model.parts import PartSize


@dataclass(frozen=True)
class RunSummary:
    """What a run trains, on which data, with what; and, once it has ended, with which result.

    `name`: the trained model's. `model`, `training_data` and `validation_data`: names on the Hub or paths, as in the
    config. `on_hub`: those of them that are on the Hub. `options`: without secrets and paths of this machine. `dtypes`:
    of the weights, in the model's order. `adapter`: the LoRA options, or None. `rows`: None where rows are streamed.
    `added_start`: the first token of each prompt, where the chat template does not write it. `added_end`: the last one
    of each answer, where the base's template does not write it and the saved one does.
    `base_metadata`: the head of the base model's own card. `log_history`: the trainer's. `best_step`: the step of the
    saved model, where that is not the last one.
    """

    name: str
    model: str
    training_data: list[str]
    validation_data: str | None
    on_hub: frozenset[str]
    options: dict[str, Any]
    begun: str
    architecture: str
    parts: list[PartSize]
    dtypes: list[str]
    attention: str
    adapter: dict[str, Any] | None
    rows: int | None
    validation_rows: int | None
    row_format: str
    row_limit: str
    typical_image: str
    rows_per_step: int | str
    device: str
    processes: int
    precision: str | None
    versions: dict[str, str]
    added_start: str = ""
    added_end: str = ""
    base_metadata: dict[str, Any] = field(default_factory=dict)
    rows_left_out: int = 0
    steps: int = 0
    epochs: float = 0.0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None

    @property
    def is_adapter(self) -> bool:
        return bool(self.options["peft_method"])

    @property
    def base_model(self) -> str:
        """The base model as others may see it: of a local path only the last name."""
        return hide_paths(self.model)

    @property
    def datasets(self) -> list[str]:
        """The training data as others may see them."""
        return hide_paths(self.training_data)

    @property
    def validation(self) -> str | None:
        """The validation data as others may see them."""
        return hide_paths(self.validation_data)

    @property
    def dtype(self) -> str:
        """The precision of most weights."""
        return self.dtypes[0]

    def to_run_info(self) -> dict[str, Any]:
        """The content of `run_facts.json`: what is known before the first step."""
        training_data = ", ".join(self.training_data)
        return {
            "model": self.model,
            "training_data": training_data,
            "begun": self.begun,
            "architecture": self.architecture,
            "parts": [asdict(size) for size in self.parts],
            "dtype": ", ".join(sorted(self.dtypes)),
            "attention": self.attention,
            "adapter": self.adapter,
            "data": {
                "training_data": training_data,
                "training_rows": "streamed" if self.rows is None else self.rows,
                "validation_data": self.validation_data,
                "validation_rows": self.validation_rows,
                "form": self.row_format,
                "row_limit": self.row_limit,
                "typical_image": self.typical_image,
                "rows_per_step": self.rows_per_step,
            },
            "machine": {
                "device": self.device,
                "processes": self.processes,
                "precision": self.precision,
                "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            },
        }
