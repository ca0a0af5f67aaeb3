"""Distillation from answers that were kept at the end of a record's task, compared with its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from pydantic import ValidationError
from run_inputs import TASKS, go, one_task, read_parameters
from safetensors.torch import load_file
from torch import Tensor, nn

from rkif.continual.config import DistillationSettings, RunConfig
from rkif.continual.methods import Replay
from rkif.continual.models import kept_answers
from rkif.continual.models.distillation import DistillingObjective, divergence
from rkif.continual.models.kept_answers import KeptAnswers, chosen_logits, with_others
from rkif.continual.models.objective import Answers, Objective
from rkif.continual.rundir.folder import task_folder
from rkif.continual.tasks.records import Item
from rkif.fuser.parameters import parameter_copies, trainable_parameters

Config = Callable[..., RunConfig]
KEPT = {"memory": 1.0, "answers": "kept"}
ARCHITECTURES = {
    "llama": {"model": "model", "architecture": "causal", "target_modules": ["q_proj"]},
    "t5": {"model": "t5", "architecture": "seq2seq", "target_modules": ["q"]},
    "bert": {"model": "bert", "architecture": "encoder", "target_modules": ["query"]},
}


def test_choices_are_columns_that_the_term_has() -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 1.0, -inf, 2.0], [3.0, -inf, 4.0, 5.0]])
    kept = torch.tensor([[-inf, 0.5, 0.1, -inf], [-inf, 0.3, 0.2, 0.1]])
    choices = torch.tensor([[1, 0, 0], [2, 0, 1]])
    assert chosen_logits(logits, kept, choices, 1.0).tolist() == [
        [-inf, 2.0, 1.0, -inf],
        [-inf, 5.0, 3.0, 4.0],
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_other_choices_are_one_choice_with_their_mass(temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -1.0]], requires_grad=True)
    got = chosen_logits(logits, torch.zeros(1, 3), torch.tensor([[2, 1]]), temperature)
    probabilities = (logits / temperature).softmax(1)[0]
    torch.testing.assert_close(
        (got / temperature).softmax(1)[0], torch.stack([probabilities[[0, 3]].sum(), *probabilities[[2, 1]]])
    )
    # All mass moves to a choice that was not kept.
    moved = torch.tensor([[30.0, 2.0, 3.0, -1.0]])
    after = chosen_logits(moved, got, torch.tensor([[2, 1]]), temperature)
    assert float(divergence(got, after, temperature).detach()) > 5
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_gradient_is_finite_if_no_choice_is_left() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0]], requires_grad=True)
    kept = with_others(logits.detach(), torch.tensor([[2, 0]]), 1.0)
    assert kept.tolist() == [[-torch.inf, 3.0, 1.0]]
    got = chosen_logits(logits, kept, torch.tensor([[1, 0]]), 1.0)
    divergence(kept + torch.tensor([[0.0, 1.0, 0.0]]), got, 1.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def started(config: Config, inputs: Path, name: str) -> tuple[Replay, KeptAnswers]:
    """Replay at the start of its second task, and the model's answers to the memory at this point."""
    folder, modules = str(inputs / ARCHITECTURES[name]["model"]), ARCHITECTURES[name]["target_modules"]
    settings = config(
        model=folder,
        architecture=ARCHITECTURES[name]["architecture"],
        adapter={"r": 4, "dropout": 0.0, "target_modules": modules},
        method="replay",
    )
    method = one_task(settings, inputs, Replay)
    for module in method.context.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    context = method.context
    kept = KeptAnswers({}, context.memory)
    kept.add(context.model, context.objective, TASKS[0], context.memory.by_task[TASKS[0]], settings)
    return method, KeptAnswers(kept.tensors(), context.memory)


