"""What people call each architecture, what vLLM does with it, and which tests of it `make test` runs."""

from collections.abc import Callable

import pytest
from architectures.registry import ARCHS
from transformers import masking_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# vLLM 0.32.0, read from its source: the class that its registry names for the architecture, and whether that class or
# one of its bases is `SupportsLoRA` (vllm/model_executor/models). "merged": vLLM serves the model, not its adapters.
ADAPTERS, MERGED, NOT_SERVED = "adapters", "merged models only", "no"

TITLES = {
    "apertus1p5": ("Apertus 1.5", NOT_SERVED),
    "aria": ("Aria", MERGED),
    "aya_vision": ("Aya Vision", "until 0.24"),
    "chameleon": ("Chameleon", "until 0.28"),
    "cohere2_vision": ("Command A Vision", MERGED),
    "cohere_compass": ("Cohere Compass", ADAPTERS),
    "cosmos3_edge": ("Cosmos 3 Edge", MERGED),
    "deepseek_ocr2": ("DeepSeek-OCR 2", NOT_SERVED),
    "deepseek_vl": ("DeepSeek-VL", NOT_SERVED),
    "deepseek_vl_hybrid": ("DeepSeek-VL, two towers", NOT_SERVED),
    "dots3_note": ("dots 3 Note", NOT_SERVED),
    "emu3": ("Emu3", ADAPTERS),
    "ernie4_5_vl_moe": ("ERNIE 4.5 VL", ADAPTERS),
    "exaone4_5": ("EXAONE 4.5", ADAPTERS),
    "fast_vlm": ("FastVLM", NOT_SERVED),
    "fuyu": ("Fuyu", "until 0.25"),
    "gemma3": ("Gemma 3", ADAPTERS),
    "gemma3n": ("Gemma 3n", MERGED),
    "gemma4": ("Gemma 4", ADAPTERS),
    "gemma4+e2b": ("Gemma 4 E2B, E4B", ADAPTERS),
    "gemma4+moe": ("Gemma 4 26B-A4B", ADAPTERS),
    "gemma4+vision": ("Gemma 4 31B", ADAPTERS),
    "gemma4_unified": ("Gemma 4 Unified", ADAPTERS),
    "glm46v": ("GLM-4.6V", NOT_SERVED),
    "glm4v": ("GLM-4.1V", ADAPTERS),
    "glm4v_moe": ("GLM-4.5V", ADAPTERS),
    "glm5_next": ("GLM-5 Next", ADAPTERS),
    "glm_ocr": ("GLM-OCR", ADAPTERS),
    "glmga": ("GLM-GA", NOT_SERVED),
    "got_ocr2": ("GOT-OCR 2", NOT_SERVED),
    "granite4_vision": ("Granite Vision 4", "adapters of the language model"),
    "granite_docling": ("Granite Docling", NOT_SERVED),
    "hunyuan_vl": ("HunyuanVL", ADAPTERS),
    "hy_v4_vl": ("Hunyuan V4 VL", NOT_SERVED),
    "hyperclovax_vision_v2": ("HyperCLOVA X Vision 2", NOT_SERVED),
    "idefics": ("Idefics", NOT_SERVED),
    "idefics2": ("Idefics 2", NOT_SERVED),
    "idefics3": ("Idefics 3", ADAPTERS),
    "inkling2": ("Inkling 2", NOT_SERVED),
    "inkling2_loop": ("Inkling 2 Loop", NOT_SERVED),
    "inkling_mm_model": ("Inkling", ADAPTERS),
    "internvl": ("InternVL 3, 3.5", ADAPTERS),
    "janus": ("Janus", NOT_SERVED),
    "kimi_k25": ("Kimi K2.5", NOT_SERVED),
    "lfm2_vl": ("LFM2-VL", ADAPTERS),
    "lfm3_vl": ("LFM3-VL", NOT_SERVED),
    "lighton_ocr": ("LightOnOCR", NOT_SERVED),
    "llama4": ("Llama 4", ADAPTERS),
    "llava": ("LLaVA-1.5", ADAPTERS),
    "llava+pixtral": ("Pixtral", ADAPTERS),
    "llava_next": ("LLaVA-NeXT / 1.6, Granite Vision 3", ADAPTERS),
    "llava_next_video": ("LLaVA-NeXT-Video", ADAPTERS),
    "llava_onevision": ("LLaVA-OneVision", MERGED),
    "minicpm_ocr": ("MiniCPM-OCR", NOT_SERVED),
    "minicpmv4_6": ("MiniCPM-V 4.6", ADAPTERS),
    "minicpmv4_7": ("MiniCPM-V 4.7", ADAPTERS),
    "minimax_m3_vl": ("MiniMax M3 VL", MERGED),
    "mistral3": ("Mistral Small 3", "adapters of the language model"),
    "mistral_large4": ("Mistral Large 4", NOT_SERVED),
    "mllama": ("Llama 3.2 Vision", "until 0.10.2"),
    "molmo2": ("Molmo 2", ADAPTERS),
    "muse_glimmer": ("Muse Glimmer", ADAPTERS),
    "muse_spark": ("Muse Spark", NOT_SERVED),
    "nemotron_h_omni": ("Nemotron H Omni", ADAPTERS),
    "ovis2": ("Ovis 2", NOT_SERVED),
    "paddleocr_vl": ("PaddleOCR-VL", MERGED),
    "paligemma": ("PaliGemma, PaliGemma 2", ADAPTERS),
    "perception_lm": ("PerceptionLM", NOT_SERVED),
    "pp_chart2table": ("PP-Chart2Table", NOT_SERVED),
    "qianfan_ocr": ("Qianfan-OCR", ADAPTERS),
    "qwen2_5_omni_thinker": ("Qwen2.5-Omni Thinker", NOT_SERVED),
    "qwen2_5_vl": ("Qwen2.5-VL", ADAPTERS),
    "qwen2_vl": ("Qwen2-VL", ADAPTERS),
    "qwen3_5": ("Qwen3.5", ADAPTERS),
    "qwen3_5_moe": ("Qwen3.5, experts", ADAPTERS),
    "qwen3_omni_moe_thinker": ("Qwen3-Omni Thinker", NOT_SERVED),
    "qwen3_vl": ("Qwen3-VL", ADAPTERS),
    "qwen3_vl_moe": ("Qwen3-VL, experts", ADAPTERS),
    "qwen4_exp": ("Qwen4 Exp", ADAPTERS),
    "smolvlm": ("SmolVLM, SmolVLM2", ADAPTERS),
    "step3p7": ("Step 3.7", MERGED),
    "unlimited_ocr": ("Unlimited-OCR", NOT_SERVED),
    "video_llama_3": ("VideoLLaMA 3", NOT_SERVED),
    "video_llava": ("Video-LLaVA", NOT_SERVED),
    "vipllava": ("ViP-LLaVA", NOT_SERVED),
}
"""Architecture → what people call it, and what vLLM serves."""

