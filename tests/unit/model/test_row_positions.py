"""Positions in several dimensions, computed without the model's weights, are those of its own forward."""

import pickle
from functools import cache

import torch
from architectures.case import Case

from tuning.model.decoder_calls import run_all
from tuning.training.data_loading import find_positions


@cache
def case_of(name: str, root) -> Case:
    return Case.make(name, root)


def test_each_row_has_the_positions_of_the_stock_forward(tmp_path_factory):
    for name, axes in (("qwen2_5_vl", 4), ("qwen3_5", 4), ("hunyuan_vl", 4)):
        case = case_of(name, tmp_path_factory.mktemp(name))
        model = case.model()
        positions = find_positions(model, case.samples)
        calls = run_all(model, model, [case.collator.join([sample]) for sample in case.samples])
        for sample, call in zip(case.samples, calls, strict=True):
            found = positions(sample.sequence, sample.images)
            count = torch.arange(len(sample.sequence["input_ids"]))
            expected = count.expand(axes, -1) if call.positions is None else call.positions[:, 0]
            assert torch.equal(found[-len(expected) :], expected)
            assert torch.equal(found[0], count)


def test_data_workers_can_have_them(tmp_path_factory):
    case = case_of("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))
    positions = find_positions(case.model(), case.samples)
    sent = pickle.dumps(positions)
    assert len(sent) < 20_000  # no weights
    sample = case.samples[0]
    again = pickle.loads(sent)(sample.sequence, sample.images)
    assert torch.equal(again, positions(sample.sequence, sample.images))


def test_other_models_have_none(tmp_path_factory):
    case = case_of("llava", tmp_path_factory.mktemp("llava"))
    assert find_positions(case.model(), case.samples) is None
