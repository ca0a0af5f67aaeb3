"""Distillation from the model before a task: on the memory, and on inputs of the new task.

On memory records this is a penalty like that of DER++ (Buzzega et al., NeurIPS 2020), with answers that are
computed again for each task, or kept from the end of their task. On inputs of the new task it is learning
without forgetting (Li and Hoiem, ECCV 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from rkif.continual.config import DistillationSettings
from rkif.continual.models.kept_answers import KeptAnswers, chosen_logits
from rkif.continual.models.objective import Answers, Batch, Objective
from rkif.continual.models.scoring import evaluating
from rkif.continual.tasks.records import Item, Task
from rkif.fuser.parameters import parameter_copies
from rkif.seeding import derive_seed

# Keys of a batch.
WEIGHTS = "distillation_weights"
KEPT, KEPT_LOGITS, KEPT_CHOICES = "kept", "kept_logits", "kept_choices"


class DistillingObjective:
    """Cross-entropy plus Kullback-Leibler divergences from the answers of the model before the task.

    The loss of a batch is the mean over its terms (answers, or tokens of answers) of::

        cross-entropy + memory * KL_memory + inputs * KL_inputs

    ``KL_memory`` is KL(before || now) on records of earlier tasks, over the answers of their task. For
    ``KL_inputs``, every record of the new task is also posed as a question of earlier tasks, which depend on
    its id: as many as ``settings.questions``, or all. It is the sum of the divergences of these questions,
    each over the answers of its task. Language models compare distributions of tokens, at the positions of
    the right answer of a memory record, or of a label drawn for the question.

    Args:
        objective: computes the logits.
        settings: the weights of both terms, and the temperature.
        parameters: name -> trainable parameter before the task; they are copied.
        earlier: the tasks learned before; at least one.
        asked: those of which new records are questions, see :func:`tasks_to_ask`.
        kept: the answers to memory records; None to compute them with the model before the task.

    Attributes:
        tokenizer: that of ``objective``.
        before: name -> trainable parameter before the task; empty if all answers are kept.
    """

    def __init__(
        self,
        objective: Objective,
        settings: DistillationSettings,
        parameters: Mapping[str, Tensor],
        earlier: Sequence[Task],
        asked: Sequence[Task],
        kept: KeptAnswers | None = None,
    ) -> None:
        self.tokenizer = objective.tokenizer
        self._objective = objective
        self._settings = settings
        self._names = {task.name for task in earlier}
        self._asked = asked
        self._kept = kept
        self.before = parameter_copies(parameters if settings.inputs or kept is None else {})

    def collate(self, items: Sequence[Item]) -> Batch:
        """The batch of the items, followed by their questions.

        Returns:
            The tensors of the objective's batch; and float32 [2, items + questions]: the weights of each
            item's divergence and of its cross-entropy. With kept answers also bool
            [items + questions], whether an item has them, and the result of :meth:`KeptAnswers.of` for these.
        """
        settings = self._settings
        questions = self._questions(items) if settings.inputs else []
        known = [record.task in self._names for _, record in items]
        weights = torch.tensor(
            [
                [settings.memory * old for old in known] + [settings.inputs] * len(questions),
                [1.0] * len(items) + [0.0] * len(questions),
            ]
        )
        batch = {**self._objective.collate([*items, *questions]), WEIGHTS: weights}
        if self._kept is not None and any(known):
            logits, choices = self._kept.of(item for item, old in zip(items, known, strict=True) if old)
            kept = torch.tensor([*known, *[False] * len(questions)])
            batch |= {KEPT: kept, KEPT_LOGITS: logits, KEPT_CHOICES: choices}
        return batch

    def loss_terms(self, batch: Batch) -> int:
        return int(batch[WEIGHTS][1, self.term_items(batch)].sum())

    def term_items(self, batch: Batch) -> Tensor:
        return self._objective.term_items(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        added = (WEIGHTS, KEPT, KEPT_LOGITS, KEPT_CHOICES)
        inputs = {name: tensor for name, tensor in batch.items() if name not in added}
        now = self._objective.answers(model, inputs)
        terms, temperature = self.term_items(inputs), self._settings.temperature
        distilled, trained = batch[WEIGHTS][:, terms]
        losses = cross_entropy(now.logits, now.targets, reduction="none")
        distances = torch.zeros_like(losses)
        kept = batch[KEPT][terms] if KEPT in batch else torch.zeros_like(terms, dtype=torch.bool)
        if self.before and distilled[~kept].any():  # other answers would have the weight 0
            with evaluating(model):
                before = self._objective.answers(partial(_call, model, self.before), inputs).logits
            distances = divergence(before, now.logits, temperature)
        if KEPT in batch:
            logits = chosen_logits(now.logits[kept], batch[KEPT_LOGITS], batch[KEPT_CHOICES], temperature)
            distances = distances.masked_scatter(kept, divergence(batch[KEPT_LOGITS], logits, temperature))
        loss: Tensor = (trained * losses + distilled * distances).sum() / trained.sum()
        return loss

    def answers(self, model: Callable[..., Any], batch: Batch) -> Answers:
        return self._objective.answers(model, batch)

    def predict(self, model: nn.Module, task: Task) -> list[str]:
        return self._objective.predict(model, task)

    def _questions(self, items: Sequence[Item]) -> list[Item]:
        """The new task's inputs as questions of earlier tasks, with answers drawn from their labels."""
        questions, tasks, most = [], self._asked, self._settings.questions
        for _, record in items:
            if record.task in self._names:
                continue
            drawn = derive_seed("question", record.task, record.id)
            for index in range(len(tasks) if most is None else min(most, len(tasks))):
                task = tasks[(drawn + index) % len(tasks)]
                label = task.labels[drawn // len(tasks) % len(task.labels)]
                questions.append((task.instruction, replace(record, task=task.name, output=label)))
        return questions


def tasks_to_ask(earlier: Sequence[Task], new: Task, prompt: str) -> list[Task]:
    """The earlier tasks of which records of the new task are posed as questions: those with labels.

    A task is left out if its question would be the same text as the new task's, and two labels are the same.
    Then the record's own answer decides between these labels, and a divergence would preserve the earlier
    decision.

    Args:
        earlier: the tasks learned before.
        new: the task that is learned.
        prompt: the template of a question, with {input} and perhaps {instruction}.
    """

    def conflicts(task: Task) -> bool:
        same_text = "{instruction}" not in prompt or task.instruction == new.instruction
        return same_text and len(set(task.labels) & set(new.labels)) >= 2

    return [task for task in earlier if task.labels and not conflicts(task)]


def divergence(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """KL(softmax(before / T) || softmax(now / T)) * T^2 of each row (Hinton et al., 2015, section 2).

    Args:
        before, now: logits [rows, choices]; -inf in both for choices that a row does not have.
        temperature: T, greater than 0.

    Returns:
        float32 [rows]; not negative, up to rounding.
    """
    old = torch.log_softmax(before.float() / temperature, -1)
    new = torch.log_softmax(now.float() / temperature, -1)
    return torch.where(old > -torch.inf, old.exp() * (old - new), 0.0).sum(-1) * temperature**2


def _call(model: nn.Module, parameters: Mapping[str, Tensor], **inputs: Tensor) -> Any:
    """The model's output with other parameters."""
    return functional_call(model, dict(parameters), (), inputs)
