"""A learner: an optimizer over the trainable parameters, and the step it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.model import autocast
from rkif.continual.tasks import Item
from rkif.continual.text import IGNORED, Encoder


class Learner:
    """AdamW over a model's trainable parameters.

    The inner and the outer learner are two of these over the same parameters: neither sees the other's
    moments or learning rate.
    """

    def __init__(
        self, model: nn.Module, encoder: Encoder, config: RunConfig, *, learning_rate: float
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._config = config
        self._learning_rate = learning_rate
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=learning_rate, weight_decay=config.training.weight_decay
        )

    def step(
        self,
        items: Sequence[Item],
        *,
        lr_fraction: float,
        seed: int,
        before_step: Callable[[], None] | None = None,
    ) -> float:
        """Take one optimizer step on the mean loss of all answer tokens in a batch.

        Args:
            items: the batch. Micro-batches change its gradient by rounding at most.
            lr_fraction: the schedule's share of the learning rate.
            seed: of everything random in the step (dropout). A step is thus a function of the parameters,
                the optimizer's state and the arguments, and a resumed run needs no generator's state.
            before_step: called when the gradient is final: accumulated and clipped.

        Returns:
            The loss.
        """
        training = self._config.training
        size = training.micro_batch_size or len(items)
        batches = [
            self._encoder.training_batch(items[start : start + size]) for start in range(0, len(items), size)
        ]
        tokens = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
        torch.manual_seed(seed)
        self._model.train()
        total = 0.0
        for batch, count in zip(batches, tokens, strict=True):
            with autocast(self._config):
                inputs = {name: tensor.to(self._parameters[0].device) for name, tensor in batch.items()}
                # The model's loss is a mean over a micro-batch's tokens; the batch's is one over all of them.
                loss = self._model(**inputs).loss * (count / sum(tokens))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, training.max_grad_norm)
        if before_step is not None:
            before_step()
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * lr_fraction
        # A step on what is not finite would leave the moments so for good, whatever the fusion then does.
        if norm.isfinite():
            self._optimizer.step()
        self._optimizer.zero_grad()
        return total

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
