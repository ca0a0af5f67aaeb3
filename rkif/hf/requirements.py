"""What a Trainer with a memory needs, checked before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkif.hf.trainer import RKIFMixin


def require_gradients(trainer: RKIFMixin) -> None:
    """Require that a step's gradients will be in ``grad`` of the parameters that it changes.

    Without a model, as before the first trial of a hyperparameter search, only the settings are checked.

    Raises:
        RuntimeError: DeepSpeed, FSDP1, nn.DataParallel, or a model on several devices of one process.
    """
    parameters = () if trainer.model is None else trainer.model.parameters()
    devices = sorted({str(parameter.device) for parameter in parameters})
    refused = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1 (set fsdp_config={'version': 2})": (
            trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
        ),
        f"nn.DataParallel on {trainer.args.n_gpu} GPUs": trainer.args.n_gpu > 1,
        f"a model on {', '.join(devices)}": len(devices) > 1,
    }
    if found := ", ".join(kind for kind, present in refused.items() if present):
        raise RuntimeError(f"a memory needs DDP, FSDP2 or one process on one device, found: {found}")
