"""The objective of sentence encoders: the answer is the label with the most similar embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, normalize

from rkif.continual.models.objective import Answers, Batch
from rkif.continual.models.scoring import in_batches
from rkif.continual.tasks.records import Item, Task
from rkif.continual.tasks.text import TextFormat, cut

TEMPERATURE = 0.05  # divides cosines; common in the training of sentence encoders


@dataclass
class LabelMatchingObjective:
    """Scores are the cosines between the mean token vectors of the question and of each label.

    One encoder embeds both, so one adapter serves every set of labels and no task needs a head. The loss is
    the cross-entropy of cosines divided by 0.05, over the labels of the record's task.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        text: prompt and target templates; the target's is filled with each label.
        max_length: maximum number of tokens of a question; the middle of a longer one is cut.
        labels: task name -> its labels, for every task whose records may occur.
        batch_size: questions per batch in prediction.
    """

    tokenizer: Any
    text: TextFormat
    max_length: int
    labels: Mapping[str, Sequence[str]]
    batch_size: int

    def collate(self, items: Sequence[Item]) -> Batch:
        """Tokenize the questions and the labels of their tasks. A text that several questions share is once.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 [texts, length]; ``text``, int64 [questions]: the row
            of the question's text; ``label_ids`` and ``label_mask``, int64 [labels, length]; ``allowed``,
            bool [questions, labels]: the label belongs to the question's task; ``target``, int64
            [questions]: the column of the right label.

        Raises:
            ValueError: a record's answer is not among its task's labels.
        """
        tasks = list(dict.fromkeys(record.task for _, record in items))
        columns = [(task, label) for task in tasks for label in self.labels[task]]
        for _, record in items:
            if (record.task, record.output) not in columns:
                raise ValueError(
                    f"record {record.id!r} of task {record.task!r}: {record.output!r} is not among its labels"
                )
        texts = self._texts(items)
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        answers = self._answers([label for _, label in columns])
        return {
            **self._questions(list(rows)),
            "text": torch.tensor([rows[text] for text in texts]),
            "label_ids": answers["input_ids"],
            "label_mask": answers["attention_mask"],
            "allowed": torch.tensor([[task == record.task for task, _ in columns] for _, record in items]),
            "target": torch.tensor([columns.index((record.task, record.output)) for _, record in items]),
        }

    def loss_terms(self, batch: Batch) -> int:
        return len(batch["target"])

    def term_items(self, batch: Batch) -> Tensor:
        return torch.arange(len(batch["target"]), device=batch["target"].device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        answers = self.answers(model, batch)
        return cross_entropy(answers.logits, answers.targets)

    def answers(self, model: Callable[..., Any], batch: Batch) -> Answers:
        texts = _embed(model, batch["input_ids"], batch["attention_mask"])
        labels = _embed(model, batch["label_ids"], batch["label_mask"])
        # The rows of the questions. Unlike that of index_select, its backward is deterministic on a GPU.
        scores = embedding(batch["text"], texts @ labels.T / TEMPERATURE)
        return Answers(scores.masked_fill(~batch["allowed"], -torch.inf), batch["target"])

    def predict(self, model: nn.Module, task: Task) -> list[str]:
        items = [(task.instruction, record) for record in task.dev]
        device = next(model.parameters()).device

        def embed(batch: Batch) -> Tensor:
            return _embed(model, *(batch[name].to(device) for name in ("input_ids", "attention_mask")))

        def most_similar(chunk: Sequence[Item]) -> list[str]:
            scores = embed(self._questions(self._texts(chunk))) @ embed(self._answers(task.labels)).T
            for (_, record), bad in zip(chunk, scores.isnan().any(1).tolist(), strict=True):
                if bad:
                    raise ValueError(f"model gives NaN for record {record.id!r} of task {record.task!r}")
            return [task.labels[i] for i in scores.argmax(1).tolist()]

        return in_batches(model, items, self.batch_size, most_similar)

    def _texts(self, items: Sequence[Item]) -> list[str]:
        return [
            self.text.prompt.format(instruction=instruction, input=record.input)
            for instruction, record in items
        ]

    def _questions(self, texts: Sequence[str]) -> Batch:
        rows = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        return self._padded([cut(row, self.max_length) for row in rows])

    def _answers(self, labels: Sequence[str]) -> Batch:
        return self._padded([self.tokenizer(self.text.target.format(output=x))["input_ids"] for x in labels])

    def _padded(self, rows: list[list[int]]) -> Batch:
        return dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


def _embed(model: Callable[..., Any], ids: Tensor, mask: Tensor) -> Tensor:
    """The mean token vector of each text, scaled to length 1: float32 [texts, width]."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1)
    return normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
