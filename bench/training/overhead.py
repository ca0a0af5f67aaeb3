"""What Recurrent-KIF adds to training steps: the same rounds with and without a Fuser, in turn."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from rich.console import Console

import rkif
from bench.common import rows as store
from bench.common.machine import commit, device_name
from bench.common.peak import GIB, Peak, release
from bench.common.timing import seconds

RESULTS = store.RESULTS / "overhead.jsonl"
# The shapes of SmolLM2-135M: what a step takes does not depend on the weights, so they are random.
SHAPES: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
NAME = "SmolLM2-135M's shapes"
CONFIG = rkif.FusionConfig()
STEPS = CONFIG.inner_steps + CONFIG.outer_steps
TRAINED = {"adapter": "LoRA, r 8, q and v", "all": "all parameters"}


@dataclass(frozen=True)
class Batches:
    """How large the batches of random tokens are."""

    size: int
    length: int

    def one(self, device: torch.device) -> torch.Tensor:
        return torch.randint(SHAPES["vocab_size"], (self.size, self.length), device=device)


def measure(device: torch.device, batches: Batches, rounds: int, console: Console) -> None:
    """Time rounds of Q inner and M outer steps with and without, in turn, and write a row each."""
    found = []
    for trained in TRAINED:
        here: list[dict[str, Any]] = []
        training = _Training(trained, device, batches)
        for with_fuser in (False, True):
            training.round(with_fuser)  # compiles, and allocates the optimizers' state
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for with_fuser, times in taken.items():
                times.append(seconds(partial(training.round, with_fuser), device))
        for with_fuser, times in taken.items():
            here.append(
                {
                    "model": NAME,
                    "trained": trained,
                    "fuser": with_fuser,
                    "parameters": training.parameters,
                    "batch": batches.size,
                    "length": batches.length,
                    "steps": STEPS,
                    "round_ms": round(1e3 * median(times), 3),
                    "rounds": rounds,
                    "device": device_name(device),
                    "torch": torch.__version__,
                    "commit": commit(),
                }
            )
        del training
        for row in here:
            release(device)
            row["peak_bytes"] = _peak(trained, row["fuser"], device, batches)
            console.print(row, highlight=False)
        release(device)
        found += here
    others = [row for row in rows() if row["device"] != device_name(device)]
    store.write_all(RESULTS, [*others, *found])


def _peak(trained: str, with_fuser: bool, device: torch.device, batches: Batches) -> int | None:
    """Bytes at most in a round of a training of its own; unknown on a CPU, which has no counter for it."""
    if device.type != "cuda":
        return None
    training = _Training(trained, device, batches)
    training.round(with_fuser)
    with Peak(device) as peak:
        training.round(with_fuser)
    return peak.total


class _Training:
    """A model with an inner and an outer optimizer, and rounds of their steps."""

    def __init__(self, trained: str, device: torch.device, batches: Batches) -> None:
        self._device, self._batches = device, batches
        self._model = _model(trained).to(device)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in parameters)
        self._inner, self._outer = (torch.optim.AdamW(parameters, lr=1e-5) for _ in range(2))

    @cached_property
    def _fuser(self) -> rkif.Fuser:
        return rkif.Fuser(self._model, CONFIG)

    def round(self, with_fuser: bool) -> None:
        for _ in range(CONFIG.inner_steps):
            self._step(self._inner, with_fuser)
        with self._fuser.outer() if with_fuser else nullcontext():
            for _ in range(CONFIG.outer_steps):
                self._step(self._outer, with_fuser)

    def _step(self, optimizer: torch.optim.Optimizer, with_fuser: bool) -> None:
        tokens = self._batches.one(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = self._model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if with_fuser:
            self._fuser.observe()
        optimizer.step()
        optimizer.zero_grad()


def _model(trained: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES))
    if trained == "all":
        return model
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def rows() -> list[dict[str, Any]]:
    """What has been measured."""
    return store.read(RESULTS)


def markdown() -> str:
    """A table for every device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows()):
        here = [row for row in rows() if row["device"] == device]
        row = here[0]
        lines = [
            f"{row['model']}, batches of {row['batch']} times {row['length']} tokens, float32 under bfloat16 "
            f"autocast, two AdamW; medians of {row['rounds']} rounds in turn, on {device}, "
            f"torch {row['torch']}, at {store.commit_of(row)}.",
            "",
            "| trained | parameters | fuser | ms a step | more than without | peak, GiB |",
            "| --- | ---: | --- | ---: | ---: | ---: |",
        ]
        plain = {row["trained"]: row["round_ms"] for row in here if not row["fuser"]}
        lines += [_line(row, plain[row["trained"]]) for row in here]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(row: dict[str, Any], plain: float) -> str:
    cells = [TRAINED[row["trained"]], f"{row['parameters']:,}", "with" if row["fuser"] else "without"]
    cells.append(f"{row['round_ms'] / row['steps']:.1f}")
    cells.append(f"{row['round_ms'] / plain - 1:+.1%}" if row["fuser"] else "-")
    cells.append(f"{row['peak_bytes'] / GIB:.2f}" if row["peak_bytes"] else "-")
    return f"| {' | '.join(cells)} |"
