"""LoRA on every architecture: PEFT itself reads the saved adapter back, and merged it gives the adapter's logits."""

from pathlib import Path

import pytest
import torch
from architectures.case import Case
from architectures.registry import ARCHS
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tuning.config.parse import resolve
from tuning.export.merge import adapt_skeleton, plan_merge
from tuning.export.merged_model import copy_files, write_weights
from tuning.model import load
from tuning.model.build import TrainableModel, build_model, plan_model
from tuning.model.lora import find_adapter, rename_saved
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.saved_weights import open_weights

NOT_YET = {
    "video_llava": "its pictures come under a name that collating does not know",
    "idefics": "its processor gives no place of each token in the text",
    "granite_docling": "its pictures have several sizes",
    "minicpmv4_6": "its pictures are joined along another dimension",
    "minicpmv4_7": "its pictures are joined along another dimension",
    "minicpm_ocr": "its pictures are joined along another dimension",
    "cosmos3_edge": "its token types are not collated",
    "nemotron_h_omni": "its answers are not found",
    "llama4": "its head is inside an inner causal model",
    "perception_lm": "its processor refuses rows with pictures of several sizes",
    "pp_chart2table": "its processor writes one image token for each picture",
}
"""Architectures that this version cannot train yet, or whose rows it cannot make, for a reason that is not LoRA's."""


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
        return model.eval()(**batch).logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skipif(name in NOT_YET, reason=NOT_YET.get(name, ""))) for name in ARCHS],
)
def test_an_adapter_is_read_back_by_peft_and_merges(name, root):
    case = Case.make(name, root)
    built = build(case)
    folder = save_random(case, built, case.folder / "adapter")
    batch = {key: value for key, value in case.collator.join(case.samples[:1]).items() if key != "labels"}

    def stock(source: Path):
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.float32, attn_implementation=built.attention.loaded
        )
        patch_mllama_cross_attention(model)
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
    copy_files(merge, merged, case.model_config, None, exclude=())
    proof.read_back(merge, merged)
    assert not proof.faults
    assert difference(base, adapted) > 0.01  # the adapter does something
    assert difference(logits(stock(merged), batch), adapted) < 1e-4
