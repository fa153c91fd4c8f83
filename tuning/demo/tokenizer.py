"""Small tokenizers, trained when they are needed, so that the demo and the tests download nothing."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FALLBACK_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(
    texts: Iterable[str],
    *,
    special_tokens: list[str],
    sentencepiece: bool = False,
    prepend_bos: bool = False,
    vocab_size: int = 600,
    **tokenizer_kwargs,
) -> PreTrainedTokenizerFast:
    """Train a small BPE tokenizer in the style of a published family.

    `sentencepiece=False` is the byte-level style of Granite and Llama 3; `True` is Llama 2's and Mistral's: a blank is
    carried by the word after it (`▁word`) and unknown characters become bytes. `special_tokens` get the first ids in
    the order given; `prepend_bos` makes the tokenizer itself begin every text with `bos_token`; `tokenizer_kwargs`
    (`bos_token`, `eos_token`, `extra_special_tokens`, …) go to `PreTrainedTokenizerFast`.
    """
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, reserved = [], [*special_tokens, *FALLBACK_BYTES]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, reserved = pre_tokenizers.ByteLevel.alphabet(), special_tokens
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    # The trainer marks the byte tokens as special, which would drop them from decoded text: start again without them.
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    if prepend_bos:
        bos = tokenizer_kwargs["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizer_kwargs)
