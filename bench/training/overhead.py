"""The time that Recurrent-KIF adds to training steps: rounds with several optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import rkif
from bench.common import rows as store
from bench.common.machine import commit, device_name
from bench.common.peak import GIB, Peak, release
from bench.common.timing import seconds

RESULTS = store.RESULTS / "overhead.jsonl"
# The shapes of SmolLM2-135M. The weights are random, because the time of a step does not depend on them.
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
# The optimizers. The plain ones, without Recurrent-KIF, are the baselines.
PLAIN = ("adamw", "fused")
METHODS = {
    "adamw": "torch.optim.AdamW",
    "fused": "torch.optim.AdamW, fused",
    "observe": "Fuser.observe, torch.optim.AdamW",
    "rkif_adamw": "rkif.optim.AdamW",
}


@dataclass(frozen=True)
class Batches:
    """The size of the batches of random tokens."""

    size: int
    length: int

    def draw(self, device: torch.device) -> torch.Tensor:
        return torch.randint(SHAPES["vocab_size"], (self.size, self.length), device=device)


def measure(device: torch.device, batches: Batches, rounds: int, console: Console) -> None:
    """Time rounds of Q inner and M outer steps with each method in turn, and write a row per method."""
    measured = []
    for trained in TRAINED:
        here: list[dict[str, Any]] = []
        training = _Training(trained, device, batches)
        for method in METHODS:
            training.round(method)  # the first round compiles and allocates
        taken: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method, times in taken.items():
                times.append(seconds(partial(training.round, method), device))
        for method, times in taken.items():
            here.append(
                {
                    "model": NAME,
                    "trained": trained,
                    "method": method,
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
            row["peak_bytes"] = _peak(trained, row["method"], device, batches)
            console.print(row, highlight=False)
        release(device)
        measured += here
    others = [row for row in rows() if row["device"] != device_name(device)]
    store.write_all(RESULTS, [*others, *measured])


def _peak(trained: str, method: str, device: torch.device, batches: Batches) -> int | None:
    """Peak bytes of a round in a separate training; None on a CPU, which has no counter for it."""
    if device.type != "cuda":
        return None
    training = _Training(trained, device, batches)
    training.round(method)
    with Peak(device) as peak:
        training.round(method)
    return peak.total


class _Training:
    """A model with an inner and an outer optimizer for each method, and rounds of their steps.

    The methods share the moments, so that all fit into memory. Their values do not affect the time of a step.
    """

    def __init__(self, trained: str, device: torch.device, batches: Batches) -> None:
        self._device, self._batches = device, batches
        self._model = _model(trained).to(device)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self._trained)
        self._moments = [
            [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._trained] for _ in ("inner", "outer")
        ]
        self._optimizers: dict[str, list[torch.optim.Optimizer]] = {}

    @cached_property
    def _fuser(self) -> rkif.Fuser:
        return rkif.Fuser(self._model, CONFIG)

    def _optimizer(self, method: str, moments: Sequence[tuple[Tensor, Tensor]]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer
        if method == "rkif_adamw":
            optimizer = rkif.optim.AdamW(self._trained, lr=1e-5, fuser=self._fuser)
        else:
            optimizer = torch.optim.AdamW(self._trained, lr=1e-5, fused=method == "fused" or None)
        for parameter, (mean, square) in zip(self._trained, moments, strict=True):
            # The step counter of PyTorch's fused AdamW is on the device; that of the others is on the host.
            step = torch.zeros((), device=self._device if method == "fused" else "cpu")
            optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return optimizer

    def round(self, method: str) -> None:
        if method not in self._optimizers:
            self._optimizers[method] = [self._optimizer(method, moments) for moments in self._moments]
        inner, outer = self._optimizers[method]
        for _ in range(CONFIG.inner_steps):
            self._step(inner, method)
        with nullcontext() if method in PLAIN else self._fuser.outer():
            for _ in range(CONFIG.outer_steps):
                self._step(outer, method)

    def _step(self, optimizer: torch.optim.Optimizer, method: str) -> None:
        tokens = self._batches.draw(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = self._model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if method == "observe":
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
    """The rows measured so far."""
    return store.read(RESULTS)


def markdown() -> str:
    """A table for each device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows()):
        here = [row for row in rows() if row["device"] == device]
        row = here[0]
        lines = [
            f"{row['model']}, batches of {row['batch']} times {row['length']} tokens, float32 under bfloat16 "
            f"autocast, two AdamW; medians of {row['rounds']} alternating rounds, on {device}, "
            f"torch {row['torch']}, at {store.commit_of(row)}.",
            "",
            "| trained | parameters | step | ms per step | over AdamW | over fused AdamW | peak, GiB |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [_line(row, here) for row in here]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(row: dict[str, Any], here: Sequence[dict[str, Any]]) -> str:
    """The table's line of a row, compared with the plain rows of the same device."""
    plain = {other["method"]: other["round_ms"] for other in here if other["trained"] == row["trained"]}
    cells = [TRAINED[row["trained"]], f"{row['parameters']:,}", METHODS[row["method"]]]
    cells.append(f"{row['round_ms'] / row['steps']:.1f}")
    for method in PLAIN:
        compared = method in plain and method != row["method"]
        cells.append(f"{row['round_ms'] / plain[method] - 1:+.1%}" if compared else "-")
    cells.append(f"{row['peak_bytes'] / GIB:.2f}" if row["peak_bytes"] else "-")
    return f"| {' | '.join(cells)} |"
