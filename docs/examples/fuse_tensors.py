"""rkif.fuse on dictionaries of tensors: no model class, no trainer, no state.

python docs/examples/fuse_tensors.py
"""

import torch

import rkif

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
new_task = torch.randn(256, 16), torch.randint(0, 4, (256,))
old_task = torch.randn(256, 16), torch.randint(0, 4, (256,))


def copies():
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(x, y, steps):
    """Train, and return the mean of |w*g| over the steps: the importance of each parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    importance = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            importance[name] += (p.detach() * p.grad).abs() / steps
        optimizer.step()
    return importance


train(*old_task, steps=100)
base = copies()
inner_importance = train(*new_task, steps=8)
inner = copies()
outer_importance = train(*old_task, steps=4)  # starts where the inner learner stopped
outer = copies()

result = rkif.fuse(base, inner, outer, inner_importance, outer_importance, density=0.2, rule="paper")
model.load_state_dict(result.params)

report = result.report
print(f"{report.numel} parameters, selected: {report.counts}")
print(f"thresholds: {report.thresholds[0]:.2e} (inner), {report.thresholds[1]:.2e} (outer)")
print("norms:", {name: round(norm, 3) for name, norm in report.norms.items()})
