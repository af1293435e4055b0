"""What every LoRA variant must show, as one function: parity, graphs, copies, files."""

from __future__ import annotations

import copy

import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import testing


def gradients(module, run, x, dtype, kind):
    """{name: value} of y and every gradient: of ``module`` itself (kind None), or of ``run(parameters, x)`` in ``kind``."""
    h = x.to(dtype).to(kind or dtype).requires_grad_()
    if kind is None:
        module.zero_grad()
        y = run(None, h)
        leaves = dict(module.named_parameters())
    else:
        leaves = {name: p.detach().to(kind).requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
        y = run(leaves, h)
    torch.manual_seed(9)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype))
    grads = {name: p.grad for name, p in leaves.items() if p.requires_grad and p.grad is not None}
    return {"y": y.detach(), "x": h.grad, **grads}


def assert_parity(module, formula, x, dtype, *condition):
    """``formula(parameters, x)`` is the definition in plain torch, on the module's named parameters."""
    ours = gradients(module, lambda _, h: module(h, *condition), x, dtype, None)
    peer = gradients(module, formula, x, dtype, dtype)
    gold = gradients(module, formula, x, dtype, torch.float64)
    testing.assert_all_within_budget(ours, peer, gold, dtype)


def assert_whole(module, x, *condition):
    """torch.compile, checkpointing, deepcopy, autocast, a state dict's round trip, and the switch."""
    y = module(x, *condition)
    torch._dynamo.reset()  # of the layers that earlier tests have compiled
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *condition), y)
    torch.testing.assert_close(checkpoint(module, x, *condition, use_reentrant=False), y)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(x, *condition), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(x, *condition), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x, *condition)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1 * y.abs().max().item())
    module.disable()
    base = module(x, *condition)
    module.enable()
    assert base.shape == y.shape and not torch.allclose(base, y)
    compiled(x.clone().requires_grad_(), *condition).square().sum().backward()


def masked_in_training(module, x, *condition):
    """With dropout, the recomputed forward of checkpointing draws the same mask: equal gradients."""
    module.dropout_probability = 0.5
    module.train()
    results = []
    for run in (module, lambda *args: checkpoint(module, *args, use_reentrant=False)):
        torch.manual_seed(3)
        module.zero_grad()
        y = run(x, *condition)
        y.square().sum().backward()
        results.append([y.detach()] + [p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert len(results[0]) > 1
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    module.dropout_probability = 0.0
