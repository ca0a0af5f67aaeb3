"""A learner: an optimizer over the trainable parameters, and the step it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item
from rkif.fuser.parameters import trainable_parameters


class Learner:
    """AdamW over a model's trainable parameters.

    The inner and the outer learner are two of these over the same parameters: neither sees the other's
    moments or learning rate.

    Attributes:
        parameters: name -> trainable parameter.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: RunConfig, *, learning_rate: float
    ) -> None:
        self._model = model
        self._objective = objective
        self._config = config
        self._learning_rate = learning_rate
        self.parameters = trainable_parameters(model)
        self.reset()

    def reset(self) -> None:
        """Forget the optimizer's moments."""
        decay = self._config.training.weight_decay
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self._learning_rate, weight_decay=decay
        )

    def step(
        self,
        items: Sequence[Item],
        *,
        lr_fraction: float,
        seed: int,
        before_clip: Callable[[], None] | None = None,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> float:
        """Take one optimizer step on the mean loss of a batch.

        Args:
            items: the batch. Micro-batches change its gradient by rounding at most.
            lr_fraction: the schedule's share of the learning rate.
            seed: of everything random in the step (dropout). A step is thus a function of the parameters,
                the optimizer's state and the arguments, and a resumed run needs no generator's state.
            before_clip: called when the batch's gradient is there: a penalty of the loss adds its own.
            before_step: called when the gradient is final: accumulated and clipped.
            after_step: called when the step has been taken, with the same gradient.

        Returns:
            The loss.
        """
        total = self.gradient(items, seed=seed)
        if before_clip is not None:
            before_clip()
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.training.max_grad_norm)
        if before_step is not None:
            before_step()
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * lr_fraction
        # A step on what is not finite would leave the moments so for good, whatever the fusion then does.
        if norm.isfinite():
            self._optimizer.step()
        if after_step is not None:
            after_step()
        self._optimizer.zero_grad()
        return total

    def gradient(self, items: Sequence[Item], *, seed: int) -> float:
        """Leave the gradient of a batch's mean loss in the parameters; returns the loss."""
        size = self._config.training.micro_batch_size or len(items)
        objective = self._objective
        batches = [objective.collate(items[start : start + size]) for start in range(0, len(items), size)]
        weights = [objective.loss_terms(batch) for batch in batches]
        torch.manual_seed(seed)
        self._model.train()
        device = next(iter(self.parameters.values())).device
        total = 0.0
        for batch, weight in zip(batches, weights, strict=True):
            with autocast(self._config):
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                # A mean over the whole batch's terms, not one of the micro-batches' means.
                loss = objective.loss(self._model, inputs) * (weight / sum(weights))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, "parameter's position.key" -> tensor."""
        state = self._optimizer.state_dict()["state"]
        return {f"{index}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that :meth:`tensors` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
