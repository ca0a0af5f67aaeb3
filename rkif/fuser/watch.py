"""Detects that a model no longer holds the parameters that a fuser fuses, or has other trainable ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rkif.fuser.parameters import require_separate_memory
from rkif_kernels import Description, describe

_CAUSES = "for example by an assignment, load_state_dict(assign=True) or resize_token_embeddings()"


class ParameterWatch:
    """Compares a model's parameters with those at construction: their layers, dtypes, shapes and devices.

    Args:
        module: the model without wrappers; None if only its parameters are known. Then a replaced or added
            parameter is not detected, but another dtype, shape or device is.
        parameters: name -> the parameters to watch. All layers that hold a tied parameter are watched.
        reshard: called before a parameter counts as replaced, because FSDP2 replaces sharded parameters by
            gathered ones for a forward pass.

    Raises:
        RuntimeError: an adapter is merged; see :meth:`require_unmerged`.
    """

    def __init__(
        self, module: nn.Module | None, parameters: Mapping[str, Tensor], reshard: Callable[[], None]
    ) -> None:
        self._reshard = reshard
        self._parameters = parameters
        self._kinds = {name: _kind(parameter) for name, parameter in parameters.items()}
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        # Parent, key, child, and the name of a parameter in the child. A replaced layer still holds its old
        # parameters, so layers are compared as well. Weak references do not keep the model alive.
        self._layers: list[tuple[ref[nn.Module], str, ref[nn.Module], str]] = []
        # The layers of peft that can be merged: those with the attribute merged_adapters.
        self._adapters: list[tuple[ref[nn.Module], str]] = []
        self._names = names
        # Description of the tensors that passed the last full check, which takes 100 us per parameter.
        self._checked: Description | None = None
        self._model = None if module is None else ref(module)
        for owner in () if module is None else module.modules():
            self._places += [
                (owner._parameters, k, p) for k, p in owner._parameters.items() if id(p) in names
            ]
            if hasattr(owner, "merged_adapters"):
                inside = (names.get(id(p)) for p in owner.parameters())
                self._adapters += [(ref(owner), name) for name in islice(filter(None, inside), 1)]
            for key, child in owner._modules.items():
                inside = (names.get(id(p)) for p in (() if child is None else child.parameters()))
                if child is not None and (name := next(filter(None, inside), None)) is not None:
                    self._layers.append((ref(owner), key, ref(child), name))
        self.require_unmerged()

    def require_held(self, *, phase_begins: bool = False) -> None:
        """Check that the modules hold the watched parameters. It takes about 20 ns per parameter.

        Args:
            phase_begins: whether to check for merged adapters as well.

        Raises:
            RuntimeError: a parameter was replaced, or its adapter is merged; it names the parameter.
        """
        if phase_begins:
            self.require_unmerged()
        if self._replaced():
            self._reshard()
            if replaced := self._replaced():
                raise RuntimeError(self._message(*replaced[0]))

    def require_unmerged(self) -> None:
        """Check that no adapter with watched parameters is merged into its layer's weights.

        Raises:
            RuntimeError: an adapter is merged; it names a parameter.
        """
        for layer, name in self._adapters:
            if merged := getattr(layer(), "merged_adapters", None):
                raise RuntimeError(
                    f"adapter {merged[0]!r} is merged into the weights of the layer of parameter {name!r} "
                    "(merge_adapter()): call unmerge_adapter() first; after the round has changed the "
                    "adapter, it would subtract an update that was never added"
                )

    def require_same_trainable(self) -> None:
        """Check that no other parameter of the model is trainable. It takes about 2 us per layer.

        Raises:
            RuntimeError: another parameter is trainable now; it names the parameter.
        """
        model = None if self._model is None else self._model()
        present: Any = () if model is None else model.named_parameters()
        for name, parameter in present:
            if parameter.requires_grad and id(parameter) not in self._names:
                raise RuntimeError(
                    f"parameter {name!r} is trainable now, but was not when the Fuser was made; it would be "
                    "trained and never fused: make a new Fuser"
                )

    def require_unchanged(self, parts: Sequence[Tensor]) -> None:
        """Check everything: parameters, layers, merged adapters, dtypes, shapes, devices and memory.

        Args:
            parts: the parameters, or their local parts.

        Raises:
            RuntimeError: a parameter, or a layer above it, was replaced; its adapter is merged; or it has
                another dtype, shape or device. It names the parameter.
            ValueError: the memory of a parameter is freed, or shared with another one.
        """
        self.require_held(phase_begins=True)
        for owner, key, child, name in self._layers:
            if (parent := owner()) is not None:
                layer = parent._modules.get(key)
                if layer is None or layer is not child():
                    raise RuntimeError(
                        f"the layer of parameter {name!r} was replaced after the Fuser was made ({_CAUSES}); "
                        "the Fuser would fuse the old tensor: make a new Fuser"
                    )
        described = describe(parts)
        if described == self._checked:
            return
        for name, parameter in self._parameters.items():
            if (then := self._kinds[name]) != (now := _kind(parameter)):
                raise RuntimeError(
                    f"parameter {name!r} was {_words(then)} when the Fuser was made, and is {_words(now)} "
                    "now: make a new Fuser"
                )
        require_separate_memory(self._parameters)
        self._checked = described

    def _replaced(self) -> list[tuple[dict[str, Any], str, Any]]:
        return [place for place in self._places if place[0].get(place[1]) is not place[2]]

    def _message(self, held: dict[str, Any], key: str, parameter: Any) -> str:
        """The error message for a parameter that its layer no longer holds."""
        name, model = self._names[id(parameter)], None if self._model is None else self._model()
        layers: Any = () if model is None else model.modules()
        layer = next((layer for layer in layers if layer._parameters is held), None)
        if layer is not None and is_parametrized(layer, key):
            originals = ", ".join(
                f"parametrizations.{key}.{n}" for n in layer.parametrizations[key]._parameters
            )
            return (
                f"parameter {name!r} of the model was parametrized after the Fuser was made: its layer "
                f"computes it from {originals} now; make a new Fuser"
            )
        if held.get(key) is None:
            return (
                f"parameter {name!r} of the model was removed from its layer after the Fuser was made (for "
                "example by del, pruning or spectral_norm()); make a new Fuser"
            )
        return (
            f"parameter {name!r} of the model was replaced after the Fuser was made ({_CAUSES}); the Fuser "
            "would fuse the old tensor: make a new Fuser"
        )


def _kind(parameter: Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return parameter.dtype, parameter.shape, parameter.device


def _words(kind: tuple[torch.dtype, torch.Size, torch.device]) -> str:
    dtype, shape, device = kind
    return f"{dtype} {tuple(shape)} on {device}"
