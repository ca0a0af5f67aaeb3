"""The numbers of a model's parameters, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's parameters.

    Attributes:
        name: of the model's class.
        trainable, frozen: numbers of parameters; tied ones count once.
        largest: number of elements of the largest trainable parameter.
    """

    name: str
    trainable: int
    frozen: int
    largest: int


def count_parameters(path: Path, *, rank: int | None = None, targets: list[str] | None = None) -> Parameters:
    """Count the parameters of the model that a config.json describes, built on the meta device.

    Args:
        path: the file, or the folder that contains it.
        rank: rank of LoRA adapters, which are then the only trained parameters; None trains all parameters.
        targets: names of the modules that get adapters; by default peft's choice for the architecture.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it does not describe a model that transformers has, or no module has one of the names.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; a plan needs a model's config.json, not its weights")
    try:
        config = transformers.AutoConfig.from_pretrained(file)
        with torch.device("meta"):
            model: Any = _class(config)(config)
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not describe a model that transformers has: {error}") from error
    name = type(model).__name__
    if rank is not None:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = [size for size, trained in sizes if trained]
    frozen = sum(size for size, trained in sizes if not trained)
    return Parameters(name, sum(trainable), frozen, max(trainable))


def _class(config: Any) -> Any:
    """The class that the config names; by default that of a causal language model."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM.from_config
