"""The objective of a model: the loss of records, and the answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rkif.continual.config_evaluation import EvaluationSettings
from rkif.continual.models.scoring import predict_by_generation, predict_by_likelihood
from rkif.continual.tasks.records import Item, Task
from rkif.continual.tasks.text import IGNORED, TextCollator

Batch = dict[str, Tensor]


class Answers(NamedTuple):
    """The logits of the terms of a loss.

    Attributes:
        logits: [terms, choices], with gradient; -inf for choices that a term does not have.
        targets: int64 [terms]: the right choice.
    """

    logits: Tensor
    targets: Tensor


class Objective(Protocol):
    """The loss of a batch and the answers to questions, for one architecture.

    Attributes:
        tokenizer: a Hugging Face tokenizer, saved beside the model.
    """

    tokenizer: Any

    def collate(self, items: Sequence[Item]) -> Batch:
        """The tensors of a training batch, on the CPU."""

    def loss_terms(self, batch: Batch) -> int:
        """The number of terms in the mean that :meth:`loss` computes."""

    def term_items(self, batch: Batch) -> Tensor:
        """The position of each term's item in the batch: int64 [terms]."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch on the model's device: a scalar with gradient."""

    def answers(self, model: Callable[..., Any], batch: Batch) -> Answers:
        """The logits whose mean cross-entropy is the loss of a batch.

        Args:
            model: the model, or a function with its keyword arguments.
            batch: tensors on the model's device.
        """

    def predict(self, model: nn.Module, task: Task) -> list[str]:
        """The answers to a task's dev records.

        Raises:
            ValueError: answers are chosen among labels, and the task has none.
        """


class GenerativeObjective:
    """The objective of language models: cross-entropy over the tokens of the answer and EOS."""

    def __init__(self, collator: TextCollator, settings: EvaluationSettings) -> None:
        self.tokenizer = collator.tokenizer
        self._collator = collator
        self._settings = settings

    def collate(self, items: Sequence[Item]) -> Batch:
        return self._collator.training_batch(items)

    def loss_terms(self, batch: Batch) -> int:
        return len(self.term_items(batch))

    def term_items(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).nonzero()[:, 0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def answers(self, model: Callable[..., Any], batch: Batch) -> Answers:
        logits, labels = model(**batch).logits, batch["labels"]
        if not self._collator.seq2seq:  # a causal model's logits are those of the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        answered = labels != IGNORED
        return Answers(logits[answered], labels[answered])

    def predict(self, model: nn.Module, task: Task) -> list[str]:
        settings, collator = self._settings, self._collator
        items = [(task.instruction, record) for record in task.dev]
        size = settings.batch_size
        if settings.scoring == "generation":
            return predict_by_generation(
                model, collator, items, batch_size=size, max_new_tokens=settings.max_new_tokens
            )
        return predict_by_likelihood(model, collator, items, task.labels, batch_size=size)
