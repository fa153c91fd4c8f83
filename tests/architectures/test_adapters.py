"""LoRA on every architecture: PEFT itself reads the saved adapter back, and merged it gives the adapter's logits."""

from pathlib import Path

import pytest
import torch
from architectures.case import Case
from architectures.names import each_architecture
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tuning.config.parse import resolve
from tuning.data.from_config import open_rows
from tuning.errors import UserError
from tuning.export.base_files import read_base_files
from tuning.export.merge import adapt_skeleton, plan_merge
from tuning.export.merged_model import write_weights
from tuning.model import load
from tuning.model.adapter_plan import plan_adapter
from tuning.model.answering import without_masked
from tuning.model.build import TrainableModel, build_model, plan_model
from tuning.model.lora import find_adapter, rename_saved
from tuning.model.lora_targets import resolve_targets
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.parts import find_parts
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.model.saved_weights import open_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def build(case: Case, resume_from: Path | None = None, **options) -> TrainableModel:
    """The model of a LoRA run on all linear layers, ready for training."""
    config = resolve(case.options(peft_method="lora", **{"target_modules": "all-linear", **options}))
    plan = plan_model(config, case.model_config, dummy_batch=lambda rows: {})
    return build_model(config, case.model_config, plan, resume_from)


def save_random(case: Case, built: TrainableModel, folder: Path) -> Path:
    """Save the adapter as a run does, after a training that moved every weight."""
    torch.manual_seed(1)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    built.model.peft_config["default"].base_model_name_or_path = str(case.folder)
    built.model.save_pretrained(folder)
    if built.stored_names:
        rename_saved(folder, built.stored_names)
    return folder


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return without_masked(model.eval()(**batch).logits.float())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@each_architecture
def test_an_adapter_is_read_back_by_peft_and_merges(name, root):
    case = Case.make(name, root)
    built = build(case)
    folder = save_random(case, built, case.folder / "adapter")
    sample = case.encoder.encode(next(iter(open_rows(case.config).train)))
    batch = {key: value for key, value in case.collator.join([sample]).items() if key != "labels"}

    def stock(source: Path):
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.float32, attn_implementation=load.name_attention(built.attention.loaded)
        )
        patch_mllama_cross_attention(model)
        patch_picture_dtype(model)
        return model

    plain = stock(case.folder)
    base = logits(plain, batch)
    adapted = logits(PeftModel.from_pretrained(plain, str(folder)), batch)
    weights = {key: value for key, value in built.model.named_parameters() if ".default." in key}
    assert weights
    for key, value in PeftModel.from_pretrained(stock(case.folder), str(folder)).named_parameters():
        if ".default." in key:
            torch.testing.assert_close(value, weights.pop(key).detach())
    assert not weights  # PEFT found every one

    adapter = find_adapter(str(folder))
    merge = plan_merge(open_weights(case.folder), adapt_skeleton(load.load_config(case.config.model), adapter), None)
    merged = case.folder / "merged"
    merged.mkdir()
    proof = write_weights(merge, merged)
    files = read_base_files(str(case.folder), case.encoder.processor)
    files.write(merged, for_adapter=False)
    files.write_config(merged, case.model_config, None)
    proof.read_back(merge, merged)
    assert not proof.faults
    assert difference(base, adapted) > 0.01  # the adapter does something
    assert difference(logits(stock(merged), batch), adapted) < 1e-4


def test_experts_are_adapted_by_all_linear_and_by_name_without_dropout(root, capsys):
    case = Case.make("qwen3_vl_moe", root / "named")
    built = build(case)
    text = capsys.readouterr().out
    assert "LoRA adapts 8 modules and 4 expert tensors." in text
    assert "lora_dropout 0.05 becomes 0: PEFT has no dropout for tensors of experts." in text
    adapted = {name.partition(".lora_")[0] for name, one in built.model.named_parameters() if one.requires_grad}
    assert {name.rpartition("layers.1.")[2] for name in adapted if "layers.1.mlp" in name} == {
        "mlp.experts",
        "mlp.experts.base_layer",
    }
    only_down = build(case, target_modules=["q_proj", "down_proj"]).model.peft_config["default"]
    assert only_down.target_parameters == [
        f"model.language_model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)
    ]
    assert build(case, target_modules=["q_proj"]).model.peft_config["default"].lora_dropout == 0.05


