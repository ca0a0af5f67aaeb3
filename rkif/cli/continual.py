"""Commands that create runs (run, demo, tune), and the report of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rkif.cli.options import Json, Out, Quiet, Resume, announce

commands = typer.Typer()

COMPARISON = "comparison.html"


@commands.command("run", rich_help_panel="Learn")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG.yaml")],
    out: Out = None,
    resume: Resume = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, such as training.steps=20; the value is YAML. Can be repeated.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of metrics.json; progress goes to stderr.")
    ] = False,
) -> None:
    """Train on a sequence of tasks, and evaluate all tasks after each.

    The run's folder is runs/<name of the config> unless --out names another. Resume a run with the same --set
    as before, or with RUN/config.yaml, which has all settings.

    \b
    Examples:
      rkif run config.yaml --out runs/first
      rkif run config.yaml --out runs/first --resume
      rkif run config.yaml --out runs/second --set fusion.density=0.1 --set seed=7
    """
    folder = out or Path("runs") / config.stem
    announce(f"Running {config} in {folder}", quiet=quiet)
    from rich.console import Console

    from rkif.continual.config import load_config
    from rkif.continual.display.preset import preset_changes
    from rkif.continual.display.progress import RunProgress, run_tables
    from rkif.continual.display.verdicts import verdict_line
    from rkif.continual.run import run
    from rkif.continual.rundir.folder import RunReader
    from rkif.ledger.records import not_rolled_back

    console = Console(quiet=quiet, stderr=as_json)
    settings = load_config(config, changes or ())
    if line := preset_changes(settings):
        console.print(line, markup=False, highlight=False)
    metrics = run(settings, folder, resume=resume, progress=RunProgress(console))
    if as_json:
        print(json.dumps(metrics))
        return
    for table in run_tables(metrics):
        console.print(table)
    if verdicts := verdict_line(not_rolled_back(RunReader(folder).records())):
        console.print(verdicts, markup=False, highlight=False)
    console.print(f"The run is in {folder}", markup=False)


@commands.command("report", rich_help_panel="Inspect")
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or one folder of runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File of the page that compares runs.", show_default=COMPARISON),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run, an HTML page in its folder, or a page that compares several runs.

    For one folder of runs, the runs are listed.

    \b
    Examples:
      rkif report runs/first
      rkif report runs/first runs/second --out comparison.html
    """
    announce(f"Writing the report of {', '.join(map(str, runs))}")
    if len(runs) > 1:
        from rkif.continual.display.report.comparison import write_comparison

        page = write_comparison(runs, out or Path(COMPARISON))
    elif out is not None:
        raise ValueError(
            "--out names the page that compares several runs; the report of one is RUN/report.html"
        )
    else:
        from rkif.continual.display.report import write_report
        from rkif.continual.display.run_list import print_runs

        if not as_json and print_runs(runs[0]):
            return
        page = write_report(runs[0])
    print(json.dumps({"report": str(page)}) if as_json else page)


@commands.command("tune", rich_help_panel="Learn")
def tune_command(
    config: Annotated[Path, typer.Argument(help="A config of `rkif run`.", metavar="CONFIG.yaml")],
    trials: Annotated[int, typer.Option("--trials", min=1, help="Maximum number of runs.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the study.", show_default="tune/CONFIG")
    ] = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search density, Q, M and the outer learning rate for the best OP on the dev split.

    \b
    Example:
      rkif tune config.yaml --trials 20 --out tune/first
    """
    folder = out or Path("tune") / config.stem
    announce(f"Searching settings for {config} in {folder}", quiet=quiet)
    from rich.console import Console

    from rkif.continual.config import load_config
    from rkif.continual.tune import BEST, best_first, best_table, tune

    console = Console(stderr=as_json, quiet=quiet)
    study = tune(load_config(config), folder, trials=trials, resume=resume, console=console)
    if as_json:
        tried = [{"op": one.value, **one.params, **one.user_attrs} for one in best_first(study)]
        print(json.dumps({"best": str(folder / BEST), "trials": tried}))
        return
    console.print(best_table(study))
    console.print(f"The best settings: rkif run {folder / BEST}", markup=False, soft_wrap=True)


@commands.command("demo", rich_help_panel="Start")
def demo_command(
    out: Out = None, resume: Resume = False, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Compare sequential fine-tuning, replay and Recurrent-KIF on small tasks: minutes on a CPU, no download.

    The folder is rkif-demo unless --out names another.

    \b
    Example:
      rkif demo --out my-demo
    """
    folder = out or Path("rkif-demo")
    announce(f"Comparing three methods in {folder}", quiet=quiet)
    from rich.console import Console

    from rkif.demo import demo

    runs = demo(folder, resume=resume, console=Console(stderr=as_json, quiet=quiet))
    if as_json:
        print(json.dumps(runs))
