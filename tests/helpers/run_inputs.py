"""Shared by the tests of whole runs: small tasks and models, and their config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import Context, RecurrentKIF, Sequential
from rkif.continual.models.load import load_model
from rkif.continual.run import run
from rkif.continual.rundir.recorder import NOT_REPRODUCED
from rkif.continual.rundir.state import read_checkpoint
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.demo import write_inputs
from rkif.fuser.parameters import parameter_copies
from rkif.ledger.chain import Ledger, read_ledger

M = TypeVar("M", bound=Sequential)

TASKS = ["review", "tense", "place"]


def make_inputs(folder: Path) -> None:
    """Write small tasks, a small Llama, a small T5 and a small BERT."""
    write_inputs(folder, train=40, dev=8, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    BertModel(bert).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")


def make_config(inputs: Path, **changes: Any) -> RunConfig:
    """A config for these inputs; keywords change single settings."""
    settings: dict[str, Any] = {
        "model": str(inputs / "model"),
        "adapter": {"r": 4, "dropout": 0.1},
        "tasks": {"folder": str(inputs / "tasks"), "order": TASKS},
        "text": {"max_length": 64},
        "method": "recurrent_kif",
        "fusion": {"inner_steps": 3, "outer_steps": 2},
        "training": {"steps": 7, "batch_size": 4, "learning_rate": 1e-2},
        "outer": {"batch_size": 4, "learning_rate": 1e-2},
        "memory": {"fraction": 0.1},
        "checkpoint_every": 2,
        "threads": 1,
        "device": "cpu",
        "seed": 3,
    }
    return RunConfig.model_validate(settings | changes)


def write_harness_task(folder: Path, data: Path, task: str, settings: dict[str, Any] | None = None) -> Path:
    """Write a task of lm-eval that asks the dev records of a run's task; returns ``folder``.

    Its name is ``lm_`` and that of the task; the likelihoods of the labels decide. ``settings`` change that.
    """
    folder.mkdir(exist_ok=True)
    described = json.loads((data / "tasks.json").read_text())["tasks"][task]
    labels = described["labels"]
    rows = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    documents = [
        {"question": described["instruction"] + row["input"], "answer": labels.index(row["output"])}
        for row in rows
        if row["task"] == task
    ]
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    content = {
        "task": f"lm_{task}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": labels,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(content | (settings or {})))
    return folder


def go(config: RunConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    with open(os.devnull, "w") as nowhere:
        return run(config, out, resume=resume, progress=RunProgress(Console(file=nowhere)))


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of a run's files, except peft's files, which list modules in varying order, and except the
    times in the ledger and the hashes that depend on them.
    """
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in found if name.endswith("adapter_config.json")]:
        settings = json.loads(found[name])
        settings["target_modules"].sort()
        found[name] = json.dumps(settings, sort_keys=True).encode()
    for name in [name for name in found if name.endswith("ledger.jsonl")]:
        records = [json.loads(line) for line in found[name].splitlines()]
        kept = [{k: v for k, v in r.items() if k not in NOT_REPRODUCED} for r in records]
        found[name] = json.dumps(kept).encode()
    return {name: content for name, content in found.items() if not name.endswith("README.md")}


def assert_same_files(got: dict[str, bytes], expected: dict[str, bytes], when: str = "") -> None:
    assert set(got) == set(expected), when
    assert [name for name in expected if got[name] != expected[name]] == [], when


def read_parameters(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.parameters


def parameters_of(method: Sequential) -> dict[str, torch.Tensor]:
    """Name -> copy of a method's current trainable parameter."""
    return parameter_copies(method.inner.parameters)


def one_task(settings: RunConfig, inputs: Path, method: type[M] = RecurrentKIF, **more: Any) -> M:
    """A method at the start of its second task."""
    tasks = load_tasks(inputs / "tasks", TASKS)
    memory = ReplayMemory()
    memory.add(TASKS[0], tasks[0].instruction, tasks[0].train, fraction=0.1, seed=0)
    model, objective = load_model(settings, tasks, slices=len(tasks) if method.slices else 1)
    return method(Context(settings, model, objective, tasks, 1, memory, **more))


def rewrite_ledger(path: Path, edit: Callable[[dict[str, Any]], Any], seq: int | None = None) -> None:
    """Change one record or all, and compute the chain again, as in a forgery."""
    records = list(read_ledger(path))
    path.unlink()
    ledger = Ledger(path)
    for record in records:
        content = {key: value for key, value in record.items() if key not in ("seq", "previous", "hash")}
        if seq in (None, record["seq"]):
            edit(content)
        ledger.append(content)
