"""Sentence encoders: loss and answers, compared with their definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from run_inputs import TASKS, go
from transformers import AutoModel, AutoTokenizer

from rkif.continual.config import RunConfig
from rkif.continual.models.label_matching import LabelMatchingObjective
from rkif.continual.models.load import load_model
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Record
from rkif.continual.tasks.text import TextFormat


@pytest.fixture
def settings(config: Callable[..., RunConfig], inputs: Path) -> RunConfig:
    return config(
        model=str(inputs / "bert"),
        architecture="encoder",
        adapter={"r": 4, "dropout": 0.0, "target_modules": ["query", "value"]},
        text={"max_length": 64, "prompt": "{input}", "target": "{output}"},
    )


def cosine_scores(inputs: Path, text: str, labels: tuple[str, ...]) -> torch.Tensor:
    """One text at a time, without padding."""
    model = AutoModel.from_pretrained(inputs / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "bert")

    def embed(sentence: str) -> torch.Tensor:
        tokens = torch.tensor([tokenizer(sentence)["input_ids"]])
        with torch.no_grad():
            return model(input_ids=tokens).last_hidden_state[0].mean(0)

    question = embed(text)
    return torch.stack([torch.cosine_similarity(question, embed(label), dim=0) for label in labels])


def test_loss_and_answers_are_those_of_the_definition(settings: RunConfig, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    model, objective = load_model(settings, tasks)
    model.eval()  # the adapter's update is still zero
    items = [(task.instruction, record) for task in tasks for record in task.train[:2]]
    losses = []
    for task in tasks:
        for record in task.train[:2]:
            scores = cosine_scores(inputs, record.input, task.labels) / 0.05
            losses.append(-scores.log_softmax(0)[task.labels.index(record.output)])
    batch = objective.collate(items)
    assert objective.loss_terms(batch) == len(items)
    with torch.no_grad():
        torch.testing.assert_close(objective.loss(model, batch), torch.stack(losses).mean())
    for task in tasks:
        expected = [
            task.labels[int(cosine_scores(inputs, record.input, task.labels).argmax())] for record in task.dev
        ]
        assert objective.predict(model, task) == expected


def test_a_text_that_questions_share_is_embedded_once(settings: RunConfig, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    model, objective = load_model(settings, tasks)
    record, other = tasks[0].train[0], tasks[0].train[1]
    posed = Record(tasks[1].name, record.id, record.input, tasks[1].labels[-1])
    items = [(tasks[0].instruction, record), (tasks[0].instruction, other), (tasks[1].instruction, posed)]
    batch = objective.collate(items)
    assert len(batch["input_ids"]) == 2
    with torch.no_grad():
        together = objective.answers(model, batch)
        for row, item in enumerate(items):
            alone = objective.answers(model, objective.collate([item]))
            logits = together.logits[row][together.logits[row] > -torch.inf]
            torch.testing.assert_close(logits, alone.logits[0])
            target = together.logits[row, together.targets[row]]
            torch.testing.assert_close(target, alone.logits[0, alone.targets[0]])


def test_an_encoder_learns_a_sequence(
    config: Callable[..., RunConfig], settings: RunConfig, tmp_path: Path
) -> None:
    training = {"steps": 80, "batch_size": 8, "learning_rate": 3e-3}
    same = {key: getattr(settings, key) for key in ("model", "architecture", "text")}
    metrics = go(config(**same, adapter=None, method="sequential", training=training), tmp_path)
    assert metrics["accuracy"][1][1] == 100
    assert metrics["accuracy"][2][2] >= metrics["initial"][2] + 25


def test_long_prompts_lose_their_middle(inputs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "bert")
    text = "good bad " * 60
    matching = LabelMatchingObjective(
        tokenizer, text=TextFormat("{input}", "{output}"), max_length=20, labels={"t": ["good"]}, batch_size=1
    )
    whole = tokenizer(text)["input_ids"]
    batch = matching.collate([("", Record("t", "1", text, "good"))])
    assert batch["input_ids"].tolist() == [whole[:4] + whole[-16:]]


def test_an_answer_outside_the_labels_is_refused(settings: RunConfig, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    _, objective = load_model(settings, tasks)
    with pytest.raises(ValueError, match="'blue' is not among its labels"):
        objective.collate([("", Record(tasks[0].name, "7", "text", "blue"))])


def test_a_language_model_is_refused_as_an_encoder(settings: RunConfig, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture is 'causal', but that of the config is 'encoder'"):
        go(settings.model_copy(update={"model": str(inputs / "model")}), tmp_path)


def test_settings_invalid_for_an_encoder_are_refused(settings: RunConfig, tmp_path: Path) -> None:
    content = settings.model_dump()
    with pytest.raises(ValidationError, match=r"evaluation\.scoring: an encoder cannot generate"):
        RunConfig.model_validate(content | {"evaluation": {"scoring": "generation"}})
    long = RunConfig.model_validate(content | {"text": content["text"] | {"max_length": 2000}})
    with pytest.raises(ValueError, match=r"text\.max_length 2000: the model reads 512 tokens at most"):
        go(long, tmp_path)


def test_nan_embeddings_are_an_error(settings: RunConfig, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    model, objective = load_model(settings, tasks)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"NaN for record .* of task '{TASKS[0]}'"):
        objective.predict(model, tasks[0])
