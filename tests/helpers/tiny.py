"""Tiny models and tokenizers, built without files or downloads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# Several busy processes on few cores are far slower than one thread each.
torch.set_num_threads(1)


def word_tokenizer(
    texts: Iterable[str], *, pad: bool = True, bos: bool = False, eos_after: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of whitespace-separated words: `<pad>` 0, `<eos>` 1, `<unk>` 2, `<bos>` 3, then the words.

    Args:
        texts: every word in them gets a token, in order of appearance.
        pad: whether the tokenizer knows its padding token.
        bos: whether it puts `<bos>` before a text, as Llama's does.
        eos_after: whether it puts `<eos>` after a text, as T5's does.
    """
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<eos>", "<unk>", "<bos>"))}
    for text in texts:
        for word in text.split():
            vocabulary.setdefault(word, len(vocabulary))
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos_after),
        special_tokens=[("<bos>", 3), ("<eos>", 1)],
    )
    special = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", bos_token="<bos>", **special
    )


def tiny_llama(vocab_size: int, seed: int) -> Any:
    """A random two-layer Llama of hidden size 32, in evaluation mode; no global generator is touched."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    return _seeded(LlamaForCausalLM, config, seed)


def tiny_t5(vocab_size: int, seed: int) -> Any:
    """A random T5 of two layers a side and hidden size 32, in evaluation mode."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = _seeded(T5ForConditionalGeneration, config, seed)
    # With its initial weights, a T5 of this size gives the same answer to every prompt.
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 10
    return model


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()
