"""``rkif plan``: how much device memory recurrent training needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from rkif.cli.options import announce, parse_size

commands = typer.Typer()


@commands.command("plan", rich_help_panel="Start")
def plan_command(
    model: Annotated[Path, typer.Option("--model", help="A config.json, or the folder of a model.")],
    device_memory: Annotated[str, typer.Option("--device-memory", help="Memory of each device.")] = "80GiB",
    reserve: Annotated[
        str,
        typer.Option(help="Memory for activations and all else that the plan does not count."),
    ] = "8GiB",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32 or bfloat16.")] = "bfloat16",
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank.", show_default="all parameters")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Modules that get adapters, such as q_proj,v_proj.", show_default="peft's choice"),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or sgd, for both learners.")] = "adamw",
    importance: Annotated[
        str, typer.Option(help="Importance: sensitivity_uncertainty or sensitivity.")
    ] = "sensitivity_uncertainty",
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices for FSDP2.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show how much device memory recurrent training needs, and settings with which it fits.

    Only the model's config.json is read. It is an error if no settings fit.

    \b
    Examples:
      rkif plan --model ./llama --device-memory 80GiB
      rkif plan --model ./llama --lora-r 8 --target-modules q_proj,v_proj
    """
    announce(f"Counting the parameters of {model}")
    from rich.console import Console

    from rkif.config import Importance
    from rkif.plan import Training, choose
    from rkif.plan.bytes import Optimizer
    from rkif.plan.display import as_json as plan_json
    from rkif.plan.display import bytes_table, options_table, settings
    from rkif.plan.model import count_parameters
    from rkif_kernels import require_choice

    memory, reserved = parse_size("--device-memory", device_memory), parse_size("--reserve", reserve)
    require_choice("--dtype", dtype, ["float32", "bfloat16"])
    require_choice("--optimizer", optimizer, get_args(Optimizer))
    require_choice("--importance", importance, get_args(Importance))
    if target_modules is not None and lora_r is None:
        raise ValueError("--target-modules is for adapters: give their rank with --lora-r")
    targets = None if target_modules is None else [one.strip() for one in target_modules.split(",")]
    counts = count_parameters(model, rank=lora_r, targets=targets)
    width = 4 if dtype == "float32" else 2
    training = Training(
        counts.trainable,
        counts.frozen,
        counts.largest,
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
            f"{counts.name}: {counts.trainable:,} parameters are trained{of}, {counts.frozen:,} are not\n",
            highlight=False,
        )
        console.print(bytes_table(training, (chosen or budgets[-1]).option))
        console.print(options_table(budgets, chosen, memory))
        if chosen is not None and chosen.option.changes:
            where = "With a Fuser or a Trainer" if chosen.option.pack_inner else "In a config"
            console.print(f"{where}:\n\n{settings(chosen.option)}\n", highlight=False)
            if chosen.option.pack_inner:
                console.print("rkif run refuses pack_inner, because its report needs all scores.\n")
    if chosen is None:
        least = min(one.bytes for one in budgets)
        raise ValueError(
            f"nothing fits in {memory / 2**30:.4g} GiB per device; the minimum is {least / 2**30:.2f} GiB, "
            f"of which --reserve is {reserved / 2**30:.4g} GiB; use more --ranks, another --optimizer, or "
            "adapters (--lora-r)"
        )
