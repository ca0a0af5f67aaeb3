"""Trainers of trl with the mixin, compared with the same trainers without it, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from hf_helpers import FUSION, arguments, assert_at_base, assert_same_bits
from tiny import tiny_llama, word_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from rkif.hf import RKIFMixin

WORDS = [f"w{i}" for i in range(20)]
TIMED = ("_runtime", "_per_second")


def text(start: int, count: int = 5) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


def dataset(kind: str, start: int, count: int) -> Dataset:
    records: list[dict[str, Any]] = []
    for i in range(start, start + count):
        prompt, good, bad = text(i, 3), " " + text(i + 3), " " + text(i + 7)
        records.append(
            {
                "SFT": {"prompt": prompt, "completion": good},
                "DPO": {"prompt": prompt, "chosen": good, "rejected": bad},
                "Reward": {"chosen": prompt + good, "rejected": prompt + bad},
                "KTO": {"prompt": prompt, "completion": good, "label": bool(i % 2)},
            }[kind]
        )
    return Dataset.from_list(records)


def model_of(kind: str) -> Any:
    if kind != "Reward":
        return tiny_llama(40, 0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)


SETTINGS = {"KTO": {"loss_type": "apo_zero_unpaired"}}


def make(folder: Path, kind: str, *, mixin: bool, memory: bool = False, **changes: Any) -> Any:
    base = getattr(trl, f"{kind}Trainer")
    settings = arguments(folder, logging_strategy="steps", logging_steps=1, warmup_steps=0).to_dict()
    settings |= {"max_length": 24, "bf16": False, **SETTINGS.get(kind, {})}
    config = getattr(trl, f"{kind}Config")(**settings | changes)
    given: dict[str, Any] = {"fusion": FUSION} if mixin else {}
    if kind in ("DPO", "KTO"):
        given["ref_model"] = tiny_llama(40, 0)
    if memory:
        given["memory_dataset"] = dataset(kind, 100, 5)
    return (type(f"RKIF{kind}", (RKIFMixin, base), {}) if mixin else base)(
        model=model_of(kind),
        args=config,
        train_dataset=dataset(kind, 0, 16),
        processing_class=word_tokenizer([" ".join(WORDS)]),
        **given,
    )


def train(folder: Path, kind: str, **how: bool) -> Any:
    run = make(folder, kind, **how)
    run.train()
    return run


def steps(run: Any) -> list[dict[str, Any]]:
    logs = (log for log in run.state.log_history if "rkif/round" not in log)
    return [{name: value for name, value in log.items() if not name.endswith(TIMED)} for log in logs]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "KTO"])
def test_a_trainer_of_trl_is_unchanged_by_the_mixin(tmp_path: Path, kind: str) -> None:
    plain = train(tmp_path / "plain", kind, mixin=False)
    unchanged = train(tmp_path / "mixin", kind, mixin=True)
    assert_same_bits(weights(unchanged), weights(plain))
    assert steps(unchanged) == steps(plain)

    run = train(tmp_path / "memory", kind, mixin=True, memory=True)
    assert (run.fuser.round, run.state.global_step) == (3, plain.state.global_step)
    assert [sorted(log) for log in steps(run)] == [sorted(log) for log in steps(plain)]
    assert steps(run)[: FUSION.inner_steps] == steps(plain)[: FUSION.inner_steps]
    assert [log.get("num_tokens") for log in steps(run)] == [log.get("num_tokens") for log in steps(plain)]
    assert_at_base(run)


def test_kto_pairs_samples_of_a_batch_which_a_memory_would_mix(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    with pytest.raises(
        ValueError, match=r"RKIFKTO with loss_type='kto' .* use loss_type='apo_zero_unpaired'"
    ):
        make(tmp_path, "KTO", mixin=True, memory=True, **changes)
    make(tmp_path, "KTO", mixin=True, **changes)
