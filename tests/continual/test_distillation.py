"""Distillation from the model before the task, compared with its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from run_inputs import TASKS, go, one_task
from torch import Tensor
from torch.nn.functional import cross_entropy

from rkif.continual.config import DistillationSettings, RunConfig
from rkif.continual.methods import METHODS, Replay
from rkif.continual.models.distillation import WEIGHTS, DistillingObjective, divergence, tasks_to_ask
from rkif.continual.models.load import load_model
from rkif.continual.tasks.load import load_tasks
from rkif.continual.tasks.records import Item

Config = Callable[..., RunConfig]
ARCHITECTURES = {"llama": ("model", "causal"), "t5": ("t5", "seq2seq"), "bert": ("bert", "encoder")}


@pytest.fixture(params=ARCHITECTURES)
def settings(request: pytest.FixtureRequest, config: Config, inputs: Path) -> Callable[..., RunConfig]:
    """A config of each architecture, without dropout; keywords change single settings."""
    folder, architecture = ARCHITECTURES[request.param]
    modules = {"llama": ["q_proj"], "t5": ["q"], "bert": ["query"]}[request.param]

    def make(**changes: object) -> RunConfig:
        same = {
            "model": str(inputs / folder),
            "architecture": architecture,
            "adapter": {"r": 4, "dropout": 0.0, "target_modules": modules},
            "method": "replay",
        }
        return config(**same | changes)

    return make


def started(settings: RunConfig, inputs: Path, steps: int = 0) -> tuple[Replay, DistillingObjective]:
    """Replay in its second task after some steps, and its objective."""
    method = one_task(settings, inputs, Replay)
    assert method.distilling is not None
    for module in method.context.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for step in range(steps):
        method.train_step(step)
    return method, method.distilling


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 3.0), (2.0, math.sqrt(3.0))])
def test_the_divergence_is_the_hand_computed_one(temperature: float, odds: float) -> None:
    before = torch.tensor([[0.0, math.log(3.0), -torch.inf], [1.0, 1.0, 1.0]])
    now = torch.tensor([[5.0, 5.0, -torch.inf], [2.0, 2.0, 2.0]])
    p = odds / (1 + odds)
    expected = temperature**2 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    torch.testing.assert_close(divergence(before, now, temperature), torch.tensor([expected, 0.0]))


def test_the_gradient_of_the_divergence_is_finite_and_zero_where_both_agree() -> None:
    before = torch.tensor([[0.0, 1.0, -torch.inf]])
    for now in (before.clone(), before + 3, torch.tensor([[4.0, -9.0, -torch.inf]])):
        now.requires_grad_()
        divergence(before, now, 1.0).sum().backward()
        assert now.grad is not None
        torch.testing.assert_close(now.grad, now.detach().softmax(1) - before.softmax(1))


def test_answers_have_the_loss(settings: Callable[..., RunConfig], inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    model, objective = load_model(settings(), tasks)
    model.eval()
    items = [(task.instruction, record) for task in tasks for record in task.train[:2]]
    batch = objective.collate(items)
    answers = objective.answers(model, batch)
    torch.testing.assert_close(cross_entropy(answers.logits, answers.targets), objective.loss(model, batch))
    terms = objective.term_items(batch)
    assert len(terms) == objective.loss_terms(batch) == len(answers.targets)
    # One item at a time gives the terms of that item.
    for place, item in enumerate(items):
        alone = objective.collate([item])
        expected = objective.answers(model, alone).targets if settings().architecture != "encoder" else None
        got = answers.targets[terms == place]
        assert expected is None or torch.equal(got, expected)
    assert set(terms.tolist()) == set(range(len(items)))


def test_the_loss_is_that_of_its_definition(settings: Callable[..., RunConfig], inputs: Path) -> None:
    weights = {"memory": 0.7, "inputs": 0.3, "temperature": 2.0}
    method, distilling = started(settings(distillation=weights), inputs, steps=3)
    model, plain = method.context.model, method.context.objective
    items = method.batch(5)
    assert {record.task for _, record in items} == set(TASKS[:2])
    batch = distilling.collate(items)
    now = {name: parameter.detach().clone() for name, parameter in method.inner.parameters.items()}
    asked = [*items, *distilling._questions(items)]

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        for name, parameter in method.inner.parameters.items():
            parameter.data.copy_(parameters[name])
        return plain.answers(model, plain.collate(asked)).logits.detach()

    old, new = logits(distilling.before), logits(now)
    assert not torch.equal(old, new)
    terms = plain.term_items(plain.collate(asked)).tolist()
    targets = plain.answers(model, plain.collate(asked)).targets
    total, count = 0.0, 0
    for term, item in enumerate(terms):
        if item < len(items):
            total += float(cross_entropy(new[term], targets[term]))
            count += 1
        weight = 0.3 if item >= len(items) else 0.7 if items[item][1].task == TASKS[0] else 0.0
        p, q = (side[term].div(2.0).softmax(0).double() for side in (old, new))
        kept = p > 0
        total += weight * 4.0 * float((p[kept] * (p[kept] / q[kept]).log()).sum())
    loss = distilling.loss(model, batch).detach()
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    assert distilling.loss_terms(batch) == count == plain.loss_terms(plain.collate(items))


def test_before_the_first_step_the_gradient_is_that_of_the_cross_entropy(
    settings: Callable[..., RunConfig], inputs: Path
) -> None:
    gradients = []
    for weights in ({"memory": 1.0, "inputs": 1.0}, {"memory": 1e-30}):
        method, _ = started(settings(distillation=weights), inputs)
        method.inner.gradient(method.batch(0), seed=0)
        gradients.append([p.grad.clone() for p in method.inner.parameters.values() if p.grad is not None])
    assert any(gradient.any() for gradient in gradients[0])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_questions_are_new_inputs_of_earlier_tasks(config: Config, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    _, objective = load_model(config(), tasks)
    distilling = DistillingObjective(objective, DistillationSettings(inputs=0.5), {}, tasks[:2], tasks[:2])
    new: list[Item] = [(tasks[2].instruction, record) for record in tasks[2].train]
    old: list[Item] = [(tasks[0].instruction, record) for record in tasks[0].train[:4]]
    questions = distilling._questions([*old, *new])
    assert [record.input for _, record in questions] == [record.input for _, record in new]
    assert questions == [question for item in new for question in distilling._questions([item])]
    labels = {task.name: task.labels for task in tasks[:2]}
    instructions = {task.name: task.instruction for task in tasks[:2]}
    drawn = {(record.task, record.output) for _, record in questions}
    assert drawn == {(task, label) for task in labels for label in labels[task]}
    assert all(instruction == instructions[record.task] for instruction, record in questions)
    weights = distilling.collate([*old, *new[:3]])[WEIGHTS]
    assert weights.tolist() == [[0.0] * 7 + [0.5] * 3, [1.0] * 7 + [0.0] * 3]


def test_an_input_is_a_question_of_as_many_earlier_tasks_as_there_are(config: Config, inputs: Path) -> None:
    tasks = load_tasks(inputs / "tasks", TASKS)
    _, objective = load_model(config(), tasks)
    item = (tasks[2].instruction, tasks[2].train[0])
    for asked, earlier, expected in ((1, 2, 1), (2, 2, 2), (9, 2, 2), (9, 1, 1), (None, 2, 2)):
        settings = DistillationSettings.model_validate({"inputs": 0.5, "questions": asked})
        distilling = DistillingObjective(objective, settings, {}, tasks[:earlier], tasks[:earlier])
        questions = [record for _, record in distilling._questions([item])]
        assert len({record.task for record in questions}) == len(questions) == expected
        assert all(record.output in tasks[TASKS.index(record.task)].labels for record in questions)
        # The divergences of all questions are added, each with the weight of the settings.
        weights = distilling.collate([item])[WEIGHTS]
        assert weights.tolist() == [[0.0] + [0.5] * expected, [1.0] + [0.0] * expected]


@pytest.mark.parametrize(
    ("labels", "instruction", "prompt", "asked"),
    [
        (("good", "bad"), "Judge.", "{input}", False),
        (("bad", "so so", "good"), "Judge.", "{input}", False),
        (("bad", "so so"), "Judge.", "{input}", True),
        ((), "Judge.", "{input}", True),
        # With the instruction in the prompt, the questions differ, unless the instructions are the same.
        (("good", "bad"), "Judge.", "{instruction}{input}", True),
        (("good", "bad"), None, "{instruction}{input}", False),
        (("bad", "so so"), None, "{instruction}{input}", True),
    ],
)
def test_the_same_question_with_two_of_the_same_labels_is_not_asked(
    inputs: Path, labels: tuple[str, ...], instruction: str | None, prompt: str, asked: bool
) -> None:
    review, other, task = load_tasks(inputs / "tasks", TASKS)
    assert review.labels == ("good", "bad")
    new = replace(task, labels=labels, instruction=instruction or review.instruction)
    assert tasks_to_ask([review, replace(other, labels=())], new, prompt) == [review] * asked


def test_a_record_is_no_question_if_no_earlier_task_is_asked(config: Config, inputs: Path) -> None:
    review, new = load_tasks(inputs / "tasks", [TASKS[0], TASKS[2]])
    _, objective = load_model(config(), [review, new])
    distilling = DistillingObjective(objective, DistillationSettings(inputs=0.5), {}, [review], [])
    assert distilling.collate([(new.instruction, new.train[0])])[WEIGHTS].tolist() == [[0.0], [1.0]]


def test_the_preset_rkif_distils_unless_the_config_says_otherwise(config: Config) -> None:
    fusion = {"preset": "rkif", "inner_steps": 3}
    both = DistillationSettings(memory=4.0, inputs=4.0)
    assert config(fusion=fusion).distillation == both
    assert config(fusion=fusion, distillation={"temperature": 2.0}).distillation.inputs == 4.0
    assert config(fusion=fusion, distillation={"memory": 0.0}).distillation.memory == 0.0
    written = config(fusion=fusion, distillation={"memory": 0.0, "inputs": 0.0})
    assert not written.distillation.used
    assert RunConfig.model_validate(written.model_dump()) == written
    assert not config(fusion=fusion, method="replay").distillation.used
    assert not config(fusion={"preset": "release"}).distillation.used
    with pytest.raises(ValidationError, match="distillation"):
        config(fusion=fusion, distillation=[1.0])


@pytest.mark.parametrize("weights", [{"memory": 50.0}, {"inputs": 50.0}])
def test_the_model_stays_closer_to_its_earlier_answers(
    config: Config, inputs: Path, weights: dict[str, float]
) -> None:
    def distance(weights: dict[str, float]) -> float:
        """The mean divergence of the earlier task's dev records after some steps."""
        method = one_task(config(method="replay", distillation=weights), inputs, Replay)
        for step in range(7):
            method.train_step(step)
        assert method.distilling is not None
        model, plain, task = method.context.model.eval(), method.context.objective, method.context.tasks[0]
        batch = plain.collate([(task.instruction, record) for record in task.dev])
        now = plain.answers(model, batch).logits
        for name, parameter in method.inner.parameters.items():
            parameter.data.copy_(method.distilling.before[name])
        return divergence(plain.answers(model, batch).logits, now, 1.0).mean().item()

    assert distance(weights) < 0.8 * distance({"memory": 1e-30})


