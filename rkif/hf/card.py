"""The section of a model card on training with a replay memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    from rkif.hf.rounds import TrainerRounds

TAGS = ("rkif", "recurrent-kif", "continual-learning")
_HEADING = "## Continual learning"


def add_to_card(rounds: TrainerRounds, path: Path) -> None:
    """Add tags and a section on method, settings and memory to a model card, or replace the section.

    Args:
        rounds: the trainer's rounds.
        path: the card's file, which must exist.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    tags = card.data.tags or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    text, _, rest = card.text.partition(f"\n{_HEADING}\n")
    following = rest.find("\n## ")
    card.text = text.rstrip() + "\n\n" + _section(rounds) + (rest[following:] if following >= 0 else "")
    card.save(path)


def _section(rounds: TrainerRounds) -> str:
    trainer = rounds.trainer
    fusion = asdict(trainer.fusion)
    shown = (
        "density",
        "rule",
        "scope",
        "importance",
        "order",
        "beta1",
        "beta2",
        "inner_steps",
        "outer_steps",
    )
    settings = {name: fusion[name] for name in shown}
    settings |= {"outer_learning_rate": trainer.outer_learning_rate, "memory samples": len(rounds.memory)}
    if trainer.fuser is not None:
        settings["rounds"] = trainer.fuser.round
    if trainer.gate is not None:
        settings["gate"] = ", ".join(trainer.gate.names)
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return (
        f"{_HEADING}\n\nTrained by Recurrent Knowledge Identification and Fusion (Feng et al., "
        "[ACL 2025](https://arxiv.org/abs/2502.17510)) with rkif. In each round, an inner learner trained on "
        "the new data and an outer learner on a memory of earlier tasks; then both were fused.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
