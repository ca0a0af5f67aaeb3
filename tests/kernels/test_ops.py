"""The public operations: invalid arguments, and unusual but valid tensors."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_cases import NATIVE
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import rkif_kernels
from rkif_kernels import Scores
from rkif_kernels.backends.choose import interpreting, resolve_backend

pytestmark = pytest.mark.usefixtures("poisoned")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors of these tests are on the GPU")
backends = pytest.mark.parametrize(
    "backend", ["triton", "torch", pytest.param("native", marks=[NATIVE, CPU_ONLY])]
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6), (0.5, 0.5))


def update_arguments(n: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(n, generator=generator).to(DEVICE) for _ in range(4)]
    return {
        "params": [tensors[0]],
        "grads": [tensors[1]],
        "sensitivity": [tensors[2]],
        "uncertainty": [tensors[3]],
        "beta1": 0.85,
        "beta2": 0.5,
        "nonfinite": torch.zeros((), dtype=torch.int64, device=DEVICE),
    }


def fuse_arguments(n: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    out, base, inner, outer, s_in, s_out = ([torch.rand(n, generator=generator).to(DEVICE)] for _ in range(6))
    half = torch.tensor([0.5], device=DEVICE)
    return {
        "out": out,
        "base": base,
        "inner": inner,
        "outer": outer,
        "inner_scores": Scores(s_in),
        "outer_scores": Scores(s_out),
        "thresholds": (half, half),
        "weights": WEIGHTS,
    }


@backends
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 8191, 8192, 8193])
def test_the_default_launch_is_correct_at_block_and_chunk_boundaries(backend: str, n: int) -> None:
    """The default launch configuration at the boundaries of its blocks and chunks."""
    arguments = update_arguments(n)
    w, g, s, u = (arguments[key][0].clone() for key in ("params", "grads", "sensitivity", "uncertainty"))
    rkif_kernels.update_importance_(**arguments, backend=backend)
    keep1, take1, half = (torch.tensor(v, dtype=torch.float64).float() for v in (0.85, 1 - 0.85, 0.5))
    expected = keep1.to(DEVICE) * s + take1.to(DEVICE) * (w * g).abs()
    assert torch.equal(arguments["sensitivity"][0], expected)
    assert torch.equal(arguments["uncertainty"][0], half * u + half * ((w * g).abs() - expected).abs())

    arguments = fuse_arguments(n)
    stats = rkif_kernels.fuse_(**arguments, backend=backend)
    assert stats.counts.sum() == n
    if n:
        scores = arguments["inner_scores"]
        found = rkif_kernels.score_thresholds(scores, density=0.2, backend=backend)
        k = rkif_kernels.order_statistic_k(n, 0.2)
        assert found.item() == scores.sensitivity[0].sort().values[k].item()


@backends
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    ("density", "limit"), [(0, torch.inf), (1, -torch.inf), (0.0, torch.inf), (1.0, -torch.inf)]
)
def test_density_zero_and_one_read_no_score(backend: str, scope: str, density: float, limit: float) -> None:
    scores = Scores([torch.full((4,), torch.nan, device=DEVICE), torch.ones(3, device=DEVICE)])
    found = rkif_kernels.score_thresholds(scores, density=density, scope=scope, backend=backend)
    assert found.tolist() == [limit] * (2 if scope == "tensor" else 1)


@backends
def test_an_empty_tensor_has_a_threshold_that_selects_nothing(backend: str) -> None:
    scores = Scores(
        [torch.ones(0, device=DEVICE), torch.arange(6.0, device=DEVICE), torch.ones(0, device=DEVICE)]
    )
    found = rkif_kernels.score_thresholds(scores, density=0.2, scope="tensor", backend=backend)
    assert found.tolist() == [torch.inf, 4.0, torch.inf]
    assert rkif_kernels.score_thresholds(scores, density=0.2, backend=backend).tolist() == [4.0]
    with pytest.raises(ValueError, match="sensitivity is empty"):
        rkif_kernels.score_thresholds(Scores([torch.ones(0)]), density=0.5)


def irregular(kind: str, values: Tensor) -> Tensor:
    """The same 2-D values in memory that is not contiguous or not aligned."""
    if kind == "transposed":
        return values.t().contiguous().t()
    if kind == "strided":
        return torch.stack([values, values], dim=-1)[..., 0]
    shifted = torch.empty(values.numel() + 1, device=values.device)[1:].view(values.shape)
    return shifted.copy_(values)


@backends
@pytest.mark.parametrize("kind", ["transposed", "strided", "misaligned"])
def test_any_memory_layout_gives_the_same_values(backend: str, kind: str) -> None:
    plain = fuse_arguments(24)
    shaped: dict[str, Any] = {}
    for key, value in plain.items():
        if key in ("thresholds", "weights"):
            shaped[key] = value
        elif isinstance(value, Scores):
            shaped[key] = Scores([irregular(kind, value.sensitivity[0].view(4, 6))])
        else:
            shaped[key] = [irregular(kind, value[0].view(4, 6))]
    rkif_kernels.fuse_(**plain, backend=backend)
    rkif_kernels.fuse_(**shaped, backend=backend)
    assert torch.equal(shaped["out"][0], plain["out"][0].view(4, 6))

    update, expected = update_arguments(24), update_arguments(24)
    for key in ("params", "grads"):
        update[key] = [irregular(kind, update[key][0].view(4, 6))]
    for key in ("sensitivity", "uncertainty"):
        tensor = update[key][0].view(4, 6)
        update[key] = [irregular(kind, tensor) if kind == "misaligned" else tensor]
    rkif_kernels.update_importance_(**update, backend=backend)
    rkif_kernels.update_importance_(**expected, backend=backend)
    for key in ("sensitivity", "uncertainty"):
        assert torch.equal(update[key][0].reshape(-1), expected[key][0])


@backends
def test_a_repeated_call_gives_the_same_bits(backend: str) -> None:
    first, second = fuse_arguments(3000), fuse_arguments(3000)
    one = rkif_kernels.fuse_(**first, backend=backend)
    other = rkif_kernels.fuse_(**second, backend=backend)
    assert torch.equal(first["out"][0], second["out"][0])
    assert torch.equal(one.squared_norms, other.squared_norms)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads has 0 tensors, params has 1"),
        ({"grads": [torch.ones(4)]}, ValueError, r"grads\['w'\] has shape \(4,\), params\['w'\] has \(5,\)"),
        ({"grads": [torch.ones(5, dtype=torch.int64)]}, TypeError, r"grads\['w'\] has dtype int64"),
        ({"grads": [torch.ones(5, dtype=torch.float64)]}, TypeError, r"grads\['w'\] has dtype float64"),
        ({"grads": [torch.ones(5).to_sparse()]}, TypeError, r"grads\['w'\] must be a dense tensor"),
        ({"params": [None]}, TypeError, r"params\['w'\] must be a tensor; got NoneType"),
        ({"grads": [torch.ones(5, device="meta")]}, ValueError, r"grads\['w'\] is on meta"),
        ({"sensitivity": [torch.ones(5).half()]}, TypeError, r"sensitivity\['w'\] has dtype float16"),
        ({"uncertainty": [torch.ones(10)[::2]]}, ValueError, r"uncertainty\['w'\] must be contiguous"),
        ({"beta1": 1.5}, ValueError, "beta1 must be in .*; got 1.5"),
        ({"beta2": "x"}, TypeError, "beta2 must be a number; got 'x'"),
        ({"order": "third"}, ValueError, "order must be one of first, second, mixed; got 'third'"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, ValueError, "nonfinite must be one int64"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, native, torch; got 'cuda'"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the arguments above are on the CPU")
def test_update_importance_refuses_invalid_arguments(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = update_arguments()
    before = [arguments[key][0].clone() for key in ("sensitivity", "uncertainty")]
    kept = [arguments[key][0] for key in ("sensitivity", "uncertainty")]
    with pytest.raises(error, match=message):
        rkif_kernels.update_importance_(**arguments | change, names=["w"])
    assert all(map(torch.equal, kept, before))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inner": [torch.ones(4)]}, ValueError, r"inner\[0\] has shape \(4,\), out\[0\] has \(5,\)"),
        ({"inner_scores": Scores([])}, ValueError, "inner_scores has 0 tensors, out has 1"),
        ({"thresholds": (torch.zeros(1), torch.zeros(2))}, ValueError, "the outer threshold must be float32"),
        (
            {"weights": (*WEIGHTS[:3], (1.0, torch.nan))},
            ValueError,
            "weights for 'neither' must be two finite",
        ),
        ({"weights": (("1", "0"), *WEIGHTS[1:])}, ValueError, "weights for 'inner_only' must be two finite"),
        ({"outer_from": "outer"}, ValueError, "outer_from must be one of inner, base; got 'outer'"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the arguments above are on the CPU")
def test_fuse_refuses_invalid_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = fuse_arguments()
    before = arguments["out"][0].clone()
    with pytest.raises(error, match=message):
        rkif_kernels.fuse_(**arguments | change)
    assert torch.equal(arguments["out"][0], before)


@pytest.mark.parametrize(
    ("density", "error", "message"),
    [
        (-0.1, ValueError, "density must be in .*; got -0.1"),
        (1.1, ValueError, "density must be in .*; got 1.1"),
        (float("nan"), ValueError, "density must be in .*; got nan"),
        (None, TypeError, "density must be a number"),
        (torch.tensor(0.2), TypeError, "density must be a number"),
    ],
)
def test_thresholds_refuse_an_invalid_density(density: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rkif_kernels.score_thresholds(Scores([torch.ones(3)]), density=density)


def test_thresholds_refuse_too_few_names() -> None:
    scores = Scores([torch.ones(3), torch.ones(3, dtype=torch.float64)])
    with pytest.raises(ValueError, match="names has 1 names, sensitivity has 2 tensors"):
        rkif_kernels.score_thresholds(scores, density=0.5, names=["a"])


def test_names_include_those_of_empty_tensors() -> None:
    scores = Scores([torch.arange(3.0), torch.ones(0), torch.arange(2.0)])
    found = rkif_kernels.score_thresholds(scores, density=0.5, scope="tensor", names=["a", "b", "c"])
    assert found.tolist() == [1.0, math.inf, 0.0]


def test_outputs_that_share_memory_are_refused() -> None:
    memory = torch.zeros(20)
    arguments = {
        key: value * 2 if isinstance(value, list) else value for key, value in fuse_arguments(5).items()
    }
    for key in ("inner_scores", "outer_scores"):
        arguments[key] = Scores([torch.ones(5), torch.ones(5)])

    def fuse(**change: Any) -> None:
        rkif_kernels.fuse_(**arguments | change)

    apart = [memory[:5], memory[5:10]]
    fuse(out=apart)
    fuse(out=apart, base=apart)
    with pytest.raises(ValueError, match=r"out\[0\] and out\[1\] share memory"):
        fuse(out=[memory[:5], memory[4:9]])
    with pytest.raises(ValueError, match=r"base\[0\] shares memory with out\[1\]"):
        fuse(out=apart, base=[memory[5:10], memory[:5]])
    with pytest.raises(ValueError, match=r"outer\[0\] shares memory with out\[0\]"):
        fuse(out=apart, outer=[memory[1:6], torch.ones(5)])
    with pytest.raises(ValueError, match=r"out\[1\] is an expanded view"):
        fuse(out=[memory[:5], torch.zeros(1).expand(5)])


@backends
def test_autograd_detects_writes(backend: str) -> None:
    """A backward pass must not silently use a weight that was fused after the forward pass."""
    arguments = fuse_arguments()
    weight = torch.nn.Parameter(arguments["base"][0].clone())
    loss = (weight * weight).sum()
    rkif_kernels.fuse_(**arguments | {"out": [weight]}, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_density_one_selects_nan_scores(backend: str) -> None:
    s, u = torch.tensor([torch.inf, 1.0], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    arguments = fuse_arguments(2) | {"inner_scores": Scores([s], [u]), "outer_scores": Scores([s], [u])}
    for density, counts in ((1, [0, 0, 2, 0]), (0, [0, 0, 0, 2])):
        limit = rkif_kernels.score_thresholds(Scores([s], [u]), density=density, backend=backend)
        stats = rkif_kernels.fuse_(**arguments | {"thresholds": (limit, limit)}, backend=backend)
        assert stats.counts.tolist() == counts


@backends
def test_a_weight_of_negative_zero_counts_as_zero(backend: str) -> None:
    zeros = [torch.tensor([-0.0], device=DEVICE)]
    weights = {"weights": ((-0.0, -0.0),) * 4}
    arguments = fuse_arguments(1) | {"base": zeros, "inner": zeros, "outer": zeros} | weights
    rkif_kernels.fuse_(**arguments, backend=backend)
    assert math.copysign(1, arguments["out"][0].item()) == 1


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(backend: str, dtype: torch.dtype) -> None:
    arguments = fuse_arguments(20)
    scores = Scores([torch.ones(0, device=DEVICE), *arguments["inner_scores"].sensitivity])
    expected = rkif_kernels.score_thresholds(scores, density=0.2, scope="tensor", backend=backend)
    torch.set_default_dtype(dtype)
    try:
        found = rkif_kernels.score_thresholds(scores, density=0.2, scope="tensor", backend=backend)
        all_of_them = rkif_kernels.score_thresholds(scores, density=1, backend=backend)
        rkif_kernels.fuse_(**arguments, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert all_of_them.dtype == torch.float32


def test_tensor_subclasses_are_refused() -> None:
    wrapped = TwoTensor(torch.ones(5), torch.ones(5))
    with pytest.raises(TypeError, match=r"inner\[0\] is a TwoTensor; tensors that wrap others"):
        rkif_kernels.fuse_(**fuse_arguments() | {"inner": [wrapped]})


def test_auto_chooses_the_backend_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert resolve_backend(cuda, "auto") == ("torch" if interpreting() else "triton")
    assert resolve_backend(cuda, "torch") == "torch"
    assert resolve_backend(mps, "auto") == "torch"
    with pytest.raises(RuntimeError, match="does not support device mps"):
        resolve_backend(mps, "triton")
    with pytest.raises(RuntimeError, match="does not support device cuda"):
        resolve_backend(cuda, "native")
    for library, chosen in ((object(), "native"), (None, "torch")):
        monkeypatch.setattr("rkif_kernels.backends.choose.library", lambda library=library: library)
        assert resolve_backend(cpu, "auto") == chosen
    with pytest.raises(RuntimeError, match=r"was not built .*, or cannot be loaded"):
        resolve_backend(cpu, "native")


def test_an_explicit_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="cannot reach CUDA tensors while TRITON_INTERPRET is set"):
        resolve_backend(torch.device("cuda"), "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert resolve_backend(torch.device("cuda"), "auto") == "triton"
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
        resolve_backend(torch.device("cpu"), "triton")
    monkeypatch.setattr("rkif_kernels.backends.choose._triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve_backend(torch.device("cuda"), "triton")
    assert resolve_backend(torch.device("cuda"), "auto") == "torch"


@pytest.mark.parametrize("package", ["rkif", "rkif_kernels", "rkif.continual.config", "rkif.cli"])
def test_import_needs_neither_triton_nor_transformers_nor_peft(package: str) -> None:
    code = (
        f"import sys, {package}\n"
        "heavy = {'triton', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@backends
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 8191, 8193])
def test_negative_and_nan_scores_are_found(backend: str, n: int) -> None:
    fine = [torch.rand(n, device=DEVICE), torch.tensor([0.0, -0.0, torch.inf], device=DEVICE).bfloat16()]
    assert rkif_kernels.all_valid_scores(fine, backend=backend)
    for bad in (-1e-45, torch.nan, -torch.inf):
        for position in {0, n - 1} if n else ():
            wrong = fine[0].clone()
            wrong[position] = bad
            assert not rkif_kernels.all_valid_scores([fine[1], wrong], backend=backend)


@backends
@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_thresholds_need_not_be_contiguous(backend: str, layout: str) -> None:
    values = torch.tensor([0.1, 9.0, 0.5, 9.0, 0.9, 9.0], device=DEVICE)
    limits = values[::2] if layout == "strided" else values[2].expand(3)
    parts = {
        name: [torch.rand(50, device=DEVICE) for _ in range(3)]
        for name in ("out", "base", "inner", "outer", "inner_scores", "outer_scores")
    }
    scores = {name: Scores(parts[name]) for name in ("inner_scores", "outer_scores")}
    arguments = fuse_arguments() | parts | scores
    counts = []
    for given in (limits, limits.contiguous()):
        stats = rkif_kernels.fuse_(**arguments | {"thresholds": (given, given)}, backend=backend)
        counts.append(stats.counts.tolist())
    assert counts[0] == counts[1]


def test_memory_under_two_dtypes_is_refused() -> None:
    out = torch.zeros(8)
    with pytest.raises(ValueError, match=r"base\[0\] shares memory with out\[0\]"):
        rkif_kernels.fuse_(**fuse_arguments(8) | {"out": [out], "base": [out.view(torch.bfloat16)[:8]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"uncertainty": a["sensitivity"]}, r"uncertainty\[0\] shares memory with sensitivity"),
        (lambda a: a | {"sensitivity": a["grads"]}, r"grads\[0\] shares memory with sensitivity\[0\]"),
        (
            lambda a: a | {name: a[name] * 2 for name in ("params", "grads", "sensitivity", "uncertainty")},
            r"sensitivity\[0\] and sensitivity\[1\] share memory",
        ),
    ],
    ids=["S is U", "S is the gradient", "S twice"],
)
def test_states_that_share_memory_are_refused(change: Any, message: str) -> None:
    arguments = change(update_arguments())
    with pytest.raises(ValueError, match=message):
        rkif_kernels.update_importance_(**arguments)


@backends
def test_unwritable_tensors_are_refused_before_any_write(backend: str) -> None:
    arguments = update_arguments()
    before = arguments["sensitivity"][0].clone()
    with torch.inference_mode():
        frozen = torch.zeros((), dtype=torch.int64, device=DEVICE)
        states = [torch.ones(5, device=DEVICE)]
        rkif_kernels.update_importance_(**update_arguments() | {"sensitivity": states}, backend=backend)
    for change in ({"nonfinite": frozen}, {"uncertainty": states}):
        with pytest.raises(ValueError, match="was made in inference mode"):
            rkif_kernels.update_importance_(**arguments | change, backend=backend)
    assert torch.equal(arguments["sensitivity"][0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.view(torch.int32), "dtype int32"),
        (lambda t: t.view(2, 4), r"shape \(2, 4\)"),
        (lambda t: t[:4], r"shape \(4,\)"),
        (lambda t: TwoTensor(t, t), "TwoTensor"),
    ],
    ids=["dtype", "shape", "size", "type"],
)
def test_cached_checks_do_not_accept_other_lists(change: Any, message: str) -> None:
    """Checks are skipped for known lists, but not for other tensors at the same addresses."""
    arguments = update_arguments(8)
    rkif_kernels.update_importance_(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        rkif_kernels.update_importance_(**arguments | {"grads": [change(arguments["grads"][0])]})
    transposed = update_arguments(8)
    transposed = {k: [v[0].view(2, 4)] if isinstance(v, list) else v for k, v in transposed.items()}
    rkif_kernels.update_importance_(**transposed)
    state = transposed["sensitivity"][0]
    with pytest.raises(ValueError, match="must be contiguous"):
        rkif_kernels.update_importance_(**transposed | {"sensitivity": [state.as_strided((2, 4), (1, 2))]})


@backends
def test_a_negated_view_is_read_with_its_sign(backend: str) -> None:
    negated = torch.tensor([1 + 2j, 3 - 4j], device=DEVICE).conj().imag
    assert negated.is_neg()
    arguments = fuse_arguments(2) | {"base": [negated], "weights": ((0.0, 0.0),) * 4}
    rkif_kernels.fuse_(**arguments, backend=backend)
    assert arguments["out"][0].tolist() == [-2.0, 4.0]
