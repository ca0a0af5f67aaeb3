"""Trainers and settings that cannot have a memory are refused when the trainer is made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from hf_helpers import FUSION, MEMORY, lora_llama, trainer
from tiny import tiny_llama, word_tokenizer
from transformers import Trainer
from transformers.training_args import OptimizerNames

from rkif.hf import RKIFMixin
from rkif.hf.requirements import require_given_batches

PROMPTS = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"]})


def generating(name: str, folder: Any, **changes: Any) -> Any:
    """A GRPO or RLOO trainer with the mixin."""
    kind = type(f"RKIF{name}", (RKIFMixin, getattr(trl, f"{name}Trainer")), {})
    config = getattr(trl, f"{name}Config")
    return kind(
        model=tiny_llama(40, 0),
        args=config(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            max_steps=2,
            bf16=False,
        ),
        train_dataset=PROMPTS,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        processing_class=word_tokenizer([" ".join(f"w{i}" for i in range(20))]),
        fusion=FUSION,
        **changes,
    )


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_trainer_that_generates_is_refused(tmp_path: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}Trainer cannot have a memory_dataset: it generates"):
        generating(name, tmp_path, memory_dataset=PROMPTS)
    if name == "GRPO":  # trl's RLOO cannot be made without the Hub
        assert generating(name, tmp_path).fuser is None


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward"])
def test_a_trainer_that_learns_from_samples_is_accepted(name: str) -> None:
    require_given_batches(type("Given", (RKIFMixin, getattr(trl, f"{name}Trainer")), {}))


@pytest.mark.parametrize("path", ["online_dpo.OnlineDPOTrainer", "async_grpo.AsyncGRPOTrainer"])
def test_experimental_trainers_that_generate_are_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module, _, name = path.partition(".")
    kind = getattr(pytest.importorskip(f"trl.experimental.{module}"), name)
    with pytest.raises(ValueError, match=f"{name} cannot have a memory_dataset"):
        require_given_batches(type("Generating", (RKIFMixin, kind), {}))


class Copied(Trainer):
    def _generate_and_score_completions(self) -> None:
        """As in copies of GRPO by other libraries."""


def test_a_copy_of_a_trainer_that_generates_is_refused() -> None:
    with pytest.raises(ValueError, match="Copied cannot have a memory_dataset"):
        require_given_batches(type("Generating", (RKIFMixin, Copied), {}))


def test_own_batches_of_a_trainer_are_accepted(tmp_path: Any) -> None:
    """Overriding the same methods elsewhere does not mean that completions are generated."""

    class Own(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    kind = type("RKIFOwn", (RKIFMixin, Own), {})
    run = trainer(tmp_path, kind=kind, model=lora_llama(), memory_dataset=MEMORY, max_steps=3)
    run.train()
    assert run.fuser.round == 1


BACKWARD, SECOND = "steps within the backward pass", "keeps a second sequence of weights"
REFUSED = {
    "lomo": BACKWARD,
    "adalomo": BACKWARD,
    "galore_adamw_layerwise": BACKWARD,
    "galore_adamw_8bit_layerwise": BACKWARD,
    "galore_adafactor_layerwise": BACKWARD,
    "apollo_adamw_layerwise": BACKWARD,
    "schedule_free_adamw": SECOND,
    "schedule_free_sgd": SECOND,
    "schedule_free_radam": SECOND,
}


@pytest.mark.parametrize(("optim", "reason"), REFUSED.items())
def test_an_optimizer_that_hides_its_steps_is_refused(tmp_path: Any, optim: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"optim='{optim}' cannot be used with a memory_dataset: it {reason}"
    ):
        trainer(tmp_path, optim=optim)
    trainer(tmp_path, optim=optim, memory_dataset=None)
    trainer(tmp_path, optim=optim, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))


def test_no_other_optimizer_of_the_trainer_says_so_in_its_name() -> None:
    """Notices names that a later version of transformers adds."""
    names = {str(name.value) for name in OptimizerNames}
    assert {name for name in names if re.search("layerwise|lomo|schedule_free", name)} <= REFUSED.keys()