def test_micro_batches_give_the_gradient_of_the_batch(
    settings: Callable[..., RunConfig], inputs: Path
) -> None:
    gradients = []
    for size in (None, 3):
        training = {"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "micro_batch_size": size}
        weights = {"memory": 1.0, "inputs": 1.0}
        method, distilling = started(settings(distillation=weights, training=training), inputs)
        for parameter in distilling.before.values():
            parameter += 0.05  # so that the divergences have gradients
        method.inner.gradient(method.batch(0), seed=0)
        gradients.append(torch.cat([p.grad.flatten() for p in method.inner.parameters.values()]))  # type: ignore[union-attr]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0, atol=1e-4 * float(gradients[0].abs().max())
    )


def test_the_first_task_is_not_distilled(config: Config, tmp_path: Path) -> None:
    for name, weights in (("plain", {}), ("distilled", {"memory": 1.0, "inputs": 1.0})):
        go(config(method="replay", distillation=weights), tmp_path / name)
    models = [
        (tmp_path / name / "tasks").glob("*-*/adapter_model.safetensors") for name in ("plain", "distilled")
    ]
    first, *later = [
        left.read_bytes() == right.read_bytes() for left, right in zip(*map(sorted, models), strict=True)
    ]
    assert first
    assert not any(later)


@pytest.mark.parametrize(
    "method", [name for name, one in METHODS.items() if one.task_aware or one.needs_all_tasks]
)
def test_methods_without_a_sequence_are_refused(config: Config, tmp_path: Path, method: str) -> None:
    with pytest.raises(
        ValueError, match=f"distillation: method {method} has no model that learns task after task"
    ):
        go(config(method=method, distillation={"inputs": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
