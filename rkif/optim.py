"""An optimizer whose step also updates the importance of the parameters, in one pass over memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkif.distributed.shards import to_local, to_local_like
from rkif.fuser import Fuser
from rkif.fuser.importance import Importance
from rkif.fuser.outside_graph import outside_graph
from rkif_kernels import PARAMETER_DTYPES, STATE_DTYPES, adamw_, adamw_constants

# The other keys of torch.optim.AdamW's groups, so that each optimizer loads the other's state.
_OFF = {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}
_KEYS = {**_OFF, "foreach": None, "fused": None, "decoupled_weight_decay": True}
_SETTINGS = ("lr", "betas", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Call(NamedTuple):
    """What parameters need to have in common to be stepped by one operation."""

    device: torch.device
    group: int
    step: int


class AdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` (Loshchilov & Hutter, 2019) whose step also observes for a fuser.

    With a fuser, ``optimizer.step()`` replaces ``fuser.observe(); optimizer.step()``. The importance is
    that of the weights before the step, bit for bit; the gradients must be final (accumulated, unscaled,
    clipped). Importance and step share one pass over memory, which moves 44 bytes per float32 element instead
    of 24 + 28. Give the inner and the outer optimizer the same fuser. Its phase determines the learner. ::

        fuser = rkif.Fuser(model, config)
        optimizer = rkif.optim.AdamW(model.parameters(), lr=1e-4, fuser=fuser)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    A step observes every parameter of the fuser, including parameters of other optimizers. A missing
    gradient counts as zero for the importance; the parameter is not stepped. Parameters outside the fuser
    are only stepped.

    Moments are float32 (``state_dtype``) for every dtype of the parameters. Arithmetic is float32 with one
    rounding at each store (see :func:`rkif_kernels.adamw_`). Weights differ from those of
    ``torch.optim.AdamW`` by rounding: docs/reference/kernels.md states the bound. Each optimizer loads the
    other's state dict. Sharded parameters (DTensor) have sharded moments. A ``GradScaler`` works as usual: a
    step that it skips is not observed. ``amsgrad``, ``maximize``, ``capturable``,
    ``differentiable``, a tensor as learning rate, and sparse gradients are refused.

    Args:
        params: parameters (float32, bfloat16 or float16) or groups of them, as for every optimizer.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; decay is decoupled.
        fuser: its importance is updated by a step; can be set later as ``optimizer.fuser``.
        state_dtype: dtype of the moments, torch.float32 or torch.bfloat16.

    Raises:
        TypeError, ValueError: a setting, a group or a parameter is not as described.
    """

    _fuser: Fuser | None = None
    state_dtype: torch.dtype = torch.float32

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fuser: Fuser | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16; got {state_dtype!r}")
        self.state_dtype = state_dtype
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, **_KEYS})
        self.fuser = fuser

    @property
    def fuser(self) -> Fuser | None:
        """The fuser whose importance a step updates, or None."""
        return self._fuser

    @fuser.setter
    def fuser(self, fuser: Fuser | None) -> None:
        if fuser is not None:
            if not isinstance(fuser, Fuser):
                raise TypeError(f"fuser must be a Fuser; got {type(fuser).__name__}")
            ids = {id(parameter) for group in self.param_groups for parameter in group["params"]}
            if ids.isdisjoint(map(id, fuser.parameters.values())):
                raise ValueError("fuser has none of this optimizer's parameters")
        self._fuser = fuser

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in every optimizer.

        Raises:
            TypeError, ValueError: a setting or a dtype is not supported. Nothing has been added then.
        """
        merged = {**self.defaults, **param_group}
        _require_supported(merged)
        adamw_constants(**{name: merged[name] for name in _SETTINGS}, step=1)
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        for entry in given:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and parameter.dtype not in PARAMETER_DTYPES:
                raise TypeError(
                    f"params has dtype {parameter.dtype}; supported: float32, bfloat16 and float16"
                )
        super().add_param_group({**param_group, "params": given})

    @outside_graph
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; with a fuser, update the importance as well.

        Args:
            closure: recomputes the loss and the gradients; its result is returned.

        Raises:
            RuntimeError: another observer has observed in this phase (see :meth:`rkif.Fuser.observe`), or a
                CUDA graph is being captured, of which the step's number would be a constant.
            TypeError, ValueError: a gradient is sparse, or a group's settings are out of range. Nothing has
                been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._calls()
        followed: set[int] = set()
        if self._fuser is not None:
            followed = {id(parameter) for parameter in self._fuser.parameters.values()}
            self._fuser.observe_with(self, partial(self._observe_and_step, calls))
        for call, parameters in calls.items():
            if alone := [parameter for parameter in parameters if id(parameter) not in followed]:
                gradients = [to_local_like(parameter.grad, parameter) for parameter in alone]  # type: ignore[arg-type]
                self._run(call, alone, [to_local(parameter) for parameter in alone], gradients)
        if calls:
            stepped = [parameter for parameters in calls.values() for parameter in parameters]
            torch._foreach_add_([self.state[parameter]["step"] for parameter in stepped], 1)
        return loss

    def observe(self) -> None:
        """Update the importance without a step, for example if gradients are not finite.

        Raises:
            RuntimeError: there is no fuser; or as in :meth:`rkif.Fuser.observe`.
        """
        if self._fuser is None:
            raise RuntimeError("observe() needs a fuser; this optimizer has none")
        self._fuser.observe_with(self, Importance.update)

    def _observe_and_step(
        self,
        calls: Mapping[_Call, Sequence[Tensor]],
        importance: Importance,
        parts: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        nonfinite: Tensor,
        indices: Sequence[int],
        *,
        frozen: bool,
    ) -> None:
        """As :meth:`Importance.update`, and step the parameters of ``calls`` in the same pass."""
        assert self._fuser is not None
        parameters = list(self._fuser.parameters.values())
        call_of = {id(parameter): call for call, those in calls.items() for parameter in those}
        together: dict[_Call | None, list[int]] = defaultdict(list)
        for index in indices:
            together[call_of.get(id(parameters[index]))].append(index)
        if others := together.pop(None, None):
            importance.update(parts, gradients, nonfinite, others, frozen=frozen)
        for call, here in together.items():
            assert call is not None
            self._run(
                call,
                [parameters[index] for index in here],
                [parts[index] for index in here],
                [gradients[index] for index in here],
                nonfinite=nonfinite,
                **importance.update_arguments(here, frozen=frozen),
            )

    def _run(
        self,
        call: _Call,
        parameters: Sequence[Tensor],
        parts: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        **importance: Any,
    ) -> None:
        """Step ``parameters``, whose local parts are ``parts``, by one operation."""
        states = [self._state_of(parameter) for parameter in parameters]
        exp_avg, exp_avg_sq = ([to_local(state[moment]) for state in states] for moment in _MOMENTS)
        group = self.param_groups[call.group]
        settings = {name: group[name] for name in _SETTINGS}
        adamw_(parts, gradients, exp_avg, exp_avg_sq, **settings, step=call.step, **importance)  # type: ignore[arg-type]

    def _calls(self) -> dict[_Call, list[Tensor]]:
        """The parameters with a gradient, grouped by operation."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "rkif.optim.AdamW.step() was called while a CUDA graph is captured: the step's number would "
                "be part of the graph; capture forward and backward, and step outside"
            )
        calls: dict[_Call, list[Tensor]] = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            settings = {name: group[name] for name in _SETTINGS}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout is not torch.strided or parameter.dtype not in PARAMETER_DTYPES:
                    raise TypeError(
                        f"param_groups[{index}] has a parameter of shape {tuple(parameter.shape)}, dtype "
                        f"{parameter.dtype}, with a gradient of layout {parameter.grad.layout}; "
                        "supported: float32, bfloat16 and float16 with dense gradients"
                    )
                state = self.state.get(parameter)
                step = 1 + int(state["step"]) if state else 1
                call = _Call(parameter.device, index, step)
                if call not in calls:
                    adamw_constants(**settings, step=step)  # refuses settings before anything is written
                calls[call].append(parameter)
        return calls

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(
                    parameter,
                    dtype=self.state_dtype,
                    memory_format=torch.contiguous_format,
                    requires_grad=False,
                )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of ``torch.optim.AdamW``; moments get ``state_dtype``.

        Raises:
            ValueError: the state has other groups or unsupported features. Nothing has been changed then.
        """
        for group in state_dict["param_groups"]:
            _require_supported(group)
        super().load_state_dict(state_dict)
        # PyTorch has cast the moments to the parameters' dtype, or shares them with the caller.
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(indices, parameters, strict=True):
            if index in state_dict["state"]:
                self.state[parameter] = self._converted(state_dict["state"][index], parameter.device)

    def _converted(self, state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        step = torch.as_tensor(state["step"]).to("cpu", torch.float32, copy=True)
        moments = {
            moment: state[moment]
            .detach()
            .to(device, self.state_dtype, copy=True, memory_format=torch.contiguous_format)
            for moment in _MOMENTS
        }
        return {"step": step, **moments}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state_dtype": self.state_dtype}


def _require_supported(group: Mapping[str, Any]) -> None:
    for name in _OFF:
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r} is not supported; use torch.optim.AdamW and observe()")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay=False is Adam's weight decay; this is AdamW")
