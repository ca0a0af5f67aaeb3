"""Every type of PEFT adapter in a Trainer with a memory: it trains, and its saved form equals it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import FUSION, MEMORY, NEW, trainer, weights
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import tiny_llama

from rkif.hf import RKIFTrainer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "lora.md"
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
VIRTUAL = {"num_virtual_tokens": 4}
RANKS = {"target_modules": ["q_proj"], "total_step": 100, "tinit": 1, "tfinal": 1, "init_r": 6}
# What a type needs besides rank 4 in two projections.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {**RANKS, "target_r": 6},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {**PROJECTIONS, "boft_block_size": 4},
    "C3A": {**PROJECTIONS, "block_size": 8},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {**PROJECTIONS, "n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 2},
    "OFT": {**PROJECTIONS, "oft_block_size": 4, "r": 0},
    "POLY": {**PROJECTIONS, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 16},
    "ROAD": {**PROJECTIONS, "group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [4, 5, 6, 7]},
    "VBLORA": {**PROJECTIONS, "num_vectors": 10, "vector_length": 4, "r": 2, "topk": 2},
    "WAVEFT": {**PROJECTIONS, "n_frequency": 10},
}
COLUMNS: dict[str, dict[str, Any]] = {
    "CPT": {"input_type_mask": [4] * 6},
    "MULTITASK_PROMPT_TUNING": {"task_ids": 1},
    "POLY": {"task_ids": 1},
}
NOT_BUILT = {
    "SHADOW": "the plain Trainer cannot train it either",
    "XLORA": "it needs trained adapters",
}
TYPES = sorted(str(one.value) for one in PEFT_TYPE_TO_CONFIG_MAPPING)


def adapted(kind: str) -> Any:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = dict(SETTINGS.get(kind, PROJECTIONS))
    if "r" in config.__dataclass_fields__ and kind != "ADALORA":
        settings.setdefault("r", 4)
    if kind == "ADAMSS":
        pytest.importorskip("sklearn", reason="ADAMSS needs scikit-learn")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(40, 0), config(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_trains_and_is_saved(tmp_path: Path, kind: str) -> None:
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    model = adapted(kind)
    before = weights(model)
    new, memory = ([{**row, **COLUMNS.get(kind, {})} for row in rows] for rows in (NEW, MEMORY))
    data = {"train_dataset": new, "memory_dataset": memory}
    run = trainer(
        tmp_path,
        kind=RKIFTrainer,
        model=model,
        max_steps=4,
        warmup_steps=0,
        remove_unused_columns=False,
        **data,
    )
    run.train()
    assert run.fuser.round == 2
    assert run.fuser.last_report.missing == ()
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())

    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(40, 0), str(tmp_path / "adapter")).eval()
    inputs = {"input_ids": torch.tensor([row["input_ids"] for row in NEW[:4]])}
    inputs |= {name: torch.tensor([value] * 4) for name, value in COLUMNS.get(kind, {}).items()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_the_page_lists_the_types() -> None:
    listed = PAGE.read_text(encoding="utf-8").partition("## Types of adapters")[2]
    assert set(re.findall(r"`([A-Z0-9_]+)`", listed)) >= set(TYPES)


def test_a_rank_schedule_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(40, 0), AdaLoraConfig(task_type="CAUSAL_LM", target_r=2, **RANKS))
    with pytest.raises(ValueError, match=r"AdaLoRA prunes .* init_r=6 to target_r=2, and fusions undo it"):
        trainer(tmp_path, model=model, fusion=FUSION)
    trainer(tmp_path, model=model, memory_dataset=None)
