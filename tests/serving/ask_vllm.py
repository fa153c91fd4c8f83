"""Runs in the environment of vLLM: what it answers, for models and adapters that were saved.

`python ask_vllm.py JOBS.json`. A job: `model`, `adapters` (folders to ask with, null for none), `text`, `picture`,
`tower` (whether adapters reach the vision tower) and `tokens` (of an answer). Prints a JSON line for each adapter: the
ids of the prompt and of the answer, and the log-probabilities of the answer's tokens.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def run(job: dict) -> None:
    adapted = {"enable_lora": True, "enable_tower_connector_lora": job["tower"]} if any(job["adapters"]) else {}
    model = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=2,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        **adapted,
    )
    settings = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True)
    for number, folder in enumerate(job["adapters"], start=1):
        request = LoRARequest(f"adapter{number}", number, folder) if folder else None
        prompt = {"prompt": job["text"], "multi_modal_data": {"image": Image.open(job["picture"])}}
        (made,) = model.generate([prompt], settings, lora_request=request, use_tqdm=False)
        answer = made.outputs[0]
        scores = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
        line = {"prompt": list(made.prompt_token_ids), "answer": list(answer.token_ids), "scores": scores}
        print(json.dumps({"model": job["model"], "adapter": folder, **line}), flush=True)
    del model
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        run(asked)
