"""The language model of a run, and what of it is trained."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkif.continual.config import RunConfig
from rkif.continual.text import Encoder, TextFormat
from rkif.seeding import derive_seed


def build(config: RunConfig) -> tuple[nn.Module, Encoder]:
    """Load the model and its tokenizer, and put the adapter on.

    The adapter's initial values depend on the run's seed alone.

    Raises:
        ImportError: transformers or peft is not installed.
        ValueError: the model cannot be loaded, or lacks the modules that the adapter is for.
    """
    transformers = require_transformers()
    is_path = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if is_path and not Path(config.model).is_dir():
        raise ValueError(f"model: no such folder: {config.model}")

    # The run has a progress display of its own.
    transformers.utils.logging.disable_progress_bar()
    kind = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[config.architecture]
    frozen = torch.bfloat16 if config.precision == "bfloat16" and config.adapter else torch.float32
    try:
        seq2seq = bool(transformers.AutoConfig.from_pretrained(config.model).is_encoder_decoder)
        if seq2seq != (config.architecture == "seq2seq"):
            found = "seq2seq" if seq2seq else "causal"
            raise ValueError(f"it is of architecture {found!r}, the config says {config.architecture!r}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        model: Any = kind.from_pretrained(config.model, dtype=frozen)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {config.model!r} cannot be loaded: {_first_line(error)}") from error
    with warnings.catch_warnings():
        # transformers is renaming what these two call; the old names are those of all its supported versions.
        warnings.simplefilter("ignore", FutureWarning)
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.adapter is not None:
            model = _with_adapter(model, config)
    encoder = Encoder(
        tokenizer,
        seq2seq=config.architecture == "seq2seq",
        max_length=config.text.max_length,
        text=TextFormat(config.text.prompt, config.text.target),
    )
    return model.to(device(config)), encoder


def require_transformers() -> Any:
    """The transformers package, imported here and nowhere before.

    Raises:
        ImportError: it or peft is not installed; the message says how to get them.
    """
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError('running tasks needs transformers and peft: pip install "rkif[hf]"') from error
    return transformers


def device(config: RunConfig) -> torch.device:
    """The device that ``config.device`` names; "auto" is a GPU where there is one.

    Raises:
        ValueError: no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return chosen


def autocast(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """The precision a run computes in."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(device(config).type, dtype=torch.bfloat16, enabled=enabled)


def _with_adapter(model: Any, config: RunConfig) -> Any:
    import peft

    assert config.adapter is not None
    targets = config.adapter.target_modules
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # peft is content if one of them is there.
    for target in targets if isinstance(targets, list) else []:
        if target.rpartition(".")[2] not in modules:
            raise ValueError(f"adapter.target_modules: the model has no module {target!r}")
    settings = peft.LoraConfig(
        r=config.adapter.r,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=targets,
        task_type="SEQ_2_SEQ_LM" if config.architecture == "seq2seq" else "CAUSAL_LM",
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
