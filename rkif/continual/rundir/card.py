"""The model card of a learned task: model, tasks, method and prompt format."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from rkif.continual.config import RunConfig
from rkif.continual.tasks.records import Task
from rkif.files import write_text

_ARCHITECTURES = {
    "causal": "The answer follows as `{target}` and ends with the end-of-sequence token.",
    "seq2seq": "The decoder answers with `{target}` and the end-of-sequence token.",
    "encoder": "The answer is the label whose text, `{target}`, has the most similar embedding (mean token "
    "vector).",
}


def write_card(folder: Path, config: RunConfig, tasks: Sequence[Task]) -> None:
    """Write README.md, which replaces that of peft.

    Args:
        folder: the folder of the learned task.
        config: settings of the run.
        tasks: the learned tasks in their order; at least one.
    """
    base = Path(config.model).name if Path(config.model).is_dir() else config.model
    data = ModelCardData(
        base_model=base,
        library_name="peft" if config.adapter is not None else "transformers",
        tags=["rkif", "continual-learning", config.method.replace("_", "-")],
    )
    answer = _ARCHITECTURES[config.architecture].format(target=config.text.target)
    count = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    version = importlib.metadata.version("rkif")
    questions = "\n".join(_question(task, config) for task in tasks)
    write_text(
        folder / "README.md",
        f"""---
{data.to_yaml()}
---

# {base} after {count}: {", ".join(task.name for task in tasks)}

Trained by rkif {version} with the method `{config.method}`, one task after another.

## Prompt format

The model was trained on plain text, without a chat template. A prompt has at most
{config.text.max_length} tokens; the middle of a longer one was removed. {answer}

{questions}
""",
    )


def _question(task: Task, config: RunConfig) -> str:
    """The prompt of a task, with INPUT in the place of a record's input."""
    prompt = config.text.prompt.format(instruction=task.instruction, input="INPUT")
    fence = "````" if "```" in prompt else "```"
    labels = f" Answers: {', '.join(f'`{label}`' for label in task.labels)}." if task.labels else ""
    return f"**{task.name}.**{labels}\n\n{fence}text\n{prompt}\n{fence}\n"