@torch.no_grad()
def set_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def test_a_masked_vocabulary_gives_the_kept_logits_back(config: Config, inputs: Path) -> None:
    method, _ = started(config, inputs, "llama")
    context = method.context
    masked = nn.Module()
    masked.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    row = torch.tensor([[-torch.inf, 3.0, -torch.inf, 5.0, 4.0]])

    class Masked:
        """An objective whose every answer has one term, and some tokens of probability zero."""

        def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
            return {"rows": torch.arange(len(items))}

        def term_items(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["rows"]

        def answers(self, _: nn.Module, batch: dict[str, Tensor]) -> Answers:
            return Answers(row.repeat(len(batch["rows"]), 1), batch["rows"])

    kept, items = KeptAnswers({}, context.memory), context.memory.by_task[TASKS[0]]
    kept.add(masked, cast(Objective, Masked()), TASKS[0], items, context.config)
    logits, choices = KeptAnswers(kept.tensors(), context.memory).of(items[:1])
    assert logits.tolist() == [[-torch.inf, 5.0, 4.0, 3.0, -torch.inf, -torch.inf]]
    assert chosen_logits(row, logits, choices, 1.0).tolist() == logits.tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_answers_kept_give_the_loss_of_the_model_that_gave_them(
    config: Config, inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(kept_answers, "TOP", 10**6)
    method, kept = started(config, inputs, name)
    context, earlier = method.context, method.context.tasks[:1]
    parameters = trainable_parameters(context.model)
    answered = parameter_copies(parameters)
    generator = torch.Generator().manual_seed(0)
    learned = {key: value + torch.randn(value.shape, generator=generator) for key, value in answered.items()}
    for inputs_weight in (0.0, 0.5):
        set_values(parameters, answered)
        settings = {"memory": 1e3, "inputs": inputs_weight, "temperature": 1.5}
        asked = DistillingObjective(
            context.objective,
            DistillationSettings.model_validate(settings),
            parameters,
            earlier,
            earlier,
        )
        stored = DistillationSettings.model_validate(settings | {"answers": "kept"})
        remembering = DistillingObjective(context.objective, stored, parameters, earlier, earlier, kept)
        assert bool(remembering.before) == bool(inputs_weight)
        set_values(parameters, learned)
        items = method.batch(5)
        assert {record.task for _, record in items} == set(TASKS[:2])
        expected = asked.loss(context.model, asked.collate(items))
        plain = context.objective.loss(context.model, context.objective.collate(items))
        assert float(expected.detach()) > float(plain.detach()) + 1e-2
        got = remembering.loss(context.model, remembering.collate(items))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        new = [item for item in items if item[1].task != TASKS[0]]
        if not inputs_weight:  # a batch without memory records
            torch.testing.assert_close(
                remembering.loss(context.model, remembering.collate(new)),
                context.objective.loss(context.model, context.objective.collate(new)),
            )


def test_of_a_language_model_the_largest_logits_are_kept(
    config: Config, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_answers, "TOP", 3)
    method, kept = started(config, inputs, "llama")
    context = method.context
    items = context.memory.by_task[TASKS[0]]
    batch = context.objective.collate(items)
    with torch.no_grad():
        logits = context.objective.answers(context.model.eval(), batch).logits
    values, choices = kept.of(items)
    expected = logits.topk(3)
    torch.testing.assert_close(values[:, 1:], expected.values)
    torch.testing.assert_close(values.logsumexp(1), logits.logsumexp(1))
    assert torch.equal(choices, expected.indices)
    assert torch.equal(kept.of(items[1:2])[0], values[context.objective.term_items(batch) == 1])


def test_the_earlier_model_does_not_answer_what_is_kept(
    config: Config, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, kept = started(config, inputs, "llama")
    context = method.context
    settings = DistillationSettings.model_validate(KEPT | {"inputs": 1.0})
    parameters = trainable_parameters(context.model)
    earlier = context.tasks[:1]
    objective = DistillingObjective(context.objective, settings, parameters, earlier, earlier, kept)
    passes: list[int] = []
    answers = context.objective.answers
    monkeypatch.setattr(
        context.objective, "answers", lambda *given: passes.append(len(passes)) or answers(*given)
    )
    memory = list(context.memory.items[:2])
    objective.loss(context.model, objective.collate(memory))
    assert len(passes) == 1
    objective.loss(context.model, objective.collate([*memory, *method.records(0, 2)]))
    assert len(passes) == 3


def test_a_run_learns_from_the_kept_answers(config: Config, tmp_path: Path) -> None:
    for answers in ("kept", "before_task"):
        go(config(method="replay", distillation=KEPT | {"answers": answers}), tmp_path / answers)
    go(config(method="replay"), tmp_path / "without")
    ends = [read_parameters(tmp_path / name) for name in ("kept", "before_task", "without")]
    for one, other in itertools.combinations(ends, 2):
        assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("method", ["sequential", "ewc", "tasl"])
def test_methods_without_memory_steps_are_refused(config: Config, tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match=rf"distillation\.memory: method {method} does not train on memory"):
        go(config(method=method, distillation=KEPT), tmp_path / "run")


def test_a_run_hands_the_answers_on(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(config(method="replay", distillation=KEPT), out)
    for index, task in enumerate(TASKS):
        state = load_file(task_folder(out, index, task) / "handed_on.safetensors")
        assert {name for name in state if name.startswith("kept_answers.terms.")} == {
            f"kept_answers.terms.{earlier}" for earlier in TASKS[: index + 1]
        }
        assert all(len(tensor) > 0 for tensor in state.values())


def test_kept_answers_of_nothing_are_refused(config: Config) -> None:
    with pytest.raises(ValidationError, match=r"answers: kept needs distillation\.memory above 0; it is 0"):
        config(distillation={"answers": "kept", "inputs": 1.0})
