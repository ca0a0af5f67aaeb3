"""A driver for Triton that launches nothing: it binds arguments, compiles for sm_90, and counts launches.

With it, host time, launches and compilations are measured without a GPU. Tensors are on the CPU, and kernels
write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

SHARED_MEMORY = 232_448  # maximum of bytes per program on an H100


class Counter:
    """Attributes:
    launches: names of the kernels launched, in order.
    compilations: names of the kernels compiled.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.compilations: list[str] = []


@contextmanager
def stub_driver() -> Iterator[Counter]:
    """Replace Triton's driver, and choose the Triton backend for CPU tensors, while the block runs.

    Raises:
        RuntimeError: Triton interprets kernels in this process, so it compiles none.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    from rkif_kernels.backends import choose

    if choose.interpreting():
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET")
    counter = Counter()

    class Launcher:
        def __init__(self, _source: Any, metadata: Any) -> None:
            self._name = metadata.name

        def __call__(self, *_: Any) -> None:
            counter.launches.append(self._name)

    class Utils:
        def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
            return 1, name, 0, 0, 1024

        def unload_module(self, _module: Any) -> None:
            pass

        def get_device_properties(self, _device: Any) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

    class Driver:
        launcher_cls = Launcher
        utils = Utils()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    def compiled(*, fn: Any, **_: Any) -> bool:
        counter.compilations.append(fn.name)
        return False

    before = driver._active
    driver.set_active(Driver())
    try:
        with (
            patch.object(compiler, "max_shared_mem", lambda _device: SHARED_MEMORY),
            patch.object(choose, "resolve_backend", lambda _device, _requested: "triton"),
            patch.object(triton.knobs.runtime, "jit_post_compile_hook", compiled),
        ):
            yield counter
    finally:
        driver._active = before
