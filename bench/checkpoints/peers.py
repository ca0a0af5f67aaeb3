"""Fusing checkpoints on disk, compared with other merging tools and with a copy: CPU time and memory."""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.common.machine import commit, device_name
from bench.common.rows import RESULTS, Row, read, versions, write_all
from rkif.files import write_text

ROWS = RESULTS / "checkpoints.jsonl"
NAMES = ("base", "inner", "outer")
DENSITY, WEIGHTS = 0.2, (0.4, 0.6)

# Name of a command -> what it selects.
SELECTS = {
    "read": "nothing: the inputs are read",
    "cat": "nothing: the inputs are copied",
    "rkif start": "nothing: imports",
    "mergekit start": "nothing: imports",
    "rkif recurrent_kif": "20 % of all parameters of each task vector by magnitude, exact",
    "rkif recurrent_kif, CPU": "the same",
    "rkif ties": "20 % of each tensor by magnitude, exact; majority sign",
    "rkif dare_ties": "20 % at random, by seed; majority sign",
    "rkif task_arithmetic": "everything",
    "mergekit ties": "20 % of each tensor by magnitude, by sorting; majority sign",
    "mergekit dare_ties": "20 % at random; majority sign",
    "mergekit della": "20 % at random, more likely for larger values of a row; majority sign",
    "mergekit arcee_fusion": "by divergence of the weights' softmax, per tensor; threshold from a sample",
    "mergekit task_arithmetic": "everything",
    "peft ties": "20 % of each tensor by magnitude, by topk; majority sign; tensors in memory",
}

# The imports of `rkif fuse`. `rkif --help` imports no PyTorch, but `mergekit-yaml --help` does.
START = """
from rkif.cli.options import importing
with importing():
    from rkif.checkpoint import display, fuse
"""

# PEFT merges adapters of a loaded model. Its tensor functions can merge a whole model.
PEFT = """
import json, sys, torch
from pathlib import Path
from peft.utils.merge_utils import ties
from safetensors.torch import load_file, save_file
base, inner, outer = ({k: v for f in sorted(Path(p).glob("*.safetensors")) for k, v in load_file(f).items()}
                      for p in sys.argv[1:4])
out, density, weights = Path(sys.argv[4]), float(sys.argv[5]), torch.tensor(json.loads(sys.argv[6]))
out.mkdir()
merged = {}
for name, value in base.items():
    start = value.float()
    deltas = [end[name].float() - start for end in (inner, outer)]
    merged[name] = (start + ties(deltas, weights, density)).to(value.dtype)
save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
"""


@dataclass(frozen=True)
class Cost:
    """Cost of a process: CPU and wall-clock seconds, peak bytes of anonymous and of resident memory."""

    cpu_s: float
    wall_s: float
    anonymous: int
    resident: int


def make(folder: Path, layers: int) -> None:
    """Write three Llama-shaped bf16 checkpoints in files of up to 200 MB, unless they exist."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if all((folder / name / "model.safetensors.index.json").exists() for name in NAMES):
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).bfloat16()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for name in NAMES:
        if name != "base":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(base[key].float() + 0.002 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name, max_shard_size="200MB")


def compare(
    folder: Path, layers: int, peers: Path | None, device: torch.device, rounds: int, console: Console
) -> None:
    """Run all commands in turn, ``rounds`` times, and write a row for each.

    Args:
        folder: for the checkpoints, which are made if they are missing, and for temporary outputs.
        layers: number of layers of the checkpoints; 12 are 220 million parameters, 96 are 1.3 billion.
        peers: Python of an environment with mergekit and peft; None leaves them out.
        device: the device of rkif; the other tools compute on the CPU.
    """
    folder = folder / f"{layers}-layers"
    make(folder, layers)
    commands = _commands(folder.resolve(), peers, device)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for name, command in commands.items():
        _run(command, folder)  # warms the cache and compiles bytecode
        console.print(f"ready: {name}")
    for number in range(rounds):
        for name, command in commands.items():
            costs[name].append(_run(command, folder))
            console.print(f"round {number + 1}: {name} {costs[name][-1].cpu_s:.1f} s of CPU")
    parameters = _parameters(folder / "base")
    fresh = [
        _row(name, measured, peers, device) | {"parameters": parameters} for name, measured in costs.items()
    ]
    replaced = {_key(row) for row in fresh}
    write_all(ROWS, [*(row for row in read(ROWS) if _key(row) not in replaced), *fresh])
    console.print(markdown(), markup=False)


def markdown() -> str:
    """The rows as tables, with each command's CPU time as a multiple of rkif's."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in read(ROWS):
        groups.setdefault(_key(row)[1:], []).append(row)
    return "\n".join(map(_table, groups.values()))


def _key(row: Row) -> tuple[Any, ...]:
    return row["name"], row["device"], row["parameters"]


