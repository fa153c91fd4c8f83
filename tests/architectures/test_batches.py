"""Every architecture: a row in a batch gives what it gives alone, or the trial before training says that it differs."""

import json

import pytest
import torch
from architectures.case import Case
from architectures.checkpoints import ARCHS

from tuning import train
from tuning.cli import main
from tuning.data.collator import Collator
from tuning.data.encode import IGNORED, Sample
from tuning.errors import UserError, try_optional
from tuning.training.batch_check import find_batch_fault

NOT_ENCODED = {"idefics": "its processor gives no place of a token in the text"}
DIFFER = {
    "emu3": "the results of row",  # its tower sees the padding around a smaller picture
    "hunyuan_vl": "other position ids",  # it numbers the pictures of all rows, not of each
}


def run(model, collator: Collator, samples: list[Sample]) -> tuple[float, int]:
    """The summed loss of a batch, and its supervised tokens."""
    batch = collator.join(samples)
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=1).loss.item()
    return loss, int((batch["labels"][:, 1:] != IGNORED).sum())


def in_float64(model, collator: Collator, samples: list[Sample]) -> bool:
    """Make `model` compute in float64. Some have parts that stay in float32, and cannot."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the fast one takes no float64
    if try_optional(lambda: run(model.double(), collator, samples[:1])).error:
        model.float()
    return model.dtype == torch.float64


@pytest.mark.parametrize("name", ARCHS)
def test_rows_have_the_loss_in_a_batch_that_they_have_alone(name, tmp_path):
    if name in NOT_ENCODED:
        pytest.skip(NOT_ENCODED[name])
    case = Case.make(name, tmp_path)
    try:
        model, samples, collator = case.model().eval(), case.samples, case.collator
    except UserError as refused:
        pytest.skip(str(refused))
    exact = in_float64(model, collator, samples)
    fault = find_batch_fault(model, model, case.encoder, collator, half=False)
    if name in DIFFER:
        assert DIFFER[name] in fault
        return
    assert fault == ""
    alone = [run(model, collator, [sample]) for sample in samples]
    loss, tokens = run(model, collator, samples)
    assert tokens == sum(number for _, number in alone)
    assert loss == pytest.approx(sum(part for part, _ in alone), rel=1e-5 if exact else 1e-4)


def test_a_model_that_takes_rows_one_by_one_is_refused_with_more_and_answers_so(tmp_path, capsys):
    case = Case.make("hunyuan_vl", tmp_path)
    several = (
        r"per_device_train_batch_size: HunYuanVL.* other results than alone \(row . of the trial gets other position"
    )
    with pytest.raises(UserError, match=several) as caught:
        train(case.options())
    assert "Set per_device_train_batch_size to 1." in str(caught.value)
    assert "pixel_values, image_grid_thw" in str(caught.value)
    done = train(case.options(per_device_train_batch_size=1, report_samples=2))
    assert done.global_step == 2
    options = {"model_name_or_path": done.model_dir, "data_path": case.folder / "rows.jsonl", "max_new_tokens": 4}
    answers = {}
    for size in (1, 4):
        output = tmp_path / f"answers-{size}.jsonl"
        flags = [f"--{name}={value}" for name, value in (options | {"output": output, "batch_size": size}).items()]
        assert main(["predict", *flags]) == 0
        answers[size] = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert "The rows are answered one by one" in capsys.readouterr().out
    assert answers[1] == answers[4]
