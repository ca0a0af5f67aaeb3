"""What a Trainer with a memory needs, checked before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

if TYPE_CHECKING:
    from rkif.hf.trainer import RKIFMixin


# Attributes of trl's trainers that make their own batches: they generate completions with the model, for
# groups of one prompt, and keep them in a buffer over several steps.
_GENERATING = {"_prepare_inputs", "get_train_dataloader", "_generate"}
# Of those of them that other libraries copy under their own names.
_COPIED = {"_generate_and_score_completions"}


def require_given_batches(kind: type[Trainer]) -> None:
    """Require that a trainer of this class learns from the samples that it is given.

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
    """Require an optimizer that steps after the gradients were observed, from the weights of the model.

    Args:
        optim: ``TrainingArguments.optim``.

    Raises:
        ValueError: it steps within the backward pass, or keeps another sequence of weights.
    """
    optim, reason = str(OptimizerNames(optim).value), None
    if optim.endswith("_layerwise") or optim in ("lomo", "adalomo"):
        reason = "steps within the backward pass, so there are no gradients to observe"
    elif optim.startswith("schedule_free"):
        reason = "keeps a second sequence of weights, which a fusion would not change"
    if reason:
        raise ValueError(f"optim={optim!r} cannot be used with a memory_dataset: it {reason}")


def require_single_samples(trainer: RKIFMixin) -> None:
    """Require that a sample's loss does not depend on its neighbours in a fixed order of the data.

    Raises:
        ValueError: it does, as the KL divergence of trl's KTO, which the memory's order would mix.
    """
    if getattr(trainer, "calculate_KL", False):
        raise ValueError(
            f"{type(trainer).__name__} with loss_type={trainer.args.loss_type!r} pairs neighbouring samples, "
            "and a memory_dataset is drawn in random order: use loss_type='apo_zero_unpaired'"
        )


def require_constant_ranks(model: Any) -> None:
    """Require that no adapter of the model prunes ranks during training.

    Raises:
        ValueError: an AdaLoRA adapter does. A fusion of weights from before and after the pruning restores
            what was pruned, and the saved adapter, which has the reduced ranks only, would differ.
    """
    for config in getattr(model, "peft_config", {}).values():
        ranks = getattr(config, "init_r", 0), getattr(config, "target_r", 0)
        if config.peft_type == "ADALORA" and ranks[0] != ranks[1]:
            raise ValueError(
                f"AdaLoRA prunes ranks from init_r={ranks[0]} to target_r={ranks[1]}, and fusions undo "
                "it: with a memory_dataset use the same rank for both, or LoRA"
            )


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
