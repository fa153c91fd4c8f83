"""For every architecture: what is supervised is each answer with its end, and `check` counts what is encoded.

A model whose processor does not fit is refused with its name, and never trained on other tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from architectures.case import Case
from architectures.names import REFUSED, each_architecture
from transformers import AutoModelForImageTextToText

from tuning.data.encode import IGNORED
from tuning.data.from_config import open_rows
from tuning.data.prompts import ask
from tuning.data.row_lengths import RowMeter
from tuning.errors import UserError


@pytest.mark.parametrize("name", REFUSED)
def test_a_processor_that_does_not_fit_is_refused(name, tmp_path):
    case = Case.make(name, tmp_path, weights=False)
    with pytest.raises(UserError) as refused:
        case.encoder  # noqa: B018
    assert REFUSED[name] in str(refused.value)


@each_architecture
def test_answers_and_their_ends_are_supervised_and_counted(name, tmp_path):
    case = Case.make(name, tmp_path, weights=False)
    rows = list(open_rows(case.config).train)
    for row, written, measured in zip(rows, case.rows, RowMeter(case.encoder).measure(rows), strict=True):
        sample = case.encoder.encode(row)
        supervised = [text.strip() for text in case.supervised_texts(sample)]
        assert supervised == [text.strip() for text in case.expected_answers(written)]
        labels = sample.sequence["labels"]
        assert measured.error is None
        assert measured.tokens == len(labels)
        assert measured.supervised_tokens == (labels != IGNORED).sum()


@each_architecture
def test_the_model_reads_before_an_answer_what_it_is_asked_with(name, tmp_path):
    case = Case.make(name, tmp_path, weights=False)
    for row in open_rows(case.config).train:
        prompt = ask(row, case.encoder).sample.sequence
        trained = case.encoder.encode(row).sequence
        length = len(prompt["input_ids"])
        start = trained["labels"].tolist()[length - 3 :]  # of the last answer; a blank before it may be trained, too
        assert any(label != IGNORED for label in start[:5])
        same = length - 1  # the last token may be another one where an answer follows
        assert all(torch.equal(prompt[name][:same], trained[name][:same]) for name in prompt if name != "labels")


def test_a_prefix_model_has_the_stock_loss_of_prefix_and_suffix(tmp_path):
    case = Case.make("paligemma", tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float64).eval()
    for row, written, sample in zip(open_rows(case.config).train, case.rows, case.samples, strict=True):
        prepared = case.encoder.prepare(row)
        images = case.encoder.open_images(prepared)
        *_, question = written["messages"][0]["content"]
        prefix, suffix = "<image>" * len(images) + question["text"], written["messages"][1]["content"]
        stock = case.processor(text=[prefix], images=[images], suffix=[suffix], return_tensors="pt")
        batch = case.collator.join([sample])
        assert all(torch.equal(stock[name], batch[name]) for name in ("input_ids", "token_type_ids", "labels"))
        assert loss_of(model, batch) == pytest.approx(loss_of(model, stock), rel=1e-9)


def loss_of(model, batch) -> float:
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED).item()
