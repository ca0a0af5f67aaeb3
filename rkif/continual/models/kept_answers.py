"""The answers to memory records, kept from the end of their task (DER++, Buzzega et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.models.scoring import in_batches
from rkif.continual.tasks.records import Item
from rkif.continual.tasks.replay_memory import ReplayMemory
from rkif.fuser.state_names import flatten, section

TOP = 32  # maximum number of choices that are kept of a term: those with the largest logits


class KeptAnswers:
    """The largest logits of each term of a memory record's answer.

    An encoder's choices are the labels of the record's task. A language model's are tokens.

    Args:
        tensors: the result of :meth:`tensors` after the previous task; empty before the first.
        memory: the records of the tasks in ``tensors``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], memory: ReplayMemory) -> None:
        self._tensors = dict(tensors)
        self._answers: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        parts = {name: section(tensors, name) for name in ("terms", "logits", "choices")}
        for task, terms in parts["terms"].items():
            logits, choices = (
                torch.split(parts[name][task], terms.tolist()) for name in ("logits", "choices")
            )
            for record, *answer in zip(memory.ids[task], logits, choices, strict=True):
                self._answers[task, record] = (answer[0], answer[1])

    def add(
        self, model: nn.Module, objective: Objective, task: str, items: Sequence[Item], config: RunConfig
    ) -> None:
        """Keep the model's answers to a task's memory records, for :meth:`tensors`."""
        device = next(model.parameters()).device

        def answer(chunk: Sequence[Item]) -> list[tuple[Tensor, Tensor]]:
            batch = {name: tensor.to(device) for name, tensor in objective.collate(chunk).items()}
            with autocast(config):
                all_logits = objective.answers(model, batch).logits.float()
            logits, columns = all_logits.topk(min(TOP, all_logits.shape[-1]), -1)
            available = (all_logits > -torch.inf).cumsum(-1)
            choices = (available.gather(-1, columns) - 1).clamp_min(0)
            counts = torch.bincount(objective.term_items(batch), minlength=len(chunk)).tolist()
            parts = (torch.split(tensor.cpu(), counts) for tensor in (logits, choices))
            return list(zip(*parts, strict=True))

        answers = in_batches(model, items, config.evaluation.batch_size, answer)
        kept = {
            "terms": {task: torch.tensor([len(logits) for logits, _ in answers])},
            "logits": {task: torch.cat([logits for logits, _ in answers])},
            "choices": {task: torch.cat([choices for _, choices in answers])},
        }
        self._tensors |= flatten(kept)

    def of(self, items: Iterable[Item]) -> tuple[Tensor, Tensor]:
        """The answers to memory records, concatenated.

        Returns:
            Logits, float32, and choices, int64, both [terms, choices]. A term with fewer choices than another
            has the logit -inf and the choice 0 in the further columns.
        """
        answers = [self._answers[record.task, record.id] for _, record in items]
        width = max(logits.shape[1] for logits, _ in answers)

        def padded(parts: Iterable[Tensor], value: float) -> Tensor:
            pad = torch.nn.functional.pad
            return torch.cat([pad(part, (0, width - part.shape[1]), value=value) for part in parts])

        return padded((logits for logits, _ in answers), -torch.inf), padded((c for _, c in answers), 0)

    def tensors(self) -> dict[str, Tensor]:
        """ "terms.TASK": int64 [records], in the memory's order; "logits.TASK", "choices.TASK" [terms, k]."""
        return self._tensors


def chosen_logits(logits: Tensor, kept: Tensor, choices: Tensor) -> Tensor:
    """The logits of the kept choices.

    Args:
        logits: [terms, columns]; the choices of a term are its columns above -inf, counted from 0.
        kept: [terms, k]; -inf if a term has fewer choices.
        choices: int64 [terms, k].

    Returns:
        [terms, k]; -inf at the positions where ``kept`` is -inf.
    """
    unavailable = (logits == -torch.inf).to(torch.uint8)
    columns = choices
    if unavailable.any():
        columns = unavailable.argsort(dim=-1, stable=True).gather(-1, choices)
    return logits.gather(-1, columns).masked_fill(kept == -torch.inf, -torch.inf)
