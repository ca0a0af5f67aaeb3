"""Requirements of training with a replay memory in a Trainer, checked before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

if TYPE_CHECKING:
    from rkif.hf.trainer import RKIFMixin


# Methods of trl's trainers that generate their batches: completions of the model for groups of one prompt,
# which are kept in a buffer over several steps.
_GENERATING = {"_prepare_inputs", "get_train_dataloader", "_generate"}
# A method of copies of these trainers in other libraries.
_COPIED = {"_generate_and_score_completions"}


def require_given_batches(kind: type[Trainer]) -> None:
    """Check that trainers of this class train on the samples of their dataset.

    Raises:
        ValueError: it generates its batches, as GRPO and RLOO do.
    """
    for base in kind.__mro__:
        ours = base is Trainer or not issubclass(base, Trainer)
        of_trl = base.__module__.partition(".")[0] == "trl"
        if not ours and vars(base).keys() & (_GENERATING if of_trl else _COPIED):
            raise ValueError(
                f"{base.__name__} cannot have a memory_dataset: it generates completions for groups of one "
                "prompt and buffers them over steps. Groups of the outer learner would mix prompts, "
                "and both learners would share the buffer. Train without a memory"
            )


def require_separate_steps(optim: str) -> None:
    """Check that the optimizer steps after the backward pass, and keeps no second copy of the weights.

    Args:
        optim: ``TrainingArguments.optim``.

    Raises:
        ValueError: it steps within the backward pass, or keeps a second sequence of weights.
    """
    optim, reason = str(OptimizerNames(optim).value), None
    if optim.endswith("_layerwise") or optim in ("lomo", "adalomo"):
        reason = "steps within the backward pass, so there are no gradients to observe"
    elif optim.startswith("schedule_free"):
        reason = "keeps a second sequence of weights, which a fusion would not change"
    if reason:
        raise ValueError(f"optim={optim!r} cannot be used with a memory_dataset: it {reason}")


def require_single_samples(trainer: RKIFMixin) -> None:
    """Check that the loss of a sample does not depend on its neighbours in the dataset.

    Raises:
        ValueError: it does, such as with the KL divergence of trl's KTO. The memory is drawn in random order.
    """
    if getattr(trainer, "calculate_KL", False):
        raise ValueError(
            f"{type(trainer).__name__} with loss_type={trainer.args.loss_type!r} pairs neighbouring samples, "
            "and a memory_dataset is drawn in random order: use loss_type='apo_zero_unpaired'"
        )


def require_constant_ranks(model: Any) -> None:
    """Check that no adapter of the model prunes ranks during training.

    Raises:
        ValueError: an AdaLoRA adapter does. A fusion of weights from before and after the pruning restores
            pruned ranks, which the saved adapter does not have.
    """
    for config in getattr(model, "peft_config", {}).values():
        ranks = getattr(config, "init_r", 0), getattr(config, "target_r", 0)
        if config.peft_type == "ADALORA" and ranks[0] != ranks[1]:
            raise ValueError(
                f"AdaLoRA prunes ranks from init_r={ranks[0]} to target_r={ranks[1]}, and fusions undo "
                "it: with a memory_dataset use the same rank for both, or LoRA"
            )


def require_gradients(trainer: RKIFMixin) -> None:
    """Check that the gradients of a step will be in ``grad`` of the parameters that the step changes.

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
