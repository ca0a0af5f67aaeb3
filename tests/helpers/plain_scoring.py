"""Tiny models, prompts, and scores of single sequences without batches or caches."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_t5, word_tokenizer

from rkif.continual.tasks.records import Item, Record
from rkif.continual.tasks.text import TextCollator, TextFormat

both = pytest.mark.parametrize("kind", ["llama", "t5"])

WORDS = [f"w{i}" for i in range(40)]
LABELS = ["w1", "w2 w3", "w2 w5 w6", "w7"]
EOS = 1


def items(count: int = 13) -> list[Item]:
    rng = random.Random(5)
    return [
        ("Ask: ", Record("t", str(i), " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) + " Answer:", "w1"))
        for i in range(count)
    ]


def setup(kind: str, *, max_length: int = 48) -> tuple[Any, TextCollator]:
    seq2seq = kind == "t5"
    tokenizer = word_tokenizer(["Ask: Answer:", *WORDS], pad=seq2seq, bos=not seq2seq, eos_after=seq2seq)
    model = tiny_t5(len(tokenizer), seed=7) if seq2seq else tiny_llama(len(tokenizer), seed=0)
    # Random models rarely end an answer by themselves.
    model.lm_head.weight.data[EOS] *= 5
    return model, TextCollator(tokenizer, seq2seq=seq2seq, max_length=max_length, text=TextFormat())


def plain_logits(model: Any, collator: TextCollator, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits of each token of `answer` and of the one after it, from one pass over one sequence."""
    if collator.seq2seq:
        start = [model.config.decoder_start_token_id]
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start + answer])}
    else:
        inputs = {"input_ids": torch.tensor([prompt + answer])}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    return logits[-len(answer) - 1 :]


def plain_score(model: Any, collator: TextCollator, item: Item, label: str, reserve: int) -> float:
    """log p(label | prompt) in double precision."""
    prompt, target = collator.prompt(item[0], item[1].input, reserve=reserve), collator.target(label)
    log_probs = plain_logits(model, collator, prompt, target[:-1]).double().log_softmax(-1)
    return sum(log_probs[i, token].item() for i, token in enumerate(target))


def plain_generation(model: Any, collator: TextCollator, item: Item, max_new_tokens: int) -> list[int]:
    """The most likely tokens up to EOS, each from a pass over all earlier tokens."""
    prompt = collator.prompt(item[0], item[1].input, reserve=max_new_tokens)
    answer: list[int] = []
    while len(answer) < max_new_tokens and EOS not in answer:
        answer.append(int(plain_logits(model, collator, prompt, answer)[-1].argmax()))
    return answer
