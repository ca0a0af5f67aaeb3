"""``rkif fuse``: checkpoints on disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rkif.cli.options import Quiet, Resume, announce, importing, parse_size

if TYPE_CHECKING:
    import torch

    from rkif.checkpoint.request import Request, Space
    from rkif.distributed.process_group import ProcessGroup

commands = typer.Typer()


@commands.command("fuse", rich_help_panel="Fuse")
def fuse_command(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it appears when it is complete.")],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="BASE INNER OUTER",
            help="The checkpoint that training started from, and those of the inner and the outer learner. "
            "Other methods take BASE and any number of models; wsm takes checkpoints of a run, oldest first.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="recurrent_kif; as in mergekit linear, task_arithmetic, ties, dare_linear, dare_ties; "
            "magnitude_prune; or wsm, an average that emulates a decay of the learning rate.",
            show_default="recurrent_kif",
        ),
    ] = None,
    mergekit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML file of mergekit with the inputs, the method and its settings."
        ),
    ] = None,
    inner_importance: Annotated[
        Path | None,
        typer.Option(
            help="Scores of the inner learner, by parameter name.",
            show_default="magnitude of the task vector",
        ),
    ] = None,
    outer_importance: Annotated[
        Path | None,
        typer.Option(
            help="Scores of the outer learner, by parameter name.",
            show_default="magnitude of the task vector",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of the parameters that each learner selects.", show_default="0.2"),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Merge weights: paper, release or sum (recurrent_kif).", show_default="paper"),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="global: one threshold over all parameters; tensor: one for each tensor.",
            show_default="global; tensor for ties and magnitude_prune",
        ),
    ] = None,
    outer_from: Annotated[
        str | None,
        typer.Option(help="Where OUTER started: inner or base (recurrent_kif).", show_default="inner"),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(help="Weight of each model, such as 1,0.5 (other methods).", show_default="1,1"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Learning rate to emulate: 1-sqrt, linear, cosine (wsm).", show_default="1-sqrt"),
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
        bool | None, typer.Option(help="Restore L1 norms after random drops.", show_default="for dare")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of random drops (dare), below 2^63.", show_default="0")
    ] = None,
    space: Annotated[
        str,
        typer.Option(help="factor: merge each tensor; delta: merge the updates B·A of LoRA adapters."),
    ] = "factor",
    max_memory: Annotated[
        str, typer.Option(help="Maximum anonymous memory of the process, including Python's own.")
    ] = "2GiB",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of an output file.")] = "5GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs and show the plan, without reading weights.")
    ] = False,
    resume: Resume = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished output to the Hugging Face Hub.")
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Fuse checkpoints on disk, exactly, in bounded memory.

    The inputs are folders in Hugging Face layout (models or adapters), or .safetensors files.
    Under torchrun (torchrun --nproc-per-node N -m rkif fuse ...) the processes share the work, and the output
    has the same bytes; --max-memory is the bound for each process.

    \b
    Examples:
      rkif fuse base inner outer --out fused --max-memory 1GiB
      rkif fuse base one two three --out merged --method ties --density 0.2
      rkif fuse checkpoint-500 checkpoint-1000 checkpoint-1500 --out averaged --method wsm
      rkif fuse --mergekit merge.yml --out merged
    """
    announce(f"Fusing {mergekit or ', '.join(map(str, checkpoints or []))} into {out}", quiet=quiet)
    with importing():
        from rkif.checkpoint.mergekit import read_merge
        from rkif.checkpoint.methods import SETTINGS, make_method
        from rkif.checkpoint.request import Request
        from rkif.continual.spelling import did_you_mean
        from rkif.distributed.process_group import launched_processes

    if push_to_hub is not None:
        from rkif.checkpoint.hub import require_repo_id

        require_repo_id("--push-to-hub", push_to_hub)
    if method is not None and method not in SETTINGS:
        meant = did_you_mean(method, SETTINGS)
        raise ValueError(f"--method must be one of {', '.join(SETTINGS)}; got {method!r}{meant}")
    given = {
        "density": density,
        "rule": rule,
        "scope": scope,
        "outer_from": outer_from,
        "shape": shape,
        "weight": None if weight is None else _numbers("--weight", weight),
        "normalize": normalize,
        "lambda": lambda_,
        "rescale": rescale,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    if mergekit is not None:
        options: dict[str, object] = {name: value for name, value in settings.items() if name != "seed"}
        options |= {
            "method": method,
            "inner_importance": inner_importance,
            "outer_importance": outer_importance,
        }
        options["space"] = space if space != "factor" else None
        _require_no_others(checkpoints, options)
        merge = read_merge(mergekit)
        base, models, chosen = merge.base, merge.models, merge.load(seed)
    elif checkpoints:
        base, *others = checkpoints
        models = tuple(others)
        chosen = make_method(method or "recurrent_kif", settings, len(models))
    else:
        raise ValueError("name the checkpoints BASE, INNER and OUTER, or a file of mergekit with --mergekit")
    request = Request(
        base,
        models,
        out,
        chosen,
        inner_importance=inner_importance,
        outer_importance=outer_importance,
        max_memory=parse_size("--max-memory", max_memory),
        max_shard_size=parse_size("--max-shard-size", max_shard_size),
        device=_device(device),
        resume=resume,
        space=cast("Space", space),
    )
    with launched_processes() as processes:
        _fuse(request, processes, repo=push_to_hub, dry_run=dry_run, quiet=quiet, as_json=as_json)


def _fuse(
    request: Request,
    processes: ProcessGroup,
    *,
    repo: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Plan and fuse, together with the other processes, if any; only rank 0 prints."""
    with importing():
        from rich.console import Console

        from rkif.checkpoint.display import Bar, plan_dict, plan_table, summary_table
        from rkif.checkpoint.fuse import fuse_checkpoints
        from rkif.checkpoint.preflight import preflight
        from rkif.checkpoint.request import PreflightError

    first = processes.rank == 0
    console = Console(stderr=as_json, quiet=quiet or not first)
    try:
        with processes.raise_on_any_failure():  # before any process writes where others read
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
        summary = fuse_checkpoints(plan, bar, processes)
    for note in summary.notes[len(plan.notes) :]:
        console.print(f"note: {note}", markup=False)
    if not as_json:
        console.print(summary_table(summary))
        # Not in the table, which would wrap it at 80 columns.
        console.print(f"SHA-256 {summary.content_sha256}", highlight=False, soft_wrap=True)
    if not first:
        return
    address = None if repo is None else _push(request.out, repo, quiet=quiet)
    if as_json:
        print(json.dumps(summary.to_dict() | ({} if address is None else {"hub": address})))
    elif address is not None:
        console.print(f"Uploaded to {address}", markup=False, soft_wrap=True)


def _push(out: Path, repo: str, *, quiet: bool) -> str:
    """Upload the finished output; return its address."""
    from rkif.checkpoint.hub import push

    announce(f"Uploading {out} to {repo}", quiet=quiet)
    try:
        return push(out, repo, "Upload a fusion by rkif")
    except RuntimeError as error:
        raise RuntimeError(f"--push-to-hub: {error}; {out} is complete: --resume uploads it") from error


def _require_no_others(checkpoints: list[Path] | None, options: dict[str, object]) -> None:
    """Refuse arguments and options whose values are in the file of mergekit."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if checkpoints:
        given.insert(0, str(checkpoints[0]))
    if given:
        raise ValueError(f"--mergekit has the inputs, the method and its settings: leave out {given[0]}")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers in a text such as "1,0.5"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{option} must be numbers with commas between them, such as 1,0.5; got {text!r}"
        ) from None


def _device(name: str) -> torch.device:
    import torch

    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not cuda:
        raise ValueError("--device cuda was requested, but PyTorch finds no CUDA device")
    if not cuda or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
