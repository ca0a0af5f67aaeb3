"""Commands on runs: train on a sequence of tasks, inspect, roll back, reproduce, report, tune."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rkif.cli.options import Out, Resume, announce

commands = typer.Typer()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


@commands.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG.yaml")],
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Train on a sequence of tasks, and measure all tasks after each.

    The run's folder is runs/<name of the config> unless --out names another.
    """
    folder = out or Path("runs") / config.stem
    announce(f"Running {config} in {folder}")
    from rich.console import Console

    from rkif.continual.config import load_config
    from rkif.continual.display.progress import RunProgress, run_tables
    from rkif.continual.display.verdicts import verdict_line
    from rkif.continual.run import run
    from rkif.continual.rundir.folder import RunReader

    console = Console()
    metrics = run(load_config(config), folder, resume=resume, progress=RunProgress(console))
    for table in run_tables(metrics):
        console.print(table)
    if verdicts := verdict_line(RunReader(folder).records()):
        console.print(verdicts, markup=False, highlight=False)
    console.print(f"The run is in {folder}", markup=False)


@commands.command("log")
def log_command(
    run: Run,
    noted: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="With --verify --head: a head that was printed earlier."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only this task's records.")] = None,
    module: Annotated[
        str | None, typer.Option("--module", help="Only parameters whose names contain this, summed up.")
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", help="Only rounds with this verdict: keep, damp, undo, stop, unchecked."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="MODULE",
            help="The rounds that changed it, and the learners that selected it.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of records, and every file against its digest.")
    ] = False,
    head: Annotated[
        bool,
        typer.Option(
            "--head",
            help="Print the number of records and the last hash, to store elsewhere; "
            "with --verify compare the ledger with FILE.",
        ),
    ] = False,
    test_result: Annotated[
        int | None,
        typer.Option(
            metavar="ROUND", help="Print the gate's verdict on a round as an in-toto test result, in JSON."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines.")] = False,
) -> None:
    """Show what every round of a run did, or verify the run against its ledger."""
    if (noted is not None) != (verify and head):
        raise ValueError("--verify --head compares the ledger with a FILE: rkif log RUN --verify --head FILE")
    announce(f"{'Verifying' if verify else 'Reading'} the ledger of {run}")
    from rkif.continual.display import log
    from rkif.continual.rundir.folder import RunReader
    from rkif.continual.rundir.head import head_of, require_head
    from rkif.ledger.chain import LEDGER

    reader = RunReader(run)
    records = reader.ledger()
    if noted is not None:
        from rkif.attest.head import read_checkpoint_note

        require_head(records, read_checkpoint_note(noted), run / LEDGER, noted)
    elif head:
        print(head_of(records).to_checkpoint(), end="")
        return
    if test_result is not None:
        from rkif.continual.display.gate_statement import gate_statement

        print(json.dumps(gate_statement(run, records, test_result), indent=1))
        return
    selected = log.select(records, task=task, verdict=verdict, module=explain or module)
    if verify:
        from rkif.continual.rundir.verify import require_whole

        line = log.verified_line(run, require_whole(reader, records), records)
        print(line + (f"; the chain has the head in {noted}" if noted is not None else ""))
        return
    if as_json:
        for record in log.only_module(selected, explain or module):
            print(json.dumps(record))
        return
    from rich.console import Console

    from rkif.continual.display.verdicts import verdict_line

    console = Console()
    if explain is not None:
        for table in log.explain(selected, explain):
            console.print(table)
        return
    console.print(log.table(selected, module))
    if verdicts := verdict_line(selected):
        console.print(verdicts, markup=False, highlight=False)


@commands.command("rollback")
def rollback_command(
    run: Run,
    to: Annotated[int, typer.Option("--to", min=0, help="The round's number in `rkif log`.")],
) -> None:
    """Return a run to the state after a round; `rkif run --resume` continues from there."""
    announce(f"Rolling {run} back to round {to}")
    from rkif.continual.rundir.rollback import rollback

    record = rollback(run, to)
    print(
        f"{run} is as it was after round {to}, in task {record['task']}; "
        f"SHA-256 of the parameters {record['parameters']['after']}"
    )


@commands.command("reproduce")
def reproduce_command(
    run: Run,
    round_: Annotated[int, typer.Option("--round", min=1, help="The round's number in `rkif log`.")],
) -> None:
    """Train a round again from an earlier state and compare it with the ledger; writes nothing."""
    announce(f"Reproducing round {round_} of {run}")
    from rich.console import Console

    from rkif.continual.display.progress import RunProgress
    from rkif.continual.replay_round import reproduce

    outcome = reproduce(run, round_, RunProgress(Console()))
    for field, (then, now) in outcome.differences.items():
        print(f"{field}: {then} in the ledger, {now} now", file=sys.stderr)
    if outcome.differences:
        raise ValueError(f"round {round_} was not reproduced: {', '.join(outcome.differences)} differ")
    print(
        f"round {round_} of task {outcome.record['task']}, from the state after round {outcome.start}: "
        f"the same data, thresholds, counts and parameters; "
        f"SHA-256 {outcome.record['parameters']['after']}"
    )


@commands.command("report")
def report_command(run: Run) -> None:
    """Write a run's report: one HTML page with its metrics and plots."""
    announce(f"Writing the report of {run}")
    from rkif.continual.display.report import write_report

    print(write_report(run))


@commands.command("tune")
def tune_command(
    config: Annotated[Path, typer.Argument(help="A config of `rkif run`.", metavar="CONFIG.yaml")],
    trials: Annotated[int, typer.Option("--trials", min=1, help="Maximum number of runs.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the study.", show_default="tune/CONFIG")
    ] = None,
    resume: Resume = False,
) -> None:
    """Search density, Q, M and the outer learning rate for the best OP on the dev split."""
    folder = out or Path("tune") / config.stem
    announce(f"Searching settings for {config} in {folder}")
    from rich.console import Console

    from rkif.continual.config import load_config
    from rkif.continual.tune import best_table, tune

    console = Console()
    study = tune(load_config(config), folder, trials=trials, resume=resume, console=console)
    console.print(best_table(study))
    console.print(f"The trials are in {folder}", markup=False)


@commands.command("demo")
def demo_command(out: Out = None, resume: Resume = False) -> None:
    """Compare sequential fine-tuning, replay and Recurrent-KIF on small tasks: minutes on a CPU, no download.

    The folder is rkif-demo unless --out names another.
    """
    folder = out or Path("rkif-demo")
    announce(f"Comparing three methods in {folder}")
    from rich.console import Console

    from rkif.demo import demo

    demo(folder, resume=resume, console=Console())
