"""``rkif demo``: compare three methods on small tasks, without a download or a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from rkif.continual.config import RunConfig, load_config
from rkif.continual.display.progress import RunProgress, comparison_table
from rkif.continual.models.load import require_transformers
from rkif.continual.run import run
from rkif.demo.model import write_model
from rkif.demo.sentences import write_tasks
from rkif.files import write_text

COMPARED = ("sequential", "replay", "recurrent_kif")
CONFIG = """\
# A config of `rkif run`. All parameters are trained, because the model starts from random weights.
model: model
adapter: null
tasks: {folder: tasks, order: demo}
text: {max_length: 64}
method: recurrent_kif  # the demo also runs `sequential` and `replay`
training: {steps: 160, batch_size: 16, learning_rate: 3.0e-3, warmup_steps: 8}
outer: {learning_rate: 3.0e-3, batch_size: 16}
memory: {fraction: 0.02}
evaluation: {scoring: likelihood, batch_size: 50}
snapshots: {budget: 40MB}  # states to roll back to, 3.6 MB each: 11 of the 60 rounds
threads: 1  # more threads are not faster for a model of this size
seed: 1
"""


def demo(out: Path, *, resume: bool, console: Console) -> list[dict[str, Any]]:
    """Write a model, tasks and a config to ``out``, run three methods, and show their metrics.

    Returns:
        The metrics of the runs in ``out/<method>``.

    Raises:
        ValueError: ``out`` holds a demo and ``resume`` is False, or holds other files.
        OSError, ImportError: the folder cannot be written, or transformers is not installed.
    """
    config_path, begun = out / "config.yaml", out / "inputs.partial"
    if config_path.exists() or begun.exists():
        if not resume:
            raise ValueError(f"{out} holds a demo; continue with --resume, or choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and is not a demo; choose another --out")
    if not config_path.exists():
        require_transformers(adapter=False)
        out.mkdir(parents=True, exist_ok=True)
        begun.touch()  # so that a killed demo is told from other files; --resume writes its inputs again
        write_inputs(out, train=600, dev=100, seed=0)
        write_text(config_path, CONFIG)
    begun.unlink(missing_ok=True)
    console.print(
        f"{len(COMPARED)} methods learn four small tasks, one after another. "
        f"All files are in {escape(str(out))}\n"
    )
    config = load_config(config_path)
    runs = [_run(config, method, out, resume, console) for method in COMPARED]
    console.print()
    console.print(comparison_table(runs))
    console.print(
        "OP: mean accuracy at the end. BWT: mean change since a task was learned; below zero is forgetting. "
        "FWT: mean accuracy just before a task is learned, minus that before training.\n"
        "Replay and Recurrent-KIF trained on equally many samples. Both forget less than fine-tuning alone. "
        "Tasks this small do not show which of the two is better.\n"
    )
    folders = [str(out / method) for method in COMPARED]
    for purpose, command in (
        ("Compare the runs on a page", f"rkif report {' '.join(folders)}"),
        ("See the masks and the rounds of Recurrent-KIF", f"rkif report {folders[-1]}"),
        ("Train with other settings", f"rkif run {config_path} --set fusion.density=0.1"),
    ):
        # Not wrapped, so that a command can be copied.
        console.print(f"{purpose}:\n  {command}", markup=False, highlight=False, soft_wrap=True)
    return runs


def write_inputs(out: Path, *, train: int, dev: int, seed: int) -> None:
    """Write tasks with ``train`` and ``dev`` records each, and an untrained model with their vocabulary."""
    tasks = out / "tasks"
    write_tasks(tasks, train=train, dev=dev, seed=seed)
    records = [json.loads(line) for line in (tasks / "train.jsonl").read_text().splitlines()]
    table = json.loads((tasks / "tasks.json").read_text())["tasks"].values()
    texts = [text for record in records for text in (record["input"], record["output"])]
    write_model(out / "model", texts + [entry["instruction"] for entry in table], seed=seed)


def _run(config: RunConfig, method: str, out: Path, resume: bool, console: Console) -> dict[str, Any]:
    chosen = RunConfig.model_validate(config.model_dump() | {"method": method})
    folder = out / method
    return run(chosen, folder, resume=resume and folder.exists(), progress=RunProgress(console))
