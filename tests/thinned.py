"""What `make test` runs of tests with many cases, beside what is marked slow. `make test-slow` runs the others."""

import pytest

DISTINCT = ["granite_vision", "mllama"]  # features of several layers and tiles of a picture; cross-attention
CASES: dict[str, dict[str, list]] = {
    "distributed/test_chunked_loss.py::test_two_processes_in_chunks_train_what_one_does_at_once": {
        "two_processes": ["fsdp"]
    },
    "distributed/test_vision_towers.py::test_two_processes_with_a_frozen_tower_train_what_one_does": {
        "two_processes": ["ddp"]
    },
    "end_to_end/test_compiled_runs.py::test_compiled_runs_are_as_uncompiled_ones": {"padding_free": ["auto"]},
    "end_to_end/test_examined_runs.py::test_answering_changes_nothing_that_is_trained": {"layout": DISTINCT},
    "end_to_end/test_memory_options.py::test_as_few_layers_are_recomputed_as_fit": {"layout": ["granite_vision"]},
    "end_to_end/test_memory_options.py::test_lora_on_several_processes_keeps_whole_copies_where_they_fit": {
        "gigabytes": [1e-6]
    },
    "end_to_end/test_skip_and_stream.py::test_an_interrupted_stream_ends_where_an_uninterrupted_one_does": {
        "step": [3]
    },
    "parity/test_adapters.py::test_every_variant_trains_and_loads_with_peft_on_an_untouched_base": {
        "layout": [*DISTINCT, "llava15"]
    },
    "parity/test_half_precision.py::test_small_updates_are_learned_and_vanish_without_master_weights": {
        "optim": ["adamw_torch_fused"]
    },
    "parity/test_lora.py::test_frozen_parts_get_no_gradient_and_all_others_move": {"layout": DISTINCT},
    "parity/test_lora.py::test_parts_train_at_their_own_learning_rates": {"layout": DISTINCT},
    "parity/test_memory_estimate.py::test_the_estimate_is_what_training_takes": {
        "case": [
            *("full granite_vision", "full mllama", "lora granite_vision", "checkpointing mllama"),
            *("checkpointing lora autocast", "accumulation", "plain bfloat16", "autocast", "4bit"),
        ]
    },
    "parity/test_memory_estimate.py::test_some_layers_are_recomputed_and_the_estimate_knows_it": {"lora": [{}]},
    "parity/test_quantization.py::test_it_trains_as_lora_on_the_dequantised_model": {"layout": DISTINCT},
    "parity/test_save_and_resume.py::test_a_run_goes_on_with_the_rows_it_would_have_had": {
        "batches": ["grouped", "budget", "budget, padded"]
    },
    "parity/test_save_and_resume.py::test_an_interrupted_run_ends_where_an_uninterrupted_one_does": {
        "layout": ["granite_vision", "llava16_mistral"]
    },
    "parity/test_vision_tower.py::test_a_frozen_tower_has_no_graph_and_runs_once": {"layout": DISTINCT},
    "parity/test_vision_tower.py::test_features_from_disk_train_the_same_and_the_tower_runs_once_a_tile": {
        "layout": ["granite_vision", "llava15"]
    },
}
"""File and test → parameter → its values that `make test` runs."""


def mark_the_rest_slow(items: list[pytest.Item]) -> None:
    """Mark all other cases of the tests in `CASES` as slow."""
    for item in items:
        name = item.nodeid.removeprefix("tests/").partition("[")[0]
        params = item.callspec.params if name in CASES else {}
        if any(params[parameter] not in values for parameter, values in CASES.get(name, {}).items()):
            item.add_marker(pytest.mark.slow)
