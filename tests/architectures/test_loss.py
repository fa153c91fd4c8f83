"""The loss of every architecture in float64: the stock forward's on the same supervised tokens, alone or in a batch."""

import pytest
import torch
import torch.nn.functional as F
from architectures.case import Case
from architectures.names import ALONE, each_architecture
from transformers import AutoModelForImageTextToText

from tuning.data.encode import IGNORED
from tuning.model.known_inputs import send
from tuning.model.loss import patch_supervised_loss
from tuning.model.mllama import patch_mllama_cross_attention

# The stock forward leaves the factor out, and Cohere's text model was trained and is served with it.
STOCK_LEAVES_OUT = {name: lambda config: config.text_config.logit_scale for name in ("aya_vision", "cohere2_vision")}


def load_in_double(case):
    """In float64, experts run one by one: grouped products do not take it."""
    model = AutoModelForImageTextToText.from_pretrained(
        case.folder, dtype=torch.float64, experts_implementation="eager"
    )
    return model.eval()


def as_double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def as_known(batch):
    """As on a GPU, where the host keeps the numbers of small inputs."""
    return {name: send(value, torch.device("cpu")) for name, value in batch.items()}


@each_architecture
@torch.no_grad()
def test_the_loss_is_that_of_the_stock_forward(name, tmp_path):
    case = Case.make(name, tmp_path)
    batches = [as_double(case.collator.join([sample])) for sample in case.samples]
    model = load_in_double(case)
    factor = STOCK_LEAVES_OUT.get(name, lambda config: 1.0)(model.config)
    expected = []
    for batch in batches:
        labels = batch["labels"]
        assert (labels != IGNORED).any()
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.double() * factor
        expected.append(F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED).item())
    patch_mllama_cross_attention(model)
    patch_supervised_loss(model)
    assert [model(**batch).loss.item() for batch in batches] == pytest.approx(expected, rel=1e-5)
    assert [model(**as_known(batch)).loss.item() for batch in batches] == pytest.approx(expected, rel=1e-5)
    if name not in ALONE:
        numbers = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        mean = sum(loss * number for loss, number in zip(expected, numbers, strict=True)) / sum(numbers)
        together = as_double(case.collator.join(case.samples))
        assert model(**together).loss.item() == pytest.approx(mean, rel=1e-5)
        assert model(**as_known(together)).loss.item() == pytest.approx(mean, rel=1e-5)
