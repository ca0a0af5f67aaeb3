"""The methods by which a model learns one task after another: one file each."""

from rkif.continual.methods.recurrent_kif import RecurrentKIF
from rkif.continual.methods.replay import Replay
from rkif.continual.methods.sequential import Context, Sequential

METHODS: dict[str, type[Sequential]] = {
    "sequential": Sequential,
    "replay": Replay,
    "recurrent_kif": RecurrentKIF,
}

__all__ = ["METHODS", "Context", "RecurrentKIF", "Replay", "Sequential"]
