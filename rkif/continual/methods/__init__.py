"""The methods of continual learning that ``rkif run`` compares: one file each."""

from rkif.continual.config import RunConfig
from rkif.continual.config_fusion import PRESETS
from rkif.continual.methods.adaptive import Adaptive
from rkif.continual.methods.average import Average
from rkif.continual.methods.dare import Dare
from rkif.continual.methods.ewc import Ewc
from rkif.continual.methods.forever import Forever
from rkif.continual.methods.mer import Mer
from rkif.continual.methods.multi_task import MultiTask
from rkif.continual.methods.o_lora import OLora
from rkif.continual.methods.per_task import PerTask
from rkif.continual.methods.recurrent_kif import RecurrentKIF
from rkif.continual.methods.replay import Replay
from rkif.continual.methods.replay_equal_steps import ReplayEqualSteps
from rkif.continual.methods.sequential import Context, Sequential
from rkif.continual.methods.tasl import Tasl
from rkif.continual.methods.ties import Ties
from rkif.continual.spelling import did_you_mean

METHODS: dict[str, type[Sequential]] = {
    "sequential": Sequential,
    "replay": Replay,
    "replay_equal_steps": ReplayEqualSteps,
    "ewc": Ewc,
    "o_lora": OLora,
    "tasl": Tasl,
    "mer": Mer,
    "forever": Forever,
    "average": Average,
    "ties": Ties,
    "dare": Dare,
    "adaptive": Adaptive,
    "per_task": PerTask,
    "multi_task": MultiTask,
    "recurrent_kif": RecurrentKIF,
}

__all__ = ["METHODS", "Context", "RecurrentKIF", "Replay", "Sequential", "method_of"]


def method_of(config: RunConfig) -> type[Sequential]:
    """The config's method.

    Raises:
        ValueError: there is no such method, or it does not support the settings.
    """
    name = config.method
    if name in PRESETS:
        raise ValueError(f"method: {name!r} is a preset of recurrent_kif; set fusion.preset={name}")
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        hint = did_you_mean(name, METHODS)
        raise ValueError(f"method: must be {', '.join(others)} or {last}; got {name!r}{hint}")
    method = METHODS[name]
    method.require(config)
    if config.gate is not None and name != "recurrent_kif":
        raise ValueError(f"gate: only the fusions of recurrent_kif can be gated, not {name}")
    if config.distillation.used and (method.task_aware or method.needs_all_tasks):
        raise ValueError(f"distillation: method {name} has no model that learns task after task")
    if config.distillation.memory and not method.replays:
        raise ValueError(f"distillation.memory: method {name} does not train on memory records")
    return method
