"""The methods of continual learning that ``rkif run`` compares: one file each."""

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

__all__ = ["METHODS", "Context", "RecurrentKIF", "Replay", "Sequential"]
