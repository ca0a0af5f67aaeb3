"""The answers to memory records, kept from the end of their task.

After DER++ (Buzzega et al., NeurIPS 2020), which keeps the logits of the moment a record is stored, and
compares them by their squared difference. Here they are those at the end of the task, in a divergence.
"""

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
    """The largest logits of each term of a memory record's answer, and the mass of all other choices.

    An encoder's choices are the labels of the record's task. A language model's are tokens. The other choices
    are kept as one further choice, with the logit ``T * logsumexp(logits / T)`` for the temperature T. So a
    divergence from kept answers is at most the one from all answers, and not less than 0.

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
            columns = all_logits.topk(min(TOP, all_logits.shape[-1]), -1).indices
            logits = with_others(all_logits, columns, config.distillation.temperature)
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
            Logits, float32 [terms, 1 + k], the first of which is that of all other choices, and choices,
            int64 [terms, k]. A term with fewer choices than another has the logit -inf and the choice 0 in
            the further columns.
        """
        answers = [self._answers[record.task, record.id] for _, record in items]
        width = max(choices.shape[1] for _, choices in answers)

        def padded(part: Tensor, columns: int, value: float) -> Tensor:
            return torch.nn.functional.pad(part, (0, columns - part.shape[1]), value=value)

        logits = torch.cat([padded(part, 1 + width, -torch.inf) for part, _ in answers])
        return logits, torch.cat([padded(part, width, 0) for _, part in answers])

    def tensors(self) -> dict[str, Tensor]:
        """The number of terms of each record, and the logits and choices of all terms, in the memory's order.

        Returns:
            "terms.TASK", int64 [records]; "logits.TASK", float32 [terms, 1 + k]; "choices.TASK", int64
            [terms, k].
        """
        return self._tensors


def chosen_logits(logits: Tensor, kept: Tensor, choices: Tensor, temperature: float) -> Tensor:
    """The logits of the kept choices.

    Args:
        logits: [terms, columns]; the choices of a term are its columns above -inf, counted from 0.
        kept: [terms, 1 + k]; -inf if a term has fewer choices.
        choices: int64 [terms, k].
        temperature: that of the distillation.

    Returns:
        [terms, 1 + k]; -inf at the positions where ``kept`` is -inf.
    """
    unavailable = (logits == -torch.inf).to(torch.uint8)
    columns = choices
    if unavailable.any():
        columns = unavailable.argsort(dim=-1, stable=True).gather(-1, choices)
    return with_others(logits, columns, temperature).masked_fill(kept == -torch.inf, -torch.inf)


def with_others(logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """The logits of columns [terms, k] behind that of all other columns as one choice: [terms, 1 + k]."""
    # Not -inf: the gradient of the logsumexp of nothing is NaN.
    nothing = torch.finfo(torch.float32).min / 2
    others = logits.float().scatter(-1, columns, nothing).clamp_min(nothing)
    mass = temperature * torch.logsumexp(others / temperature, -1, keepdim=True)
    mass = mass.masked_fill(mass <= nothing / 2, -torch.inf)
    return torch.cat([mass, logits.float().gather(-1, columns)], -1)
