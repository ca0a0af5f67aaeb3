"""``python -m bench``: the commands that measure and check the kernels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bench.common.options import Device, Rows, Threads, resolved_device

if TYPE_CHECKING:
    from bench.common.rows import Row
    from bench.kernels.run import Selection

app = typer.Typer()

Only = Annotated[list[str] | None, typer.Option("--only", help="observe, threshold or fuse; repeatable.")]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="A name in bench/kernels/shapes.py; repeatable.")
]
DtypeNames = Annotated[
    list[str] | None, typer.Option("--dtype", help="A name in bench/kernels/operations.py; repeatable.")
]
Ways = Annotated[str, typer.Option("--implementation", help="Prefix of the implementations' names.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the rows.")]
Keep = Annotated[bool, typer.Option("--write", help="Write the rows for the docs to bench/results.")]
Quick = Annotated[bool, typer.Option("--quick", help="Measure two shapes in few rounds.")]
Memory = Annotated[float | None, typer.Option("--memory", help="GiB for inputs; larger models are cut.")]
Results = Annotated[Path | None, typer.Argument(metavar="ROWS", help="File of rows.", show_default="all")]


@app.command("aot")
def aot_command(
    json_file: JsonFile = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Repeatable.", show_default="all")
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option("--triton", help="A version to install; repeatable.", show_default="the installed one"),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option("--kernel", help="Name of a kernel; repeatable.", show_default="all")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="Only variants with these dtypes; repeatable.", show_default="all"),
    ] = None,
    write: Keep = False,
) -> None:
    """Compile every kernel for GPUs that need not be present; fails if a kernel exceeds its limits."""
    from bench.kernels.aot import Selection, check
    from bench.kernels.roofline import write_counts
    from bench.kernels.toolchains import check_under

    if triton:
        rows, passed = check_under(triton, target or [], kernel or [], dtype or [])
    else:
        selection = Selection(kernel or [], dtype or [])
        compiled, passed = check(Console(width=200), target or [], selection)
        rows = [row._asdict() for row in compiled]
    _write_json(json_file, rows)
    if not passed:
        raise typer.Exit(1)
    if write:
        write_counts(rows)


@app.command("host")
def host_command(json_file: JsonFile = None, write: Keep = False) -> None:
    """Measure the host's time per call with a driver that launches nothing; fails on superfluous launches."""
    from bench.kernels.host import measure, missed_goals, problems
    from bench.kernels.roofline import write_host

    rows = measure()
    for row in rows:
        print(f"{row.call:14} {row.tensors:4} tensors {row.microseconds:9.1f} us {row.launches:3} launches")
    _write_json(json_file, [row._asdict() for row in rows])
    if write:
        write_host(row._asdict() for row in rows)
    for line in missed_goals(rows):
        print(line)
    if lines := problems(rows):
        raise RuntimeError("; ".join(lines))


@app.command("busy")
def busy_command(
    json_file: JsonFile = None,
) -> None:
    """Compare the CPU kernels' time with and without another process that keeps one core busy."""
    from bench.kernels.busy import GOAL, measure

    rows = measure()
    for row in rows:
        print(
            f"{row.op:10} quiet {row.quiet_ms:8.2f} ms, busy {row.busy_ms:8.2f} ms: "
            f"{row.ratio:.2f} times; the goal is {GOAL}"
        )
    _write_json(json_file, [row._asdict() for row in rows])


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
    """Measure the kernels and their baselines; a wrong result is an error and is not timed."""
    from bench.kernels.run import run

    print(run(_selection(only, shape, dtype, implementation, device, quick, threads, memory), out))


@app.command("launches")
def launches_command(
    shape: Shapes = None,
    device: Device = "auto",
    write: Annotated[bool, typer.Option("--write", help="Write the fastest to launches.json.")] = False,
) -> None:
    """Measure the Triton kernels with several launch configurations."""

    from bench.kernels.launches import measure
    from rkif_kernels.backends.triton.launches import FILE

    selection, chosen = _selection(shape=shape, device=device), resolved_device(device)
    selection.arguments(Path())  # refuses unknown shapes
    if write and chosen.type != "cuda":
        raise ValueError(f"--write needs --device cuda; got {chosen.type!r}")
    measure(chosen, selection.shapes, Console(width=100), into=FILE if write else None)


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
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Number of rounds.")] = 2,
) -> None:
    """Measure another commit and this checkout in turn."""
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
        list[str] | None,
        typer.Option("--shape", help="A shape of the rows.", show_default="smallest and largest"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="A PNG file.")] = Path("docs/results/kernels.png"),
) -> None:
    """Draw rows as a figure."""
    from bench.kernels.tables import plot

    plot(_rows(results), out, shape or ())
    print(out)


@app.command("goals")
def goals_command(results: Results = None) -> None:
    """Show for each GPU goal whether the rows reach it."""
    from bench.kernels.goals import table

    Console(width=160).print(table(_rows(results)))


@app.command("profile-13b")
def profile_command(
    layers: Annotated[int, typer.Option("--layers", help="1 to 40 (all, with embedding and head).")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="A name in bench/kernels/operations.py.")] = "float32",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    out: Rows = None,
) -> None:
    """Measure merge throughput on LLaMA-2-13B's shapes: an adapter, and parameters layer by layer."""
    import torch

    from bench.common import rows
    from bench.kernels.profile import profile_13b, report

    chosen = resolved_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    measured = profile_13b(chosen, layers, dtype)
    for row in measured:
        rows.write(out or rows.results_file(chosen.type), row)
    for line in map(json.dumps, measured) if as_json else report(measured):
        print(line)


@app.command("sweep")
def sweep_command(
    seconds: Annotated[float, typer.Option("--seconds", help="Time limit.")] = 60,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the first case.", show_default="any")] = None,
    cases: Annotated[int | None, typer.Option("--cases", help="Maximum number of cases.")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", help="A backend; repeatable.")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay CUDA graphs; --device cuda.")] = False,
    device: Device = "auto",
) -> None:
    """Compare every operation and backend with the reference, bit for bit, on random inputs."""

    from bench.kernels.sweep import sweep

    first = random.SystemRandom().randrange(2**31) if seed is None else seed
    chosen = resolved_device(device)
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


def _write_json(file: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write rows, if there is a file for them."""
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _rows(results: Path | None) -> list[Row]:
    """The rows of a file, or all committed rows."""
    from bench.common import rows

    if results is not None:
        return rows.read(results)
    files = [rows.results_file(device) for device in ("cuda", "cpu")]
    measured = [row for file in files if file.exists() for row in rows.read(file)]
    if not measured:
        raise ValueError("nothing has been measured yet: python -m bench run")
    return measured