def _parameters(folder: Path) -> int:
    """Number of parameters of a checkpoint, from its files' headers."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _table(group: Sequence[Row]) -> str:
    rows = {row["name"]: row for row in group}
    ours = rows["rkif recurrent_kif"]
    versions_ = ", ".join(f"{name} {version}" for name, version in ours["versions"].items())
    peers = "".join(f"; {peer}" for peer in sorted({row["peer"] for row in group if row["peer"]}))
    rounds = "one round" if ours["rounds"] == 1 else f"medians of {ours['rounds']} alternating rounds"
    lines = [
        f"{ours['device']}; commit {ours['commit']}; {versions_}{peers}. {ours['parameters']:,} parameters, "
        f"bf16, in files of 200 MB; {rounds}, with a warm cache.",
        "",
        "| | CPU s | multiple of rkif's | wall s | anonymous memory, MiB | selects |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in sorted(rows, key=lambda name: rows[name]["cpu_s"]):
        row = rows[name]
        lines.append(
            f"| {name} | {row['cpu_s']:.1f} | {row['cpu_s'] / ours['cpu_s']:.1f} | {row['wall_s']:.1f} | "
            f"{row['anonymous'] / 2**20:,.0f} | {SELECTS[name]} |"
        )
    return "\n".join(lines) + "\n"


def _commands(folder: Path, peers: Path | None, device: torch.device) -> dict[str, list[str]]:
    inputs = [str(folder / name) for name in NAMES]
    out = str(folder / "made")
    files = " ".join(f"'{path}'/*.safetensors" for path in inputs)
    rkif = [sys.executable, "-m", "rkif"]
    fuse = [*rkif, "fuse", *inputs, "--out", out, "--max-shard-size", "200MB", "--json", "--device"]
    chosen = [*fuse, device.type]
    ours = ["--outer-from", "base", "--density", str(DENSITY)]
    merge = ["--weight", ",".join(map(str, WEIGHTS)), "--no-normalize"]
    density = ["--density", str(DENSITY)]
    commands = {
        "read": ["sh", "-c", f"cat {files} > /dev/null"],
        "cat": ["sh", "-c", f"mkdir '{out}' && cat {files} > '{out}/all'"],
        "rkif start": [sys.executable, "-c", START],
        "rkif recurrent_kif": [*chosen, *ours],
        "rkif ties": [*chosen, "--method", "ties", *merge, *density],
        "rkif dare_ties": [*chosen, "--method", "dare_ties", *merge, *density],
        "rkif task_arithmetic": [*chosen, "--method", "task_arithmetic", *merge],
    }
    if device.type != "cpu":
        commands["rkif recurrent_kif, CPU"] = [*fuse, "cpu", *ours]
    if peers is not None:
        mergekit = str(peers.parent / "mergekit-yaml")
        commands["mergekit start"] = [mergekit, "--help"]
        for method in ("ties", "dare_ties", "della", "arcee_fusion", "task_arithmetic"):
            config = folder / f"{method}.yml"
            write_text(config, json.dumps(_mergekit(method, inputs)))
            options = ["--out-shard-size", "200M", "--random-seed", "0", "--no-copy-tokenizer", "--quiet"]
            commands[f"mergekit {method}"] = [mergekit, str(config), out, *options]
        numbers = [str(DENSITY), json.dumps(WEIGHTS)]
        commands["peft ties"] = [str(peers), "-c", PEFT, *inputs, out, *numbers]
    return commands


def _mergekit(method: str, inputs: Sequence[str]) -> dict[str, Any]:
    """A config for mergekit, which reads JSON as YAML."""
    common = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    base, inner, outer = inputs
    if method == "arcee_fusion":
        return {**common, "base_model": inner, "models": [{"model": inner}, {"model": outer}]}
    sparse: dict[str, float] = {} if method == "task_arithmetic" else {"density": DENSITY}
    sparse |= {"epsilon": 0.1} if method == "della" else {}
    models = [
        {"model": model, "parameters": {"weight": weight, **sparse}}
        for model, weight in zip((inner, outer), WEIGHTS, strict=True)
    ]
    return {**common, "base_model": base, "models": models, "parameters": {"normalize": False}}


def _run(command: Sequence[str], folder: Path) -> Cost:
    """Run a command and measure its cost; its output is removed.

    Raises:
        RuntimeError: the command failed.
    """
    shutil.rmtree(folder / "made", ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    shutil.rmtree(folder / "made", ignore_errors=True)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {errors.strip().splitlines()[-1:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, peak[0], usage.ru_maxrss * 1024)


def _watch(process: int, peak: list[int]) -> None:
    """Record the peak of a process's anonymous memory until it ends."""
    status = Path(f"/proc/{process}/status")
    while True:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
        except OSError:
            return
        if not lines:  # the process has ended
            return
        peak[0] = max(peak[0], int(lines[0].split()[1]) * 1024)
        time.sleep(0.01)


def _row(name: str, costs: Sequence[Cost], peers: Path | None, device: torch.device) -> Row:
    package = name.partition(" ")[0]
    peer = ""
    if package in ("mergekit", "peft") and peers is not None:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([str(peers), "-c", code], capture_output=True, text=True, check=True)
        peer = f"{package} {done.stdout.strip()}"
    return {
        "name": name,
        "peer": peer,
        "cpu_s": round(statistics.median(cost.cpu_s for cost in costs), 3),
        "cpu_s_all": [round(cost.cpu_s, 3) for cost in costs],
        "wall_s": round(statistics.median(cost.wall_s for cost in costs), 3),
        "anonymous": max(cost.anonymous for cost in costs),
        "resident": max(cost.resident for cost in costs),
        "rounds": len(costs),
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
