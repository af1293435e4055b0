"""PEFT models and the three-way comparison that the tests of the drop-in share.

gold = PEFT in fp64, peer = PEFT in the tested dtype, ours = the accelerated model; each in the same state, with the
same weights and, at p > 0, with the mask that our operator drew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.integrations import accelerate
from fastpeft.integrations.peft import linear
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask

Results = dict[str, torch.Tensor]
TARGETS = ["lin0", "conv", "inner.lin1"]


class Toy(nn.Module):
    """Every kind of base layer that is fused: bias, no bias, Conv1D, nested; and a head for modules_to_save."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(20, 24)
        self.conv = Conv1D(28, 24)
        self.inner = nn.ModuleDict({"lin1": nn.Linear(28, 24, bias=False)})
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.lin0(x))
        x = torch.tanh(self.conv(x))
        return self.head(self.inner["lin1"](x))


def toy(
    adapters: int = 1, base: torch.dtype = torch.float32, autocast_adapter: bool = True, **config: Any
) -> nn.Module:
    """A PEFT model around `Toy` whose adapters are not zero; ranks and scales differ between adapters."""
    model: Any = None
    for i in range(adapters):
        settings = {
            "r": 4 + 3 * i,
            "lora_alpha": 6 + i,
            "target_modules": TARGETS,
            "init_lora_weights": False,
            **config,
        }
        if model is None:
            model = get_peft_model(Toy().to(base), LoraConfig(**settings), autocast_adapter_dtype=autocast_adapter)
        else:
            model.add_adapter(f"second{i}" if i > 1 else "second", LoraConfig(**settings))
    return model


def batch(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 5, 20)) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)}


def accelerated(model: nn.Module) -> nn.Module:
    accelerate(model)
    return model


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft_layer.Linear)]


class RecoveredDropout(nn.Module):
    """PEFT's dropout with the mask that our operator draws from the same state of torch's generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        seed = draw_seed(x.device)
        rows = x.reshape(-1, x.shape[-1])
        mask = keep_mask(seed, *rows.shape, self.p, x.device).view(x.shape)
        return torch.where(mask, x * keep_factor(self.p), torch.zeros((), dtype=x.dtype))


def recover_dropout(model: nn.Module) -> nn.Module:
    for layer in lora_layers(model):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = RecoveredDropout(dropout.p).train(dropout.training)
    return model


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(model: nn.Module, inputs: Any, call: Callable[..., Any] | None, seed: int) -> Results:
    """Output, gradient of the float inputs and of every parameter that has one."""
    inputs = {
        key: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = call(model, **inputs) if call else model(**inputs)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    if y.requires_grad:
        y.backward(dy)
    found = {"output": y.detach()}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.grad is not None:
            found[f"input {key}"] = value.grad
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def budget(ours: Results, peers: list[Results], gold: Results, eps: float) -> None:
    """Each result by itself: at most twice the peer's own error and one rounding of the largest value."""
    for what, exact in gold.items():
        if exact.numel():
            error, other = ((found[what].double() - exact).abs().max().item() for found in (ours, peers[0]))
            allowed = 2 * (other + eps * exact.abs().max().item())
            assert error <= allowed, f"{what}: error {error:.3e} > {allowed:.3e}"


def deep_budget(ours: Results, peers: list[Results], gold: Results, eps: float) -> None:
    """The worst relative error of all results: at most twice the peers' worst and one rounding.

    In a deep model each result carries the roundings of many layers; which of fifty gets the unlucky ones is chance. So
    the worst is compared with the worst, and with that of PEFT from weights that differ by one rounding.
    """

    def worst(found: Results) -> tuple[float, str]:
        norm = torch.linalg.vector_norm
        sizes = {what: norm(exact).item() for what, exact in gold.items()}
        return max(
            (norm(found[what].double() - gold[what]).item() / size, what) for what, size in sizes.items() if size
        )

    (error, what), other = worst(ours), max(worst(peer)[0] for peer in peers)
    assert error <= 2 * (other + eps), f"{what}: relative error {error:.3e}, the worst of PEFT's is {other:.3e}"


def nudged(model: nn.Module, eps: float) -> nn.Module:
    """Every parameter times 1 ± eps, at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + eps * (torch.rand_like(parameter).round() * 2 - 1))
    return model


def compare(
    model: nn.Module | Callable[[], nn.Module],
    inputs: dict[str, Any],
    *,
    state: Callable[[Any], Any] | None = None,
    call: Callable[..., Any] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    eps: float | None = None,
    within: Callable[[Results, list[Results], Results, float], None] = budget,
    fast: int | None = None,
) -> Results:
    """Bring an accelerated copy of ``model``, PEFT and PEFT in fp64 into ``state``; compare outputs and all gradients.

    model   or, where PEFT's weights cannot be copied, what builds it
    fast    how many calls of our operator must be made; None: at least one. With 0, PEFT's own forward runs, and every
            result must be PEFT's to the bit.
    """
    make = (lambda: copy.deepcopy(model)) if isinstance(model, nn.Module) else model
    ours, peer, gold = make(), make(), make()
    accelerate(ours)
    if fast != 0:
        recover_dropout(peer)
        recover_dropout(gold)
    for each in (ours, peer, gold.double()):
        if state is not None:
            state(each)
    gold.double()
    calls = 0
    operator = linear.lora_linear

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return operator(*args, **kwargs)

    linear.lora_linear = counting
    try:
        with context():
            found = run(ours, inputs, call, 3)
    finally:
        linear.lora_linear = operator
    assert calls == fast if fast is not None else calls > 0, f"{calls} calls of the operator, expected {fast}"
    with context():
        expected = run(peer, inputs, call, 3)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    if fast == 0:
        for what, value in found.items():
            assert value.dtype == expected[what].dtype and torch.equal(value, expected[what]), what
        return found
    exact = run(gold, {key: doubled(value) for key, value in inputs.items()}, call, 3)
    eps = torch.finfo(found["output"].dtype).eps if eps is None else eps
    for what, value in found.items():
        assert value.dtype == expected[what].dtype and value.shape == expected[what].shape, what
    peers = [expected]
    if within is deep_budget:
        peers += [run(nudged(peer, eps), inputs, call, 3) for _ in range(3)]
    within(found, peers, exact, eps)
    return found
