"""Task sequences end to end, with small models and every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_inputs import TASKS, go, read_parameters
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from rkif.continual.config import RunConfig, load_config
from rkif.continual.methods import METHODS, Context
from rkif.continual.models.load import load_model
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.replay_memory import ReplayMemory


@pytest.mark.parametrize("method", METHODS)
def test_every_method_completes_a_run(config: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    metrics = go(config(method=method), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    accuracy = metrics["accuracy"]
    assert [len(row) for row in accuracy] == [3, 3, 3]
    assert metrics["op"] == pytest.approx(sum(row[-1] for row in accuracy) / 3)
    if METHODS[method].sequential:
        assert metrics["bwt"] == pytest.approx(sum(accuracy[i][-1] - accuracy[i][i] for i in range(2)) / 2)
        assert metrics["fwt"] == pytest.approx(
            sum(accuracy[i][i - 1] - metrics["initial"][i] for i in (1, 2)) / 2
        )
    else:
        assert metrics["bwt"] is metrics["fwt"] is None
    assert metrics["steps"] == 21
    assert load_config(tmp_path / "config.yaml").method == method
    for index, task in enumerate(TASKS):
        folder = tmp_path / "tasks" / f"{index + 1:02d}-{task}"
        memory = ReplayMemory.load(folder / "memory.jsonl")
        assert {name: len(ids) for name, ids in memory.ids.items()} == dict.fromkeys(TASKS[: index + 1], 4)
        assert (folder / "importance.safetensors").exists() == (method == "recurrent_kif" and index > 0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_replay_and_recurrent_kif_see_the_same_number_of_samples(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2}  # two full rounds: Q = 3, M = 2
    seen = {
        method: go(config(method=method, training=training), tmp_path / method)["samples"]
        for method in METHODS
    }
    # 3 tasks of 6 steps of 4; two of them with 2 rounds of 2 outer steps of 4 memory records. EWC: 64 records
    # more of each task but the last. FOREVER: its first day is longer than a task.
    alone = dict.fromkeys(("sequential", "o_lora", "tasl", "per_task", "forever"), 72)
    assert seen == dict.fromkeys(METHODS, 72 + 32) | alone | {"ewc": 72 + 2 * 64}


def test_adapters_reload_to_the_same_logits_and_start_the_next_task(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path
) -> None:
    """The released code silently saves empty adapters, so each task starts without an adapter."""
    settings = config()
    go(settings, tmp_path)
    tokens = torch.arange(3, 23)[None]
    logits = []
    for index, task in enumerate(TASKS):
        folder = tmp_path / "tasks" / f"{index + 1:02d}-{task}"
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == 8  # 2 layers, q and v, A and B
        assert all(tensor.norm() > 0 for tensor in saved.values())
        base = AutoModelForCausalLM.from_pretrained(inputs / "model")
        reloaded = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            logits.append(reloaded(input_ids=tokens).logits)
        if index + 1 == len(TASKS):
            last = read_parameters(tmp_path)
            names = {n: p for n, p in reloaded.named_parameters() if "lora_" in n}
            assert set(names) == set(last)
            assert all(torch.equal(names[name], last[name]) for name in last)
    assert not torch.equal(logits[0], logits[1])

    # Each task by hand: after task 1 the parameters of the run are those of the file, byte for byte.
    tasks = load_tasks(inputs / "tasks", TASKS)
    model, objective = load_model(settings, tasks)
    first = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs / "model"), tmp_path / "tasks" / "01-review"
    )
    method = METHODS["recurrent_kif"](Context(settings, model, objective, tasks, 0, ReplayMemory()))
    for step in range(7):
        method.train_step(step)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(input_ids=tokens).logits, first.eval()(input_ids=tokens).logits)
    assert torch.equal(model(input_ids=tokens).logits, logits[0])


def test_all_parameters_of_a_model_can_be_trained(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    go(config(adapter=None), tmp_path)
    last = read_parameters(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tasks" / "03-place")
    assert all(torch.equal(p, last[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_seq2seq_models_can_be_trained(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path, scoring: str
) -> None:
    settings = config(
        model=str(inputs / "t5"),
        architecture="seq2seq",
        adapter={"r": 4, "target_modules": ["q", "v"]},
        text={"max_length": 64, "target": "{output}"},
        evaluation={"scoring": scoring, "max_new_tokens": 3},
    )
    go(settings, tmp_path)
    base = AutoModelForSeq2SeqLM.from_pretrained(inputs / "t5")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "tasks" / "03-place")
    last = read_parameters(tmp_path)
    assert last
    assert all(torch.equal(p, last[n]) for n, p in reloaded.named_parameters() if n in last)


def test_limits_of_tasks_and_memory_are_applied(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    tasks = config().tasks.model_dump() | {"train_limit": 20, "dev_limit": 6}
    metrics = go(config(tasks=tasks, memory={"fraction": 0.5, "cap": 3}), tmp_path)
    assert metrics["records"] == [6, 6, 6]
    memory = ReplayMemory.load(tmp_path / "tasks" / "03-place" / "memory.jsonl")
    assert {task: len(ids) for task, ids in memory.ids.items()} == dict.fromkeys(TASKS, 3)
