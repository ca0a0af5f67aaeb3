"""The language model of a run, and what of it is trained."""

from __future__ import annotations

import contextlib
import warnings
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
    try:
        import transformers
    except ImportError as error:
        raise ImportError('running tasks needs transformers and peft: pip install "rkif[hf]"') from error

    # The run has a progress display of its own.
    transformers.utils.logging.disable_progress_bar()
    kind = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[config.architecture]
    frozen = torch.bfloat16 if config.precision == "bfloat16" and config.adapter else torch.float32
    try:
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
    settings = peft.LoraConfig(
        r=config.adapter.r,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=config.adapter.target_modules,
        task_type="SEQ_2_SEQ_LM" if config.architecture == "seq2seq" else "CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "adapter"))
        try:
            model = peft.get_peft_model(model, settings)
        except ValueError as error:
            modules = config.adapter.target_modules
            raise ValueError(f"adapter.target_modules {modules}: {_first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
