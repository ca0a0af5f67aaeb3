"""Shared by the tests of `rkif.hf`: tiny data, a trainer in one call, and an equivalent plain loop."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments, default_data_collator, get_scheduler

from rkif import Fuser, FusionConfig
from rkif.hf import RKIFMixin, RKIFTrainer
from rkif.seeding import derive_seed

VOCABULARY = 40
FUSION = FusionConfig.paper(inner_steps=3, outer_steps=2)
OUTER_RATE = 3e-3

Rows = list[dict[str, list[int]]]


def rows(count: int, seed: int, *, ragged: bool = False) -> Rows:
    """Random sequences of 6 tokens; if ragged, with 1 to 5 of them as targets, else with 5.

    The first token is never a target: whether it counts as one differs between versions of the Trainer.
    """
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        tokens = [rng.randrange(4, VOCABULARY) for _ in range(6)]
        hidden = rng.randrange(1, 6) if ragged else 1
        result.append({"input_ids": tokens, "labels": [-100] * hidden + tokens[hidden:]})
    return result


NEW, MEMORY = rows(24, seed=1), rows(5, seed=2)


def lora_llama(*, dropout: float = 0.0, adapter: Any = None) -> Any:
    """A random Llama with LoRA, the same one in every call, or with the weights of a saved adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny_llama(VOCABULARY, 0), config)
    if adapter is not None:
        model.load_adapter(str(adapter), "default", is_trainable=True)
    return model


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 7,  # with rounds of 3: two full rounds and a tail
        "seed": 7,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


class InOrderTrainer(RKIFTrainer):
    """Reads its training data in order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class OverflowingTrainer(InOrderTrainer):
    """Makes a gradient of some steps infinite or huge; steps are counted over both learners."""

    overflows: frozenset[int] = frozenset()
    gradient = math.inf
    calls = 0

    def training_step(self, model: Any, *args: Any) -> Tensor:
        loss: Tensor = super().training_step(model, *args)
        if self.calls in self.overflows:
            trainable(model)[0].grad.view(-1)[0] = self.gradient
        self.calls += 1
        return loss


def trainer(folder: Any, *, kind: Any = InOrderTrainer, **changes: Any) -> Any:
    """A trainer of `kind` on the tiny data; `changes` are arguments of it or of `TrainingArguments`."""
    own = {"model", "memory_dataset", "fusion", "outer_learning_rate", "train_dataset", "eval_dataset"}
    own |= {
        "ledger",
        "optimizer",
        "optimizers",
        "optimizer_cls_and_kwargs",
        "callbacks",
        "data_collator",
        "gate",
        "model_init",
        "compute_metrics",
        "compute_loss_func",
        "processing_class",
    }
    given: dict[str, Any] = {"train_dataset": NEW}
    if issubclass(kind, RKIFMixin):
        given |= {"memory_dataset": MEMORY, "fusion": FUSION, "outer_learning_rate": OUTER_RATE}
    given |= {name: changes.pop(name) for name in own & changes.keys()}
    if "model_init" not in given:
        given.setdefault("model", lora_llama())
    return kind(args=arguments(folder, **changes), **given)


class Stop(TrainerCallback):
    """Stops training at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == step

        setattr(self, event, stop)


def scale_losses(trainer: Any, *, autocast: bool) -> Any:
    """Make accelerate use a gradient scaler (and fp16 autocast) on the CPU, which it refuses by default."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"  # until the next TrainingArguments resets accelerate's state
    accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    return trainer


def trainable(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_at_base(run: Any) -> None:
    """Assert that the model is the result of the last fusion: restoring the fuser's base changes nothing."""
    found = weights(run.model)
    run.fuser.rollback()
    assert_same_bits(found, weights(run.model))


def memory_samples(seed: int) -> Iterator[dict[str, list[int]]]:
    for epoch in itertools.count():
        yield from random.Random(derive_seed(seed, "memory order", epoch)).sample(MEMORY, len(MEMORY))


def plain_loop(model: Any, args: TrainingArguments, *, overflows: frozenset[int] = frozenset()) -> Fuser:
    """Trains as `InOrderTrainer` should, with nothing but torch and `rkif.Fuser`.

    Args:
        model: trained in place.
        args: the training arguments.
        overflows: the optimizer steps, counted over both learners, that a gradient scaler skips.
    """
    fuser = Fuser(model, FUSION)
    parameters = trainable(model)
    fused = args.optim == "adamw_torch_fused"
    inner = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=fused)
    outer = torch.optim.AdamW(parameters, lr=OUTER_RATE, weight_decay=0.0, fused=fused)
    schedule = get_scheduler("linear", inner, args.get_warmup_steps(args.max_steps), args.max_steps)
    new, memory = itertools.cycle(NEW), memory_samples(args.seed)
    attempts = itertools.count()
    model.train()

    def step(optimizer: torch.optim.Optimizer, samples: Iterator[Any]) -> bool:
        batches = [
            default_data_collator([next(samples) for _ in range(args.per_device_train_batch_size)])
            for _ in range(args.gradient_accumulation_steps)
        ]
        targets = sum((batch["labels"] != -100).sum() for batch in batches)
        for batch in batches:
            model(**batch, num_items_in_batch=targets).loss.backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        taken = next(attempts) not in overflows
        if taken:
            fuser.observe()
            optimizer.step()
        optimizer.zero_grad()
        return taken

    for number in range(1, args.max_steps + 1):
        rate = inner.param_groups[0]["lr"]
        if taken := step(inner, new):
            used = rate
        if taken or fused:  # accelerate does not see that a fused optimizer skips its step
            schedule.step()
        full = fuser.inner_observed == FUSION.inner_steps
        if full or (number == args.max_steps and fuser.inner_observed):
            outer.param_groups[0]["lr"] = OUTER_RATE * (used / args.learning_rate)
            with fuser.outer():
                while fuser.outer_observed < FUSION.outer_steps:
                    step(outer, memory)
    return fuser
