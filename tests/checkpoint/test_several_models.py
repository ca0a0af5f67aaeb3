"""Merges of any number of models, and averages of checkpoints of a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import fuse_ranks_program
import pytest
import torch
from checkpoint_files import Triple, files_of, floats, load_folder, noisy, same
from command import Rkif
from safetensors.torch import save_file
from torch import Tensor
from torchrun import start_program

from rkif.checkpoint import fuse as fusing
from rkif.checkpoint import preflight as planning
from rkif.checkpoint.manifest import read_manifest, verify
from rkif.checkpoint.methods import SETTINGS, TaskArithmetic, make_method
from rkif.checkpoint.methods.averages import SHAPES
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.request import Request
from rkif.checkpoint.workdir import Workdir

MERGES = [name for name in SETTINGS if name not in ("recurrent_kif", "linear", "wsm")]


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    triple = Triple(tmp_path)
    triple.add_models(5)
    return triple


@pytest.fixture(params=[None, 512], ids=["whole", "cut"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(planning, "MAX_SLOT", request.param)
        monkeypatch.setattr(planning, "MIN_SLOT", 64)
        monkeypatch.setattr(planning, "TILE", 100)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", MERGES)
@pytest.mark.usefixtures("chunks")
def test_two_models_have_the_bits_of_the_kernel(
    triple: Triple, method: str, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"weight": (0.4, -0.7), "normalize": normalize, "lambda": 0.9}
    triple.fuse(method=method, out=triple.folder / "kernel", **settings)
    monkeypatch.setattr(TaskArithmetic, "streams", False)
    triple.fuse(method=method, out=triple.folder / "any", **settings)
    one, other = (read_manifest(triple.folder / out) for out in ("kernel", "any"))
    if "dare" not in method:  # the sums that restore norms differ in the last bits between backends
        assert files_of(triple.folder / "kernel") == files_of(triple.folder / "any")
    assert one["report"]["counts"] == other["report"]["counts"]
    for name, value in load_folder(triple.folder / "kernel").items():
        torch.testing.assert_close(load_folder(triple.folder / "any")[name], value)


def kept(vector: Tensor, density: float) -> Tensor:
    k = max(1, int(density * vector.numel() + 1e-9))
    mask = torch.zeros(vector.numel(), dtype=torch.bool)
    mask[vector.abs().view(-1).argsort(descending=True)[:k]] = True
    return vector * mask.view(vector.shape) if vector.numel() else vector


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.usefixtures("chunks")
def test_each_method_follows_its_formula(triple: Triple, count: int, normalize: bool) -> None:
    """In float32 no two magnitudes are equal here."""
    triple.base = {k: v.float() if v.is_floating_point() else v for k, v in triple.base.items()}
    names = triple.models(count)
    for seed, name in enumerate(names):
        setattr(triple, name, noisy(triple.base, 20 + seed))
    for name in ("base", *names):
        triple.save(name)
    weight = (0.4, 0.7, -0.2, 0.5, 0.3)[:count]
    total = sum(weight) if normalize else 1.0
    d = 0.3

    def plain(vectors: list[Tensor]) -> Tensor:
        return 0.9 * sum(w * v for w, v in zip(weight, vectors, strict=True)) / total

    def ties(vectors: list[Tensor]) -> Tensor:
        weighted = [w * kept(v, d) for w, v in zip(weight, vectors, strict=True)]
        sign = torch.where(reduce(torch.add, weighted) >= 0, 1.0, -1.0)
        agree = [(v.sign() == sign).float() for v in weighted]
        merged = sum(v * a for v, a in zip(weighted, agree, strict=True))
        divisor = (
            sum(w * a for w, a in zip(weight, agree, strict=True)) if normalize else torch.ones_like(sign)
        )
        return 0.9 * merged / torch.where(divisor == 0, 1.0, divisor)

    cases = {
        "task_arithmetic": plain,
        "magnitude_prune": lambda vectors: plain([kept(v, d) for v in vectors]),
        "ties": ties,
        "linear": None,
    }
    for method, merge in cases.items():
        settings: dict[str, Any] = {"weight": weight, "normalize": normalize, "lambda": 0.9, "density": d}
        chosen = {name: value for name, value in settings.items() if name in SETTINGS[method]}
        summary = triple.fuse(method=method, models=count, out=triple.folder / method, **chosen)
        got = load_folder(triple.folder / method)
        for name, base in floats(triple.base).items():
            ends = [getattr(triple, model)[name] for model in names]
            wanted = (
                sum(w * end for w, end in zip(weight, ends, strict=True)) / total
                if merge is None
                else base + merge([end - base for end in ends])
            )
            torch.testing.assert_close(
                got[name], wanted, msg=lambda text, n=name, m=method: f"{m} {n}: {text}"
            )
        report = summary.report
        assert sum(report["counts"].values()) == report["numel"]
        assert list(report["counts"]) == [str(n) for n in range(count + 1)]
        assert list(report["norms"]) == [*(f"MODEL {n + 1}" for n in range(count)), "update"]
        assert len(report["thresholds"]) == count


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.usefixtures("chunks")
def test_each_model_has_random_drops_of_its_own(triple: Triple, method: str) -> None:
    """One model after the other has the weight 1: its vector keeps its norm, and a share of its elements."""
    moved = []
    for chosen in range(4):
        weight = tuple(float(number == chosen) for number in range(4))
        out = triple.folder / f"{chosen}"
        triple.fuse(method=method, models=4, density=0.3, weight=weight, out=out)
        base, end = triple.base["embed.weight"].float(), getattr(triple, triple.models(4)[chosen])
        step = load_folder(out)["embed.weight"].float() - base
        whole = (end["embed.weight"].float() - base).abs().sum().item()
        assert step.abs().sum().item() == pytest.approx(whole, rel=0.05)
        moved.append((step != 0).flatten())
    for one in range(4):
        assert 0.25 < moved[one].float().mean() < 0.35
        for other in range(one):
            assert (moved[one] & moved[other]).float().mean() < 0.15
    triple.fuse(method=method, density=0.3, weight=(1.0, 0.0), out=triple.folder / "two")
    two = load_folder(triple.folder / "two")["embed.weight"].float() - triple.base["embed.weight"].float()
    assert torch.equal((two != 0).flatten(), moved[0])  # the draws of a merge of two


def test_the_weights_of_an_average_emulate_the_decay() -> None:
    """The update before checkpoint i has the sum of the weights from i on: the learning rate's shape."""
    for name, shape in SHAPES.items():
        weight = make_method("wsm", {"shape": name}, models=7).weight
        assert len(weight) == 8
        assert sum(weight) == pytest.approx(1)
        assert all(share > 0 for share in weight)
        for index in range(1, 8):
            assert sum(weight[index:]) == pytest.approx(shape(index / 8))
    assert make_method("wsm", {"shape": "linear"}, models=3).weight == pytest.approx([0.25] * 4)
    wanted = [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert make_method("wsm", {}, models=3).weight == pytest.approx(wanted)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.usefixtures("chunks")
def test_an_average_of_checkpoints_is_their_weighted_sum(triple: Triple, shape: str) -> None:
    triple.fuse(method="wsm", models=4, shape=shape)
    weight = make_method("wsm", {"shape": shape}, models=4).weight
    rows = [getattr(triple, name) for name in ("base", *triple.models(4))]
    wanted = {
        name: reduce(torch.add, [w * row[name].float() for w, row in zip(weight, rows, strict=True)]).to(
            value.dtype
        )
        for name, value in floats(triple.base).items()
    }
    same(floats(load_folder(triple.folder / "out")), wanted)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "wsm"])
