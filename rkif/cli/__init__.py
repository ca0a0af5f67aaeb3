"""The command line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import torch
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from safetensors import SafetensorError

from rkif.distributed.process_group import Ranks, processes
from rkif_kernels import require_choice

if TYPE_CHECKING:
    from rkif.checkpoint.preflight import Request

app = typer.Typer(
    help="Recurrent Knowledge Identification and Fusion: learning task after task without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in that folder, if anything is.")]


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG.yaml")],
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Learn a sequence of tasks; measure all of them after each.

    The run's folder is runs/<name of the config> unless --out names another.
    """
    from rkif.continual.config import load_config
    from rkif.continual.display.progress import RunProgress, run_tables
    from rkif.continual.run import run

    console = Console()
    folder = out or Path("runs") / config.stem
    metrics = run(load_config(config), folder, resume=resume, progress=RunProgress(console))
    for table in run_tables(metrics):
        console.print(table)
    console.print(f"The run is in {folder}", markup=False)


@app.command("log")
def log_command(
    run: Run,
    task: Annotated[str | None, typer.Option("--task", help="Only this task's records.")] = None,
    module: Annotated[
        str | None, typer.Option("--module", help="Only parameters whose name contains this, summed up.")
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", help="Only rounds with this verdict: keep, damp, undo, stop, unchecked."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="MODULE", help="Which rounds moved it, and who won.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain, and every file against its digest.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines.")] = False,
) -> None:
    """Show what every round of a run did, or prove that the record of it is whole."""
    from rkif.continual.display import log
    from rkif.continual.rundir.verify import verify as check

    if verify:
        checked = check(run)
        print(
            f"{run}: {checked['records']} records in a whole chain; {checked['tasks']} tasks' files and "
            f"{checked['snapshots']} kept states are as recorded; last hash {log.read(run)[-1]['hash']}"
        )
        return
    records = log.select(log.read(run), task=task, verdict=verdict)
    if as_json:
        for record in log.only_module(records, explain or module):
            print(json.dumps(record))
        return
    console = Console()
    for table in log.explain(records, explain) if explain is not None else [log.table(records, module)]:
        console.print(table)


@app.command("rollback")
def rollback_command(
    run: Run,
    to: Annotated[int, typer.Option("--to", min=0, help="Round, as `rkif log` numbers them.")],
) -> None:
    """Return a run to the state after a round; `rkif run --resume` goes on from there."""
    from rkif.continual.rundir.rollback import rollback

    record = rollback(run, to)
    print(
        f"{run} is as it was after round {to}, in task {record['task']}; "
        f"SHA-256 of the parameters {record['parameters']['after']}"
    )


@app.command("replay")
def replay_command(
    run: Run,
    number: Annotated[int, typer.Option("--round", min=1, help="Round, as `rkif log` numbers them.")],
) -> None:
    """Go through a round again, and compare what comes of it with the ledger; nothing is changed."""
    from rkif.continual.display.progress import RunProgress
    from rkif.continual.replay_round import reproduce

    found = reproduce(run, number, RunProgress(Console()))
    for field, (then, now) in found.differences.items():
        print(f"{field}: {then} in the ledger, {now} now", file=sys.stderr)
    if found.differences:
        raise ValueError(f"round {number} was not reproduced: {', '.join(found.differences)} differ")
    print(
        f"round {number} of task {found.record['task']}, from the state after round {found.start}: the same "
        f"data, thresholds, counts and parameters; SHA-256 {found.record['parameters']['after']}"
    )


@app.command("report")
def report_command(run: Run) -> None:
    """Write a run's report: one HTML page with its figures and pictures, for any browser."""
    from rkif.continual.display.report import write_report

    print(write_report(run))


@app.command("tune")
def tune_command(
    config: Annotated[Path, typer.Argument(help="A config of `rkif run`.", metavar="CONFIG.yaml")],
    trials: Annotated[int, typer.Option("--trials", min=1, help="Runs that it may take, in all.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the study.", show_default="tune/CONFIG")
    ] = None,
    resume: Resume = False,
) -> None:
    """Search density, Q, M and the outer learning rate for the best OP on the dev split."""
    from rkif.continual.config import load_config
    from rkif.continual.tune import best_table, tune

    console = Console()
    folder = out or Path("tune") / config.stem
    study = tune(load_config(config), folder, trials=trials, resume=resume, console=console)
    console.print(best_table(study))
    console.print(f"The trials are in {folder}", markup=False)


@app.command("demo")
def demo_command(out: Out = None, resume: Resume = False) -> None:
    """Compare sequential fine-tuning, replay and Recurrent-KIF on small tasks; no download, no GPU, minutes.

    The folder is rkif-demo unless --out names another.
    """
    from rkif.demo import demo

    demo(out or Path("rkif-demo"), resume=resume, console=Console())


@app.command("fuse")
def fuse_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The checkpoint both learners started from.")],
    inner: Annotated[Path, typer.Argument(metavar="INNER", help="What the inner learner made of it.")],
    outer: Annotated[Path, typer.Argument(metavar="OUTER", help="What the outer learner made of it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to be made; it appears when it is complete.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="recurrent_kif, or as in mergekit: linear, task_arithmetic, ties, dare_linear, dare_ties; "
            "or magnitude_prune.",
        ),
    ] = "recurrent_kif",
    inner_importance: Annotated[
        Path | None,
        typer.Option(help="Scores under the parameters' names.", show_default="magnitude of the task vector"),
    ] = None,
    outer_importance: Annotated[
        Path | None, typer.Option(help="Likewise.", show_default="magnitude of the task vector")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Fraction that a side selects.", show_default="0.2")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="paper or release (recurrent_kif).", show_default="paper")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="global: one threshold over all parameters; tensor: one for each.",
            show_default="global; tensor for ties and magnitude_prune",
        ),
    ] = None,
    outer_from: Annotated[
        str | None,
        typer.Option(
            help="inner, or base if OUTER was fine-tuned from BASE (recurrent_kif).", show_default="inner"
        ),
    ] = None,
    weight: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Of INNER and OUTER (other methods).", show_default="1 1"),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Divide by the sum of the weights.", show_default="for linear and ties"),
    ] = None,
    lambda_: Annotated[
        float | None,
        typer.Option("--lambda", help="Factor of the merged task vector.", show_default="1"),
    ] = None,
    rescale: Annotated[
        bool | None, typer.Option(help="Keep the L1 norm of what is thinned out.", show_default="for dare")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops.", show_default="0")] = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory of the process's own, what Python takes itself included.")
    ] = "2GiB",
    max_shard_size: Annotated[str, typer.Option(help="Size of a file of the output.")] = "5GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan; read no weight.")] = False,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Fuse checkpoints on disk, exactly, in bounded memory.

    BASE, INNER and OUTER are folders in Hugging Face layout (models or adapters), or .safetensors files.
    Under torchrun (torchrun --nproc-per-node N -m rkif fuse ...) the processes share the work, with the same
    bytes as result; --max-memory is each one's.
    """
    from rkif.checkpoint.methods import make_method
    from rkif.checkpoint.preflight import Request

    given = {
        "density": density,
        "rule": rule,
        "scope": scope,
        "outer_from": outer_from,
        "weight": weight,
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "seed": seed,
    }
    request = Request(
        base,
        inner,
        outer,
        out,
        make_method(method, {name: value for name, value in given.items() if value is not None}),
        inner_importance=inner_importance,
        outer_importance=outer_importance,
        max_memory=_size("--max-memory", max_memory),
        max_shard_size=_size("--max-shard-size", max_shard_size),
        device=_device(device),
        resume=resume,
    )
    with processes() as ranks:
        _fuse(request, ranks, dry_run=dry_run, as_json=as_json)


def _fuse(request: Request, ranks: Ranks, *, dry_run: bool, as_json: bool) -> None:
    """Plan and do it, together with other processes if there are any, of which the first one speaks."""
    from rkif.checkpoint.display import Bar, plan_dict, plan_table, summary_table
    from rkif.checkpoint.fuse import fuse_checkpoints
    from rkif.checkpoint.preflight import PreflightError, preflight

    first = ranks.rank == 0
    console = Console(stderr=as_json, quiet=not first)
    try:
        with ranks.together():  # before anyone writes where others look
            plan = preflight(request)
    except PreflightError as error:
        if not first:
            raise SystemExit(1) from error
        if as_json:
            print(json.dumps({"problems": error.problems}))
        if len(error.problems) > 1:
            for problem in error.problems:
                print(f"- {problem}", file=sys.stderr)
        raise
    if dry_run:
        if as_json and first:
            print(json.dumps(plan_dict(plan)))
        elif not as_json:
            console.print(plan_table(plan))
        return
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    with Bar(console) as bar:
        summary = fuse_checkpoints(plan, bar, ranks)
    if as_json and first:
        print(json.dumps(summary.to_dict()))
    elif not as_json:
        console.print(summary_table(summary))


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output of `rkif fuse`.")],
) -> None:
    """Check every byte of an output of `rkif fuse` against its manifest."""
    from rkif.checkpoint.display import Bar
    from rkif.checkpoint.manifest import read_manifest, verify

    manifest = read_manifest(folder)
    console = Console()
    with Bar(console) as bar:
        bar.stage("verifying", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        problems = verify(folder, bar.advance)
    for problem in problems[:-1]:
        print(f"- {problem}", file=sys.stderr)
    if problems:
        raise ValueError(f"{folder}: {problems[-1]}")
    console.print(
        f"{folder}: {len(manifest['files'])} files and {len(manifest['tensors'])} tensors are as they were "
        f"written; SHA-256 of the tensors {manifest['content_sha256']}",
        markup=False,
        soft_wrap=True,
    )


@app.command("plan")
def plan_command(
    model: Annotated[Path, typer.Option("--model", help="A config.json, or a folder that has one.")],
    device_memory: Annotated[str, typer.Option("--device-memory", help="Of each device.")] = "80GiB",
    reserve: Annotated[
        str, typer.Option(help="Of it, for activations and whatever else is not counted.")
    ] = "8GiB",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "bfloat16",
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank.", show_default="all parameters")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="What gets adapters: q_proj,v_proj.", show_default="peft's choice"),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or sgd, of both learners.")] = "adamw",
    importance: Annotated[
        str, typer.Option(help="sensitivity_uncertainty or sensitivity.")
    ] = "sensitivity_uncertainty",
    ranks: Annotated[int, typer.Option(min=1, help="Devices that FSDP2 shards everything over.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what recurrent training takes of a device's memory, and with which settings it fits.

    From the model's config.json alone; nothing is loaded. Fails if nothing fits.
    """
    from rkif.config import Importance
    from rkif.plan import Training, choose
    from rkif.plan.bytes import Optimizer
    from rkif.plan.display import as_json as plan_json
    from rkif.plan.display import bytes_table, options_table, settings
    from rkif.plan.model import count_parameters

    memory, reserved = _size("--device-memory", device_memory), _size("--reserve", reserve)
    require_choice("--dtype", dtype, ["float32", "bfloat16"])
    require_choice("--optimizer", optimizer, get_args(Optimizer))
    require_choice("--importance", importance, get_args(Importance))
    if target_modules is not None and lora_r is None:
        raise ValueError("--target-modules is for adapters: give their rank with --lora-r")
    targets = None if target_modules is None else [one.strip() for one in target_modules.split(",")]
    found = count_parameters(model, rank=lora_r, targets=targets)
    width = 4 if dtype == "float32" else 2
    training = Training(
        found.trainable,
        found.frozen,
        found.largest,
        trainable_bytes=width if lora_r is None else 4,  # peft trains adapters in float32
        frozen_bytes=width,
        optimizer=cast(Optimizer, optimizer),
        uncertainty=importance == "sensitivity_uncertainty",
        ranks=ranks,
    )
    budgets, chosen = choose(training, memory=memory, reserve=reserved)
    if as_json:
        print(json.dumps(plan_json(training, budgets, chosen)))
    else:
        console = Console()
        of = f" on {ranks} devices" if ranks > 1 else ""
        console.print(
            f"{found.name}: {found.trainable:,} parameters are trained{of}, {found.frozen:,} are not\n",
            highlight=False,
        )
        console.print(bytes_table(training, (chosen or budgets[-1]).option))
        console.print(options_table(budgets, chosen, memory))
        if chosen is not None and chosen.option.changes:
            console.print(f"In a config:\n\n{settings(chosen.option)}\n", highlight=False)
    if chosen is None:
        least = min(one.bytes for one in budgets)
        raise ValueError(
            f"nothing fits: the least is {least / 2**30:.2f} GiB a device, of {memory / 2**30:.4g} GiB; "
            "take more --ranks, another --optimizer, or adapters (--lora-r)"
        )


def _size(option: str, text: str) -> int:
    """Bytes, from "500MB" or "2GiB"."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"{option} must be a size such as 2GiB or 500MB; got {text!r}") from None
    if size <= 0:
        raise ValueError(f"{option} must be more than nothing; got {text!r}")
    return size


def _device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not cuda:
        raise ValueError("--device cuda was requested, but PyTorch sees no CUDA device")
    if not cuda or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rkif {importlib.metadata.version('rkif')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that belong to no command."""


def main() -> None:
    """Entry point of ``rkif``."""
    exit_in_one_line(app)


def exit_in_one_line(commands: typer.Typer) -> None:
    """Run commands; what is wrong with the input is said in one line, and the exit status is 1."""
    try:
        commands()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.strerror}: {error.filename}"
        print(f"rkif: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1) from None
