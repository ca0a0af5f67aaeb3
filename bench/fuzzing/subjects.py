"""The inputs of the cases: a small finished run, and a small output of rkif fuse with its inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from bench.fuzzing.commandline import command
from rkif.demo import write_inputs
from rkif.ledger.chain import CHAIN_KEYS

TASKS = ["review", "tense"]
VICTIM = "another's file"


class Subjects:
    """Makes the run and the fused output once, and copies them for each case.

    Args:
        folder: for all files.

    Attributes:
        config: the config of the run.
        run, fused: the folders of the originals.
        run_seconds, fuse_seconds: the time of the commands that made them.

    Raises:
        RuntimeError: one of these commands failed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config, self.run, self.fused = folder / "config.yaml", folder / "run", folder / "fused"
        write_inputs(folder, train=24, dev=6, seed=1)
        loss = {"metric": "memory_loss", "floor": -1.0, "tolerance": None}
        settings = {
            "model": "model",
            "adapter": {"r": 2},
            "tasks": {"folder": "tasks", "order": TASKS},
            "text": {"max_length": 64},
            "method": "recurrent_kif",
            "fusion": {"inner_steps": 2, "outer_steps": 1},
            "training": {"steps": 6, "batch_size": 2, "learning_rate": 1e-2},
            "outer": {"batch_size": 2, "learning_rate": 1e-2},
            "memory": {"fraction": 0.1},
            "gate": {"criteria": [loss], "every": 2, "ladder": []},
            "checkpoint_every": 2,
            "threads": 1,
            "device": "cpu",
        }
        self.config.write_text(yaml.safe_dump(settings))
        self.inputs = [folder / f"{name}.safetensors" for name in ("base", "inner", "outer")]
        for seed, path in enumerate(self.inputs):
            generator = torch.Generator().manual_seed(seed)
            tensors = {f"layer.{n}.weight": torch.randn(40, 33, generator=generator) for n in range(4)}
            save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
        ended_commands = [command(*self.run_command(self.run)), command(*self.fuse_command(self.fused))]
        for ended in ended_commands:
            if ended.status != 0:
                raise RuntimeError(f"a command of the fuzzer's own failed: {ended.errors}")
        self.run_seconds, self.fuse_seconds = (ended.seconds for ended in ended_commands)

    def run_command(self, out: Path, *options: str) -> list[object]:
        return ["run", self.config, "--out", out, *options]

    def fuse_command(self, out: Path, *options: str) -> list[object]:
        return ["fuse", *self.inputs, "--out", out, "--device", "cpu", *options]

    def copy_of(self, original: Path) -> Path:
        """A copy in an otherwise empty folder, beside a file that no command may touch."""
        parent = self._folder / "case"
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir()
        (parent / "victim").write_text(VICTIM)
        return Path(shutil.copytree(original, parent / original.name))

    def place_for(self, name: str) -> Path:
        """A path in an empty folder."""
        shutil.rmtree(self._folder / "case", ignore_errors=True)
        (self._folder / "case").mkdir()
        return self._folder / "case" / name


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file, links not followed."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            files[str(path.relative_to(folder))] = str(path.readlink()).encode()
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def results(folder: Path) -> dict[str, object]:
    """The content that is equal in two runs with the same settings: all but times, and hashes over them.

    peft lists modules in a varying order; rkif sorts them.
    """
    values: dict[str, object] = {}
    for name, content in contents(folder).items():
        if name.endswith(("README.md", "provenance.json", ".torn")):
            continue
        if name == "ledger.jsonl":
            records = [json.loads(line) for line in content.splitlines()]
            values[name] = [{k: v for k, v in r.items() if k not in ("time", *CHAIN_KEYS)} for r in records]
        else:
            values[name] = content
    return values