def test_a_killed_merge_resumes_to_the_same_bytes(
    triple: Triple, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_SLOT", 4096)
    monkeypatch.setattr(planning, "MIN_SLOT", 64)
    monkeypatch.setattr(fusing, "UNRECORDED", 4096)
    triple.fuse(method=method, models=5, out=triple.folder / "whole")
    out = triple.folder / "out"
    keep = Workdir.record
    for point in (1, 4, 5):
        left = iter(range(point))

        def record(self: Workdir, content: dict[str, Any], left: Iterator[int] = left) -> None:
            if next(left) == point - 1:  # noqa: B023
                raise OSError(28, "No space left on device", "disk")
            keep(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(Workdir, "record", record)
            with pytest.raises(OSError, match="No space left"):
                triple.fuse(method=method, models=5, out=out, resume=True)
        assert not out.exists()
    assert triple.fuse(method=method, models=5, out=out, resume=True).resumed
    assert files_of(out) == files_of(triple.folder / "whole")


def test_manifest_card_and_provenance_name_all_inputs(rkif: Rkif, triple: Triple) -> None:
    out = triple.folder / "out"
    inputs = [triple.path(name) for name in ("base", *triple.models(4))]
    status, printed, _ = rkif("fuse", *inputs, "--out", out, "--method", "ties", "--weight", "1,1,0.5,0.5")
    assert status == 0
    assert "of 4 models" in printed
    arguments = ["BASE", "MODEL 1", "MODEL 2", "MODEL 3", "MODEL 4"]
    manifest = read_manifest(out)
    assert list(manifest["inputs"]) == arguments
    assert manifest["settings"]["weight"] == [1, 1, 0.5, 0.5]
    card = (out / "README.md").read_text()
    assert all(
        argument in card and facts["content_sha256"] in card for argument, facts in manifest["inputs"].items()
    )
    assert "inner.safetensors, outer.safetensors, model2.safetensors and model3.safetensors on base" in card
    definition = json.loads((out / "provenance.json").read_text())["predicate"]["buildDefinition"]
    assert list(definition["externalParameters"]["inputs"]) == arguments
    assert [one["annotations"]["argument"] for one in definition["resolvedDependencies"]] == arguments
    assert verify(out) == []


def test_an_average_from_the_command_line(rkif: Rkif, triple: Triple) -> None:
    for step, name in ((500, "base"), (1000, "inner"), (1500, "outer")):
        triple.path(name).rename(triple.folder / f"checkpoint-{step}.safetensors")
    folders = []
    for step in (500, 1000, 1500):
        folders.append(triple.folder / f"checkpoint-{step}")
        folders[-1].mkdir()
        (triple.folder / f"checkpoint-{step}.safetensors").rename(folders[-1] / "model.safetensors")
    status, output, _ = rkif(
        "fuse", *folders, "--out", triple.folder / "out", "--method", "wsm", "--shape", "linear", "--json"
    )
    summary = json.loads(output)
    assert (status, summary["notes"]) == (0, [])
    assert summary["settings"] == {"shape": "linear", "weight": pytest.approx([1 / 3] * 3)}
    assert list(summary["report"]["norms"]) == ["CHECKPOINT 2", "CHECKPOINT 3", "update"]
    card = (triple.folder / "out" / "README.md").read_text()
    assert "An average of 3 checkpoints, from checkpoint-500 to checkpoint-1500" in card
    status, output, _ = rkif("fuse", *folders, "--out", triple.folder / "shown", "--method", "wsm")
    assert status == 0
    shown = " ".join(output.split())
    assert "wsm, shape 1-sqrt, weight 0.57735,0.239146,0.183503" in shown
    assert "selected by all checkpoints 100.0%" in shown
    status, output, _ = rkif(
        "fuse", *reversed(folders), "--out", triple.folder / "back", "--method", "wsm", "--json"
    )
    assert json.loads(output)["notes"] == [
        "CHECKPOINT 1 and CHECKPOINT 2 are checkpoint-1500 and checkpoint-1000: "
        "wsm takes the oldest checkpoint first"
    ]


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        (2, [], "recurrent_kif fuses BASE, INNER and OUTER; got 2 checkpoints"),
        (4, [], "recurrent_kif fuses BASE, INNER and OUTER; got 4 checkpoints"),
        (1, ["--method", "ties"], "ties needs BASE and at least one model; got 1 checkpoint"),
        (1, ["--method", "wsm"], "wsm needs two checkpoints; got 1 checkpoint"),
        (3, ["--method", "wsm", "--shape", "square"], "shape must be one of 1-sqrt, linear, cosine; got"),
        (3, ["--method", "ties", "--shape", "linear"], "shape is not a setting of ties"),
        (4, ["--method", "ties", "--weight", "1,2"], "weight must have 3 numbers, one for each model after"),
        (3, ["--method", "wsm", "--weight", "1,2,3"], "weight is not a setting of wsm, which has shape"),
    ],
)
def test_a_wrong_number_of_checkpoints_is_one_clear_line(
    rkif: Rkif, triple: Triple, inputs: int, options: list[str], error: str
) -> None:
    names = ("base", *triple.models(5))[:inputs]
    status, output, errors = rkif("fuse", *map(triple.path, names), "--out", triple.folder / "out", *options)
    assert (status, output) == (1, "")
    assert errors.startswith(f"rkif: error: {error}")
    assert errors.count("\n") == 1


