"""The model card: the `README.md` of a saved model, written from the summary of its run."""

import json
import re
from pathlib import Path

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from tuning.files import CARD_FILE, write_text
from tuning.pages.render import render
from tuning.pages.run_summary import RunSummary

MARK = "<!-- Written by vlm-tuning. Each run into this folder replaces this file. To keep it, delete this line. -->"
OLD_MARK = "<!-- Written by vlm-tuning, and anew by every run into this folder as long as this line is here. -->"
PIPELINE = "image-text-to-text"
NOT_SCORES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_tokens")


def write_card(run: RunSummary) -> str:
    """The text of the card: metadata as the Hub reads it, then Markdown.

    Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    losses = [line["loss"] for line in run.log_history if "loss" in line]
    at_end = {"loss at the end of training": losses[-1]} if losses else {}
    return render(
        "model_card.md.j2",
        metadata=card_metadata(run).to_yaml(),
        mark=MARK,
        run=run,
        name=run.name,
        base_model=run.base_model if run.is_adapter else None,
        scores=at_end | find_scores(run),
        options_json=json.dumps(run.options, indent=2, default=str, ensure_ascii=False),
    )


def card_metadata(run: RunSummary) -> ModelCardData:
    """The head of the card. It leaves out the names of local models and data, which are not ids of the Hub."""
    licensed = ("license", "license_name", "license_link")
    scores = find_scores(run) if run.validation in run.on_hub else {}
    return ModelCardData(
        model_name=run.name,
        base_model=run.base_model if run.base_model in run.on_hub else None,
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag=PIPELINE,
        tags=["vlm-tuning", *(["lora"] if run.is_adapter else [])],
        datasets=[name for name in run.datasets if name in run.on_hub] or None,
        eval_results=[
            EvalResult(
                PIPELINE,
                dataset_type=str(run.validation),
                dataset_name=str(run.validation),
                metric_type=name.removeprefix("eval_"),
                metric_value=score,
            )
            for name, score in scores.items()
        ]
        or None,
        **{name: run.base_metadata[name] for name in licensed if run.base_metadata.get(name)},
    )


def find_scores(run: RunSummary) -> dict[str, float]:
    """The scores of the saved model: those of the last evaluation, or of the one at the best step."""
    lines = [line for line in run.log_history if any(name.startswith("eval_") for name in line)]
    at_best_step = [line for line in lines if line.get("step") == run.best_step]
    return {
        name: value
        for line in at_best_step or lines
        for name, value in line.items()
        if name.startswith("eval_") and name not in NOT_SCORES and isinstance(value, (int, float))
    }


def put_card(text: str, saved: Path, target: Path) -> None:
    """Write the card into the folder `saved`, whose files then move to `target`. A user's own card stays there."""
    if is_ours(target / CARD_FILE):
        write_text(saved / CARD_FILE, text)
    else:
        (saved / CARD_FILE).unlink(missing_ok=True)  # PEFT wrote one


def is_ours(card: Path) -> bool:
    """Whether the card may be overwritten: it does not exist, or has the line that marks ours."""
    if not card.exists():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK in text or OLD_MARK in text


def merge_card(card: str, name: str) -> str:
    """The card of the model called `name`, into which an adapter was merged, from the adapter's card."""
    head = ModelCard(card).data.to_dict() | {"library_name": "transformers"}
    before, _, rest = card.partition("\n## Use\n")
    opening = re.sub(r"^# .*", lambda _: f"# {name}", before.partition("\n---\n")[2], count=1, flags=re.MULTILINE)
    opening = opening.replace("LoRA adapter for", "LoRA adapter merged into")
    use = render("model_use.md.j2", name=name, base_model=None)
    after = rest.partition("\n## ")[2]
    return f"---\n{CardData(**head).to_yaml()}\n---\n{opening}\n{use}\n## {after}"
