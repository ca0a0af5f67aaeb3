"""Perplexity of a language model on plain English text before and after a run: its general ability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rkif.continual.config import RunConfig
from rkif.continual.models.device import run_device
from rkif.continual.rundir.folder import task_folder

WINDOW = 256  # tokens; each is scored with the tokens before it in its window
WINDOWS = 32


def perplexities(config: RunConfig, run: Path, tasks: Sequence[str]) -> tuple[float, float]:
    """Perplexity of the model before the first task and after the last, on the same tokens.

    Args:
        config: of a causal model.
        run: the run's folder.
        tasks: the names of its tasks, in order.
    """
    from transformers import AutoModelForCausalLM

    ids = plain_text(config.model)
    device, last = run_device(config), task_folder(run, len(tasks) - 1, tasks[-1])
    model = AutoModelForCausalLM.from_pretrained(config.model).to(device)
    before = perplexity(model, ids)
    if config.adapter is None:
        model = AutoModelForCausalLM.from_pretrained(last).to(device)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, last)
    return before, perplexity(model, ids)


def plain_text(model: str) -> list[int]:
    """Tokens of English prose that is in no task: the reference of Python, a part of its standard library.

    It differs slightly between versions of Python.
    """
    from pydoc_data import topics

    from transformers import AutoTokenizer

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    return ids[: WINDOWS * WINDOW]


@torch.no_grad()
def perplexity(model: nn.Module | Any, ids: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of the tokens, without the first of each window."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]], device=device)
        logits = model(input_ids=window).logits[0, :-1].float()
        losses.append(cross_entropy(logits, window[0, 1:], reduction="none").double().cpu())
    return math.exp(torch.cat(losses).mean())