def test_problems_name_the_model(triple: Triple) -> None:
    del triple.model2["layer.1.bias"]  # type: ignore[attr-defined]
    triple.save("model2")
    with pytest.raises(ValueError, match=r"MODEL 3 lacks 'layer.1.bias'"):
        triple.fuse(method="ties", models=4)
    with pytest.raises(ValueError, match=r"CHECKPOINT 4 lacks 'layer.1.bias'"):
        triple.fuse(method="wsm", models=4)
    triple.model2 = noisy(triple.base, 5)  # type: ignore[attr-defined]
    triple.model2["layer.1.weight"][3, 4] = math.nan  # type: ignore[attr-defined]
    triple.save("model2")
    for method in ("ties", "wsm"):
        with pytest.raises(
            ValueError, match=r"(MODEL 3|CHECKPOINT 4): .*model2.* has nan in 'layer.1.weight'"
        ):
            triple.fuse(method=method, models=4)


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    values = {"w": torch.zeros(6_000_000)}
    for number in range(16):
        save_file(values, tmp_path / f"checkpoint-{number}.safetensors")
    memory = {}
    for count in (5, 16):
        inputs = [str(tmp_path / f"checkpoint-{number}.safetensors") for number in range(count)]
        words = ["fuse", *inputs, "--out", str(tmp_path / f"out{count}"), "--method", "wsm", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "rkif", *words, "--device", "cpu"], capture_output=True, check=True
        )
        memory[count] = json.loads(done.stdout)["memory"]
        paths = [Path(path) for path in inputs]
        request = Request(paths[0], tuple(paths[1:]), tmp_path / "x", make_method("wsm", {}, count - 1))
        slots = (count + 1) * 2 * preflight(request).slot
        assert slots <= planning.MOST_SLOTS * planning.MAX_SLOT
    assert memory[16] < memory[5] + (24 << 20)  # one tensor has 23 MiB: 11 more of them would be seen


def test_two_processes_merge_four_models(triple: Triple) -> None:
    inputs = [triple.path(name) for name in ("base", *triple.models(4))]
    for ranks in (1, 2):
        out = triple.folder / f"out{ranks}"
        words = [
            json.dumps({"slot": 4096}),
            "fuse",
            *inputs,
            "--out",
            out,
            "--method",
            "ties",
            "--scope",
            "global",
        ]
        done = start_program(fuse_ranks_program.__file__, ranks, *words, fails=False, torchrun=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(triple.folder / "out1") == files_of(triple.folder / "out2")
