"""A row of the benchmark that compares methods."""

from __future__ import annotations

from typing import Any


def continual_row(method: str, order: str, seed: int, op: float, **more: Any) -> dict[str, Any]:
    settings = {
        "training": {"steps": 3, "batch_size": 2},
        "adapter": more.pop("adapter", {"r": 4}),
        "precision": "float32",
    }
    return {
        "suite": "s",
        "order": order,
        "method": method,
        "rate": 1.0,
        "seed": seed,
        "op": op,
        "bwt": op - 60,
        "fwt": 1.0,
        "samples": 1000,
        "wall_s": 90.0,
        "model": "m",
        "split": "dev",
        "device": "d",
        "commit": "0123456789ab-dirty",
        "config": "s-m",
        "peak_mib": 512,
        "rkif_share": None,
        "tasks": ["a", "b"],
        "records": [100, 100],
        "accuracy": [[50, op], [50, op]],
        "settings": settings,
        **more,
    }
