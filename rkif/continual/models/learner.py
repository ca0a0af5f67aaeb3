"""A learner: an optimizer over the trainable parameters, and its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.models.device import autocast
from rkif.continual.models.objective import Objective
from rkif.continual.tasks.records import Item
from rkif.fuser import Fuser
from rkif.fuser.parameters import trainable_parameters
from rkif.optim import AdamW


class BatchLearner:
    """AdamW over a model's trainable parameters.

    The inner and the outer learner are two objects over the same parameters, with separate moments and
    learning rates.

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
        self._fuser: Fuser | None = None
        self.reset()

    def follow(self, fuser: Fuser) -> bool:
        """Make the optimizer's step update the importance of ``fuser``, if the optimizer supports it.

        Returns:
            Whether it does; if not, the caller must call ``fuser.observe()`` before each step.
        """
        if not isinstance(self._optimizer, AdamW):
            return False
        self._fuser = self._optimizer.fuser = fuser
        return True

    def reset(self) -> None:
        """Reset the optimizer's moments."""
        parameters, rate = self.parameters.values(), self._learning_rate
        decay = self._config.training.weight_decay
        self._optimizer: torch.optim.Optimizer
        if self._config.training.optimizer == "rkif_adamw":
            self._optimizer = AdamW(parameters, lr=rate, weight_decay=decay, fuser=self._fuser)
        else:
            self._optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)

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
            items: the batch. Splitting it into micro-batches changes the gradient by rounding only.
            lr_fraction: the schedule's factor of the learning rate.
            seed: seed of dropout. A step is a function of the parameters, the optimizer's state and the
                arguments, so a resumed run needs no generator state.
            before_clip: called after the gradient is accumulated; a penalty may add its gradient.
            before_step: called after the gradient is clipped.
            after_step: called after the optimizer step, before the gradient is cleared.

        Returns:
            The mean loss of the batch.
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
        # A step with a gradient that is not finite would make the moments NaN for the rest of the task.
        if norm.isfinite():
            self._optimizer.step()
        elif isinstance(self._optimizer, AdamW) and self._fuser is not None:
            self._optimizer.observe()
        if after_step is not None:
            after_step()
        self._optimizer.zero_grad()
        return total

    def gradient(self, items: Sequence[Item], *, seed: int) -> float:
        """Accumulate the gradient of a batch's mean loss in ``grad``; return the loss."""
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
                # The mean over all terms of the batch, not the mean of the micro-batches' means.
                loss = objective.loss(self._model, inputs) * (weight / sum(weights))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state: "INDEX.KEY" -> tensor, with the index of the parameter."""
        state = self._optimizer.state_dict()["state"]
        return {f"{index}.{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that :meth:`tensors` returned."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
