"""Device memory of recurrent training for models of three sizes, computed as ``rkif plan`` does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rkif.plan import Budget, Training, choose
from rkif.plan.display import name
from rkif.plan.model import count_parameters

DEVICES = (24, 80, 141)  # GiB: a workstation's card, H100, H200
RESERVE = 8
GIB = 2**30

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
# The keys of config.json that determine the number of parameters, of Llama 3.2 1B, Llama 2 7B and 13B.
CONFIGS = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
}


def markdown() -> str:
    """A table with a row per model, choice of trained parameters, and number of devices."""
    lines = [
        "| model | trained | parameters | devices | GiB a device, defaults | least, exact | least | "
        + " | ".join(f"{size} GiB" for size in DEVICES)
        + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |" + " --- |" * len(DEVICES),
    ]
    for model, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(_LLAMA | config), encoding="utf-8")
            adapter = count_parameters(file, rank=8, targets=["q_proj", "v_proj"])
            full = count_parameters(file)
        for trained, numbers, ranks in (("LoRA, r 8", adapter, 1), ("all", full, 1), ("all", full, 8)):
            training = Training(
                numbers.trainable,
                numbers.frozen,
                numbers.largest,
                trainable_bytes=4 if numbers.frozen else 2,
                frozen_bytes=2,
                ranks=ranks,
            )
            lines.append(_row(model, trained, training))
    return "\n".join(lines) + "\n"


def _row(model: str, trained: str, training: Training) -> str:
    budgets, _ = choose(training, memory=1, reserve=RESERVE * GIB)
    least = min(one.bytes for one in budgets)
    exact = min(one.bytes for one in budgets if one.option.exact)
    taken = [_taken(training, size * GIB) for size in DEVICES]
    sizes = [f"{size / GIB:.1f}" for size in (budgets[0].bytes, exact, least)]
    cells = [model, trained, f"{training.trainable:,}", str(training.ranks), *sizes, *taken]
    return f"| {' | '.join(cells)} |"


def _taken(training: Training, memory: int) -> str:
    chosen: Budget | None = choose(training, memory=memory, reserve=RESERVE * GIB)[1]
    return "-" if chosen is None else name(chosen.option)
