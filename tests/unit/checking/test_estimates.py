import numpy as np
import pytest
from tiny_models import LAYOUTS, build_model, build_processor

from tuning.checking.estimates import Lengths, count_shards, padding_share
from tuning.checking.report import token_texts
from tuning.config.parse import build_config
from tuning.distributed.fsdp import find_wrap_classes


def lengths_of(tokens: list[int]) -> Lengths:
    numbers = np.arange(len(tokens))
    return Lengths(np.zeros_like(numbers), numbers, np.array(tokens), np.zeros_like(numbers), np.ones_like(numbers))


def test_padding_is_what_a_padded_batch_holds_beyond_its_tokens():
    tokens = np.array([3, 7, 5, 2, 9])
    order = np.array([4, 0, 2, 3, 1])  # batches (9, 3), (5, 2), (7)
    assert padding_share(tokens, 2, order) == pytest.approx(1 - 26 / (18 + 10 + 7))
    assert padding_share(tokens, 1, order) == 0
    assert padding_share(np.array([], dtype=int), 4, np.array([], dtype=int)) == 0


def test_grouping_by_length_wastes_less():
    shares = lengths_of([10, 100] * 32).padding_shares(8, seed=0, group=8)
    random, grouped = shares.values()
    assert grouped == 0 < random


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
def test_shown_rows_are_spread_over_the_data_with_the_longest_among_them(count):
    tokens = [5] * 40
    tokens[17] = 99
    chosen = lengths_of(tokens).spread(count)
    assert len(chosen) == len(set(chosen)) == min(count, 40)
    assert chosen == sorted(chosen)
    if count > 1:
        assert 17 in chosen
        assert 0 in chosen
    assert lengths_of([]).spread(count) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_classes_that_the_model_has_are_wrapped(layout):
    model = build_model(layout)
    present = {type(module).__name__ for module in model.modules()}
    classes = find_wrap_classes(model)
    assert set(classes) <= present
    assert type(model.get_decoder().layers[0]).__name__ in classes
    assert any("Encoder" in name for name in classes)  # the vision tower's


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_texts_of_tokens_make_up_the_text(layout):
    tokenizer = build_processor(layout).tokenizer
    ids = tokenizer("Hello  there, 42 is 🙂 é.\nNo.", add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_hybrid_fsdp_shards_a_copy_over_some_of_the_processes(monkeypatch):
    def count(**launch_args) -> int:
        required = {"model_name_or_path": "m", "training_data_path": "d", "output_dir": "o", "use_cpu": True}
        return count_shards(build_config({**required, "accelerate_launch_args": launch_args}))

    assert count() == 1
    assert count(num_processes=64) == 64
    assert count(num_processes=64, parallelism_config_dp_shard_size=8) == 8
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # what a launcher tells its processes
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "16")
    assert count(num_processes=64) == 16
