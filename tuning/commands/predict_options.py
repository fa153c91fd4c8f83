"""The options of `vlm-tuning predict`, and which models they name."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from tuning.config.options import ModelSource, RowArguments, ServerArguments, option
from tuning.errors import UserError
from tuning.serving.server import connect, is_url

MODEL_HERE = "A model that answers here: a local folder or a hub id."
OF_SERVERS = ("request_options", "request_timeout", "requests_at_once")
OF_MODELS_HERE = (  # a server has its own
    *(entry.name for entry in fields(ModelSource) if entry.name not in ("model_name_or_path", "chat_template_kwargs")),
    *("max_seq_length", "batch_size", "accelerate_launch_args", "device_map"),
)


@dataclass(frozen=True)
class PredictArguments(RowArguments, ServerArguments, ModelSource):
    model_name_or_path: str = option("", MODEL_HERE)
    data_path: str = option("", "Rows to answer: any file that training reads, a folder, or a hub id.", required=True)
    output: str = option("predictions.jsonl", "File for the answers, one JSON object per line.")
    metrics: list[str] | str | None = option(None, "Scores to compute, such as exact_match, anls or relaxed_accuracy.")
    references_field: str | None = option(None, "Column with the right answers, if a row has several.")
    compare: str | None = option(None, "A second model to compare with, such as the base, or the URL of a server.")
    compare_model: str | None = option(None, "Name of the model on the server that compare names.")
    requests_at_once: int = option(16, "Requests that a server gets at the same time.", minimum=1)
    max_new_tokens: int = option(256, "Longest answer in tokens.", minimum=1)
    batch_size: int = option(8, "Rows that each process answers at once.", minimum=1)
    max_rows: int | None = option(None, "Answer at most N rows (default: all).", minimum=1)
    overwrite: bool = option(False, "Answer all rows again, although an earlier run has answered them.")
    accelerate_launch_args: dict[str, Any] = option({}, "Options of `accelerate launch`, such as num_processes.")
    device_map: str | None = option(
        None,
        "Share the layers of a model that is larger than one GPU out over all GPUs, in one process.",
        choices=("auto", "balanced", "sequential"),
    )

    @property
    def metric_names(self) -> list[str]:
        return [self.metrics] if isinstance(self.metrics, str) else list(self.metrics or [])

    @property
    def name(self) -> str:
        """The model's name in the output: a path, a hub id, or the address of a server's model."""
        return f"{self.server_url}/models/{self.model}" if self.server_url else self.model_name_or_path

    def models(self) -> dict[str, "PredictArguments"]:
        """The field of a model's answers → options that name this model only, as `model_name_or_path` or on a server.

        The second one is what `compare` names.
        """
        found = {"prediction": self}
        if is_url(self.compare):
            found["compared"] = replace(self, model_name_or_path="", server_url=self.compare, model=self.compare_model)
        elif self.compare:
            found["compared"] = replace(self, model_name_or_path=self.compare, server_url=None, model=None)
        return found


def check_models_named(options: PredictArguments) -> None:
    """Raise `UserError` unless the options name one model to ask, and for an option without effect on the models."""
    if not options.model_name_or_path and not options.server_url:
        raise UserError(where="config", problem="model_name_or_path: is required, or server_url")
    if options.model_name_or_path and options.server_url:
        raise UserError(
            where="config",
            problem="model_name_or_path and server_url name two models.",
            fix="Give one of them, and the other one as compare.",
        )
    if options.server_url and not is_url(options.server_url):
        raise UserError(
            where=f"server_url {options.server_url}",
            problem="is not an address.",
            fix="Give one such as http://localhost:8000/v1.",
        )
    served = [bool(model.server_url) for model in options.models().values()]
    if options.model and not options.server_url:
        raise _without_effect(["model"], "it is the name of a model on the server that server_url names.")
    if options.compare_model and not is_url(options.compare):
        raise _without_effect(["compare_model"], "it is the name of a model on the server that compare names.")
    if not any(served) and (unused := changed(options, OF_SERVERS)):
        raise _without_effect(unused, "no server is asked.")
    if all(served) and (unused := changed(options, OF_MODELS_HERE)):
        raise _without_effect(unused, "a server answers, and has its own settings.")


def changed(options: PredictArguments, names: Iterable[str]) -> list[str]:
    """Those of the options that differ from their defaults."""
    defaults = PredictArguments()
    return [name for name in names if getattr(options, name) != getattr(defaults, name)]


def _without_effect(names: list[str], reason: str) -> UserError:
    return UserError(where=", ".join(names), problem=f"has no effect: {reason}", fix="Leave it out.")


def name_served_models(options: PredictArguments) -> PredictArguments:
    """The options with the names of all models on servers, which are asked for the missing ones."""
    if options.server_url and not options.model:
        options = replace(options, model=connect(options).model)
    compared = options.models().get("compared")
    if compared and compared.server_url and not options.compare_model:
        server = connect(compared, url_option="compare", model_option="compare_model")
        options = replace(options, compare_model=server.model)
    return options
