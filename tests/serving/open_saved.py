"""Runs under transformers 4 and the PEFT of its time: opens saved models as their users do.

`python open_saved.py JOBS.json`. A job: `folder`, `base` (of an adapter, else null), `text` and `picture` of a row,
`inputs` (a safetensors file with the row as training reads it) and `out` (where the logits go). Prints a JSON line for
each: the class of the tokenizer, the ids of the row, `rope_theta`, and what loading reports.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def open_model(folder: str, base: str | None) -> tuple:
    """A model, or an adapter on its base, and what loading reports, without what is empty."""
    model, info = AutoModelForImageTextToText.from_pretrained(base or folder, output_loading_info=True)
    report = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if base:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, folder)
        if said := [str(one.message) for one in caught if "missing" in str(one.message)]:
            report["missing"] = said
    return model.eval(), report


def run(job: dict) -> dict:
    folder = job["folder"]
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model, report = open_model(folder, job["base"])
    text = model.config.get_text_config()
    with torch.no_grad():
        logits = model(**load_file(job["inputs"])).logits
    save_file({"logits": logits.float().contiguous()}, job["out"])
    made = processor(text=job["text"], images=[Image.open(job["picture"])], return_tensors="pt")
    return {
        "folder": folder,
        "report": report,
        "tokenizer": type(tokenizer).__name__,
        "template": processor.chat_template or tokenizer.chat_template,
        "ids": made["input_ids"][0].tolist(),
        "rope_theta": getattr(text, "rope_theta", None),
    }


if __name__ == "__main__":
    for asked in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(asked)), flush=True)
