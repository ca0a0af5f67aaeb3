"""Loads the model and the tokenizer of a run, and adds the adapter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.models.device import run_device
from rkif.continual.models.label_matching import LabelMatchingObjective
from rkif.continual.models.objective import GenerativeObjective, Objective
from rkif.continual.tasks.records import Task
from rkif.continual.tasks.text import TextCollator, TextFormat
from rkif.seeding import derive_seed


def load_model(config: RunConfig, tasks: Sequence[Task], *, slices: int = 1) -> tuple[nn.Module, Objective]:
    """Load the model and its tokenizer, add the adapter, and make the objective.

    The adapter's rank is ``slices`` times the config's. Its initial values depend on the run's seed only.

    Raises:
        ImportError: transformers or peft is not installed.
        ValueError: the model cannot be loaded, or lacks modules that the adapter's settings name.
    """
    transformers = require_transformers(adapter=config.adapter is not None)
    is_path = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if is_path and not Path(config.model).is_dir():
        raise ValueError(f"model: no such folder: {config.model}")

    # The run has its own progress bars.
    transformers.utils.logging.disable_progress_bar()
    # The hub's client warns of every attempt to reach it. The error after the last one has the cause.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if config.architecture == "encoder":
        # transformers would warn about missing weights of the pooler, which is not used.
        transformers.utils.logging.set_verbosity_error()
    kind = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModel,
    }[config.architecture]
    # On CPUs fused attention is slow in bfloat16: a step of a small encoder takes twice as long.
    attention = "eager" if run_device(config).type == "cpu" and config.precision == "bfloat16" else None
    frozen = torch.bfloat16 if config.precision == "bfloat16" and config.adapter else torch.float32
    try:
        architecture = _architecture(transformers, config.model)
        if architecture != config.architecture:
            raise ValueError(
                f"its architecture is {architecture!r}, but that of the config is {config.architecture!r}; "
                f"set architecture: {architecture}"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        model: Any = kind.from_pretrained(config.model, dtype=frozen, attn_implementation=attention)
    except (OSError, ValueError, KeyError) as error:
        absent = isinstance(error, OSError) and not Path(config.model).exists()
        place = "there is no such folder, and as a name on the hub: " if absent else ""
        raise ValueError(f"model {config.model!r} cannot be loaded: {place}{_first_line(error)}") from error
    if config.architecture == "encoder":
        for name, parameter in model.named_parameters():
            # Answers are computed from token vectors: the pooler gets no gradient, and must not be fused.
            parameter.requires_grad_("pooler" not in name)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and config.text.max_length > limit:
            raise ValueError(
                f"text.max_length {config.text.max_length}: the model reads {limit} tokens at most"
            )
    with warnings.catch_warnings():
        # transformers is renaming these methods; all supported versions have the old names.
        warnings.simplefilter("ignore", FutureWarning)
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.adapter is not None:
            model = _with_adapter(model, config, slices)
    return model.to(run_device(config)), _objective(config, tokenizer, tasks)


def _objective(config: RunConfig, tokenizer: Any, tasks: Sequence[Task]) -> Objective:
    text, length = TextFormat(config.text.prompt, config.text.target), config.text.max_length
    if config.architecture == "encoder":
        labels = {task.name: task.labels for task in tasks}
        size = config.evaluation.batch_size
        return LabelMatchingObjective(tokenizer, text=text, max_length=length, labels=labels, batch_size=size)
    seq2seq = config.architecture == "seq2seq"
    return GenerativeObjective(
        TextCollator(tokenizer, seq2seq=seq2seq, max_length=length, text=text), config.evaluation
    )


def _architecture(transformers: Any, model: str) -> str:
    """The architecture in the model's config: "seq2seq", "causal" or "encoder"."""
    settings = transformers.AutoConfig.from_pretrained(model)
    if settings.is_encoder_decoder:
        return "seq2seq"
    causal = any("CausalLM" in name or "LMHead" in name for name in settings.architectures or ["CausalLM"])
    return "causal" if causal else "encoder"


def require_transformers(*, adapter: bool) -> Any:
    """Import transformers, and peft if an adapter is trained.

    Raises:
        ImportError: one of them is not installed; the message says how to install them.
    """
    try:
        import transformers

        if adapter:
            # peft imports bitsandbytes, if installed, which warns of a missing CPU kernel for 4-bit weights.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'running tasks needs transformers and peft: pip install ".[hf]" in the source folder of rkif'
        ) from error
    return transformers


def _with_adapter(model: Any, config: RunConfig, slices: int) -> Any:
    import peft

    assert config.adapter is not None
    targets = config.adapter.target_modules
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # peft accepts a list if only one of its modules exists.
    for target in targets if isinstance(targets, list) else []:
        if target.rpartition(".")[2] not in modules:
            layers = {
                name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, nn.Linear)
            }
            raise ValueError(
                f"adapter.target_modules: the model has no module {target!r}; its linear layers are "
                f"{', '.join(sorted(layers))}"
            )
    settings = peft.LoraConfig(
        r=config.adapter.r * slices,
        lora_alpha=config.adapter.alpha * slices,  # keeps the scale alpha / r
        lora_dropout=config.adapter.dropout,
        target_modules=targets,
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}[
            config.architecture
        ],
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "adapter"))
        try:
            model = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ValueError(f"adapter.target_modules {targets}: {_first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
