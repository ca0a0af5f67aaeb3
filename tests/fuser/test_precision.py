"""A thousand fusions of 16-bit parameters, compared with float32 parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rkif

ROUNDS = 1000
SIZE = 512


class Run:
    """Rounds with the same changes and selections for parameters of any dtype.

    The parameters stay in [1, 2), where a 16-bit dtype has one spacing. The learners change one element in
    twenty by that spacing, which is exact, so all rounding errors are those of the fusions.
    """

    def __init__(self, dtype: torch.dtype, spacing: float, config: rkif.FusionConfig) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.spacing = spacing
        start = 1.5 + spacing * torch.randint(-8, 9, (SIZE,), generator=self.generator)
        self.parameter = nn.Parameter(start.to(dtype))
        self.fuser = rkif.Fuser([("w", self.parameter)], config)

    @torch.no_grad()
    def learn(self) -> None:
        """One step of a learner, observed with all weights 1, so that weights do not affect the masks."""
        weights = self.parameter.clone()
        self.parameter.fill_(1)
        scores = torch.rand(SIZE, generator=self.generator).bfloat16()  # also exact in float16
        self.parameter.grad = scores.to(weights.dtype)
        self.fuser.observe()
        sign = torch.randint(0, 2, (SIZE,), generator=self.generator) * 2 - 1
        chosen = torch.rand(SIZE, generator=self.generator) < 0.05
        self.parameter.copy_(weights + (self.spacing * sign * chosen).to(weights.dtype))

    def rounds(self, count: int) -> Tensor:
        """The parameters after ``count`` rounds, in float32."""
        for _ in range(count):
            self.learn()
            with self.fuser.outer():
                self.learn()
            weights = self.parameter.detach()
            assert ((weights >= 1) & (weights < 2)).all()
        return self.parameter.detach().float()


@pytest.mark.parametrize("rule", ["paper", "release"])
@pytest.mark.parametrize(
    ("dtype", "spacing"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=["bf16", "fp16"]
)
def test_after_a_thousand_rounds_the_error_is_within_the_bound(
    dtype: torch.dtype, spacing: float, rule: str
) -> None:
    """The bound of docs/reference/semantics.md: the last rounding, and four float32 roundings per round."""
    config = rkif.FusionConfig(rule=rule, density=0.4)
    exact = Run(torch.float32, spacing, config).rounds(ROUNDS)
    found = Run(dtype, spacing, config).rounds(ROUNDS)
    assert (exact - 1.5).abs().max() > 8 * spacing  # the learners have changed the parameters
    bound = spacing / 2 + 4 * ROUNDS * 2.0**-24 * 2
    assert (found - exact).abs().max() <= bound


def test_without_float32_masters_the_error_exceeds_the_bound() -> None:
    """This shows that the test of the bound can fail."""
    spacing = 2.0**-7
    exact = Run(torch.float32, spacing, rkif.FusionConfig(density=0.4)).rounds(ROUNDS)
    config = rkif.FusionConfig(density=0.4, fp32_master=False)
    assert (Run(torch.bfloat16, spacing, config).rounds(ROUNDS) - exact).abs().max() > 4 * spacing


def test_unchanged_parameters_keep_their_bits() -> None:
    """Repeated fusions do not change parameters that neither learner changes."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = nn.Parameter(weights.clone())
    fuser = rkif.Fuser([("w", parameter)])
    parameter.grad = torch.ones_like(parameter)
    for _ in range(100):
        fuser.observe()
        with fuser.outer():
            fuser.observe()
    assert torch.equal(parameter, weights)


@pytest.mark.parametrize("offload", [False, True])
def test_the_next_round_starts_from_the_master(offload: bool) -> None:
    """By hand: 1 + 0.5 * 2^-7 rounds to 1 in bfloat16, and 1 + 2^-7 is exact."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    half = ((0.5, 0.5),) * 4
    rule = rkif.MergeWeights(*half)
    fuser = rkif.Fuser([("w", parameter)], rkif.FusionConfig(rule=rule, offload=offload))
    spacing = 2.0**-7
    found = []
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        fuser.observe()
        with torch.no_grad():
            parameter += spacing
        with fuser.outer():
            fuser.observe()
        found.append(((parameter.item() - 1) / spacing, (fuser.state_dict()["base.w"].item() - 1) / spacing))
    assert found == [(0.0, 0.5), (1.0, 1.0), (2.0, 1.5)]  # halves are rounded to even
    assert fuser.base()["w"].dtype == torch.bfloat16
    with torch.no_grad():
        parameter += 1
    fuser.rollback()
    assert (parameter.item() - 1) / spacing == 2.0