QUICK = (
    *("qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "gemma3", "gemma4", "internvl", "smolvlm"),
    *("granite4_vision", "mllama", "llava_onevision", "llava+pixtral", "paligemma", "glm4v", "idefics2", "molmo2"),
    *("llama4", "fast_vlm"),
)
"""What `make test` runs: what people tune most, and one of each kind of difficulty. `make test-slow` runs the rest."""


REFUSED = {
    "fuyu": "the processor reads '|SPEAKER|'",  # with this tokenizer, the stock processor fails on any image
    "idefics": "IdeficsProcessor makes of a row",  # it puts its images before or after the whole text
}
"""What cannot be trained, and a part of the error that says so."""
ALONE = ("emu3", "hunyuan_vl")
"""What is trained row by row. Emu3's tower sees the padding around smaller pictures. In HunyuanVL's positions,
transformers counts the pictures of a whole batch."""


OLDER_PADDED = () if hasattr(masking_utils, "remap_positions_for_packed_sequence") else ("llama4",)
"""What has padded batches with an older transformers only: there the chunks of packed rows count from the first row."""
PADDED = ("emu3", "mllama", *OLDER_PADDED)
"""What has padded batches: Mllama's tokens see pictures through a mask of tokens by pictures of their row."""


EITHER_WAY = ("ernie4_5_vl_moe",)
"""Whose layers run row by row or not, as rounding has it: what one row sends to experts may change another by a bit."""


def is_known(name: str) -> bool:
    """Whether the installed transformers has the architecture."""
    return name.partition("+")[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def each_architecture(test: Callable) -> Callable:
    """Run `test(name)` for every architecture that the installed transformers has and that can be trained."""
    names = [name for name in sorted(ARCHS) if is_known(name) and name not in REFUSED]
    params = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", params)(test)
