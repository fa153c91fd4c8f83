"""Runs under transformers 4: llama.cpp's converter, on a tiny model.

`python convert_tiny.py LLAMA_CPP MODEL OUTFILE [--mmproj]`. The converter knows published tokenizers by what they make
of one text, and Gemma's by its tokenizer.model. Tiny ones are told to it. All else is its own.
"""

import runpy
import sys

llama_cpp, *words = sys.argv[1:]
sys.path.insert(0, llama_cpp)  # its package `conversion`, and its gguf, which it finds itself
sys.path.insert(1, f"{llama_cpp}/gguf-py")

from conversion.base import TextModel  # noqa: E402
from conversion.gemma import Gemma3Model  # noqa: E402


def set_gemma_vocab(self) -> None:
    """As with a tokenizer.model, from tokenizer.json."""
    self._set_vocab_llama_hf()
    self.gguf_writer.add_add_space_prefix(False)


TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
Gemma3Model.set_vocab = set_gemma_vocab
model, outfile, *more = words
sys.argv = [f"{llama_cpp}/convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", outfile, *more]
runpy.run_path(sys.argv[0], run_name="__main__")
