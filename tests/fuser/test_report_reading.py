"""A report reads its figures from the device when they are first used; otherwise it is a plain report."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reads import device_reads

import rkif

ROOT = Path(__file__).parent.parent.parent
ROUNDS = """
import json
from bench.kernels.host import Case, large_model
from device_reads import device_reads

with large_model() as counter:
    case = Case(5)
    for _ in range(4):
        case.until_fuse()
        case.fuser.fuse()
    with device_reads() as reads:
        found = {}
        case.until_fuse()
        found["steps"] = list(reads)
        counter.launches.clear()
        report = case.fuser.fuse()
        found["fuse"], found["launches"] = list(reads), len(counter.launches)
        assert (report.numel, report.applied, report.nonfinite, report.gate) == (640, True, 0, None)
        found["known"] = list(reads)
        assert report.counts is report.counts and report.norms and report.thresholds
        found["figures"] = list(reads)
print(json.dumps(found))
"""


def fused(seed: int = 0, scope: Any = "global") -> rkif.FusionReport:
    generator = torch.Generator().manual_seed(seed)
    names = ("base", "inner", "outer", "inner_importance", "outer_importance")
    shapes = {"a": (7, 5), "b": (5,)}
    arguments: dict[str, Any] = {
        name: {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()} for name in names
    }
    return rkif.fuse(**arguments, scope=scope).report


def test_reads_of_the_device_are_recorded() -> None:
    values = torch.arange(3)
    with device_reads() as reads:
        assert int(values[1]) == 1
        assert values.tolist() == [0, 1, 2]
        assert bool(values.any())
        assert values.numpy()[2] == 2
    assert reads == ["_local_scalar_dense", "tolist", "_local_scalar_dense", "numpy"]


def test_a_round_reads_one_number_before_its_fusion_and_the_report_when_it_is_used() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    number = ["_local_scalar_dense"]
    assert found.pop("launches") > 1
    assert found == {"steps": [], "fuse": number, "known": number, "figures": [*number, "tolist"]}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    "use",
    [
        copy.copy,
        copy.deepcopy,
        lambda report: pickle.loads(pickle.dumps(report)),
        dataclasses.replace,
        lambda report: rkif.FusionReport(**dataclasses.asdict(report)),
        lambda report: report,
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "asdict", "itself"],
)
def test_an_unread_report_is_used_like_a_read_one(use: Any, scope: str) -> None:
    read, unread = fused(scope=scope), fused(scope=scope)
    assert read.thresholds
    found = use(unread)
    assert found == read
    assert repr(found) == repr(read)
    assert found.to_dict() == read.to_dict()
    assert str(found) == str(read)


def test_unread_reports_can_be_compared() -> None:
    assert fused() == fused()
    assert fused() != fused(seed=1)


def test_a_name_that_a_report_lacks_raises() -> None:
    report: Any = fused()
    for _ in range(2):
        with pytest.raises(AttributeError, match="'FusionReport' object has no attribute 'threshold'"):
            _ = report.threshold
        assert report.counts


def test_later_rounds_do_not_change_a_report() -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    reports, expected = [], []
    for read in (True, False):
        with torch.no_grad():
            parameter.copy_(torch.linspace(-1, 1, 64))
        fuser = rkif.Fuser([("p", parameter)], rkif.FusionConfig.paper())
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for _ in range(3):
            for phase in ("inner", "outer"):
                if phase == "outer":
                    fuser.begin_outer()
                parameter.grad = parameter.detach().cos()
                fuser.observe()
                optimizer.step()
            report = fuser.fuse()
            reports.append(report)
            if read:
                expected.append(report.to_dict())
    assert [report.to_dict() for report in reports] == expected * 2


def test_several_threads_may_use_an_unread_report() -> None:
    wanted = fused().to_dict()
    for _ in range(20):
        report, found = fused(), []
        start = threading.Barrier(4)

        def use(report: rkif.FusionReport = report, found: Any = found, start: Any = start) -> None:
            start.wait()
            found.append(report.to_dict())

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [wanted] * 4


@pytest.mark.gpu
def test_fuse_does_not_wait_for_the_device() -> None:
    parameter = torch.nn.Parameter(torch.rand(1 << 20, device="cuda"))
    fuser = rkif.Fuser([("p", parameter)])
    parameter.grad = torch.ones_like(parameter)
    for checked in (False, False, False, True):
        fuser.observe()
        fuser.begin_outer()
        fuser.observe()
        if checked:
            fuser._nonfinite = torch.zeros(2, dtype=torch.int64)  # on the host: it is read without waiting
            torch.cuda.set_sync_debug_mode("error")
        try:
            report = fuser.fuse()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        assert sum(report.counts.values()) == 1 << 20
