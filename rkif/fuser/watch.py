"""Notices that a model no longer holds the parameters that a fuser follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from torch import Tensor, nn

_CAUSES = "an assignment, load_state_dict(assign=True), resize_token_embeddings() or the like"


class ParameterWatch:
    """The places of a model's parameters, with their dtypes and shapes when the watch began.

    Args:
        module: the model without wrappers; None if only its parameters are known. Then a replaced parameter
            cannot be noticed, but another dtype or shape is.
        parameters: name -> the parameters to watch. All places of a tied parameter are watched.
        reshard: called before a parameter counts as replaced: FSDP2 puts gathered parameters in the places of
            the sharded ones.
    """

    def __init__(
        self, module: nn.Module | None, parameters: Mapping[str, Tensor], reshard: Callable[[], None]
    ) -> None:
        self._reshard = reshard
        self._kinds = [(name, p, p.dtype, p.shape) for name, p in parameters.items()]
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        # A layer that is replaced still holds its old parameters. The watch does not keep a model alive.
        self._layers: list[tuple[ref[nn.Module], str, ref[nn.Module], str]] = []
        self._names = names
        for owner in () if module is None else module.modules():
            self._places += [
                (owner._parameters, k, p) for k, p in owner._parameters.items() if id(p) in names
            ]
            for key, child in owner._modules.items():
                inside = (names.get(id(p)) for p in (() if child is None else child.parameters()))
                if child is not None and (name := next(filter(None, inside), None)) is not None:
                    self._layers.append((ref(owner), key, ref(child), name))

    def require_held(self) -> None:
        """Check that the modules hold the watched parameters. It takes some 20 ns a parameter.

        Raises:
            RuntimeError: a parameter was replaced; it names the parameter.
        """
        if self._replaced():
            self._reshard()
            if replaced := self._replaced():
                raise RuntimeError(
                    f"parameter {self._names[id(replaced[0])]!r} of the model was replaced after the Fuser "
                    f"was made ({_CAUSES}); the Fuser would fuse the old tensor: make a new Fuser"
                )

    def require_unchanged(self) -> None:
        """Check the layers, dtypes and shapes as well.

        Raises:
            RuntimeError: a parameter, or a layer above it, was replaced, or has another dtype or shape; it
                names the parameter.
        """
        self.require_held()
        for owner, key, child, name in self._layers:
            if (parent := owner()) is not None:
                layer = parent._modules.get(key)
                if layer is None or layer is not child():
                    raise RuntimeError(
                        f"the layer of parameter {name!r} was replaced after the Fuser was made ({_CAUSES}); "
                        "the Fuser would fuse the old tensor: make a new Fuser"
                    )
        for name, parameter, dtype, shape in self._kinds:
            if parameter.dtype != dtype or parameter.shape != shape:
                raise RuntimeError(
                    f"parameter {name!r} had dtype {dtype} and shape {tuple(shape)} when the Fuser was made; "
                    f"now it has {parameter.dtype} and {tuple(parameter.shape)}: make a new Fuser"
                )

    def _replaced(self) -> list[Any]:
        return [parameter for held, key, parameter in self._places if held.get(key) is not parameter]
