"""A small training loop with a fuser, for tests of resume and of NaN gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkif import Fuser, FusionConfig


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, fuser: Fuser | None, optimizer: torch.optim.Optimizer, steps: range, sign: int
) -> None:
    for step in steps:
        (sign * model(batch(step))).exp().mean().backward()
        if fuser is not None:
            fuser.observe()
        optimizer.step()
        optimizer.zero_grad()


class Loop:
    """A training loop whose state can be saved and loaded, as in a killed and resumed program."""

    def __init__(self, config: FusionConfig) -> None:
        self.model = make_model()
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.outer = torch.optim.AdamW(self.model.parameters(), lr=3e-2)
        self.fuser = Fuser(self.model, config)

    def run(self, events: range) -> None:
        """Event 0..2 inner steps, 3 begins the outer phase, 4 and 5 outer steps, 6 fuses; and again."""
        for event in events:
            phase = event % 7
            if phase == 3:
                self.fuser.begin_outer()
            elif phase == 6:
                self.fuser.fuse()
            else:
                optimizer, sign = (self.inner, 1) if phase < 3 else (self.outer, -1)
                train(self.model, self.fuser, optimizer, range(event, event + 1), sign)

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def poisoned_loop(nonfinite: str) -> Loop:
    loop = Loop(FusionConfig(nonfinite=nonfinite))
    loop.run(range(2))
    loop.model(batch(0)).sum().backward()
    loop.model[0].bias.grad[3] = torch.nan
    loop.fuser.observe()
    loop.inner.zero_grad()
    loop.run(range(3, 6))
    return loop