def test_names_that_peft_takes_for_experts_mean_the_modules_of_that_name(root):
    """PEFT 0.21 turns the dense `gate_proj` of GLM-4.5V into one of its experts' tensors, and loses the dense ones."""
    case = Case.make("glm4v_moe", root / "named")
    config = build(case, target_modules=["gate_proj", "up_proj", "q_proj"]).model.peft_config["default"]
    layers = "model.language_model.layers"
    assert config.target_parameters == [
        f"{layers}.{place}.{name}.weight"
        for place in ("0.mlp", "1.mlp.shared_experts")
        for name in ("gate_proj", "up_proj")
    ]
    assert {name.rpartition(".")[2] for name in config.target_modules} == {"q_proj"}


def test_modules_that_peft_cannot_read_back_are_refused_by_name_and_left_out_of_all_linear(root, capsys):
    case = Case.make("inkling2", root / "named")
    with pytest.raises(UserError, match=r"does not read back .* in 2 modules: .*k_proj\.sconv\.weight_proj"):
        build(case, target_modules=["weight_proj"])
    build(case)
    assert (
        "all-linear leaves out model.language_model.layers.1.self_attn.k_proj.sconv.weight_proj"
        in capsys.readouterr().out
    )


def test_modules_to_save_keep_their_names_where_others_are_stored_under_old_ones(root):
    case = Case.make("mistral_large4", root / "named")
    built = build(case, modules_to_save=["multi_modal_projector"])
    assert built.stored_names
    folder = save_random(case, built, case.folder / "adapter")
    plain = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32)
    weights = dict(built.model.named_parameters())
    resumed = build(case, resume_from=folder, modules_to_save=["multi_modal_projector"]).model
    for model in (PeftModel.from_pretrained(plain, str(folder)), resumed):
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, weights[name])


def test_dora_on_experts_is_refused(root):
    case = Case.make("aria", root / "named")
    with pytest.raises(UserError, match=r"use_dora: DoRA cannot adapt the tensors of experts .*experts\.gate_up_proj"):
        build(case, use_dora=True)


def test_an_adapter_of_a_version_that_left_experts_out_is_resumed_as_it_is(root):
    case = Case.make("gemma4+moe", root / "named")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    folder = save_random(case, build(case, target_modules=names), case.folder / "old")
    resumed = build(case, resume_from=folder, target_modules=[*names, "gate_up_proj"]).model
    assert not any("experts" in name for name, one in resumed.named_parameters() if one.requires_grad)
    saved = open_weights(folder)
    trained = {name.replace(".default", ""): one for name, one in resumed.named_parameters() if one.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)


def test_experts_that_the_checkpoint_stores_transposed_are_merged_as_they_are_stored(root):
    """As the published Qwen3-VL-MoE does."""
    case = Case.make("qwen3_vl_moe", root / "transposed")
    file = case.folder / "model.safetensors"
    weights = load_file(file)
    stored = {
        key: one.transpose(-1, -2).contiguous() for key, one in weights.items() if key.endswith("experts.down_proj")
    }
    assert stored
    assert all(one.shape[-2] != one.shape[-1] for one in stored.values())
    save_file(weights | stored, file, metadata={"format": "pt"})
    folder = save_random(case, build(case), case.folder / "adapter")
    adapted = adapt_skeleton(load.load_config(case.config.model), find_adapter(str(folder)))
    merge = plan_merge(open_weights(case.folder), adapted, None)
    made = {entry.key: merge.make(entry) for entry in merge.entries}
    assert {key: one.shape for key, one in made.items()} == {key: one.shape for key, one in (weights | stored).items()}
    assert not any(group.find_fault() for group in {entry.change for entry in merge.entries if entry.key in stored})
    assert all(not torch.equal(made[key], stored[key]) for key in stored)


def test_the_trial_leaves_the_random_numbers_of_the_run_alone(root):
    case = Case.make("qwen3_vl_moe", root / "random")
    torch.manual_seed(7)
    expected = torch.rand(3)
    config = resolve(case.options(peft_method="lora", target_modules="all-linear"))
    skeleton = load.build_skeleton(case.model_config)
    targets = resolve_targets(skeleton, find_parts(skeleton), config.lora, {"language_model"})
    torch.manual_seed(7)
    plan_adapter(lambda: load.build_skeleton(case.model_config), config.lora, targets)
    assert torch.equal(torch.rand(3), expected)
