"""The time loop of a GRU or RNN layer on a CPU; backward keeps every step's dg, and dA and dB are thin products.

    gru        r, z = σ(gates_rz + h W_rzᵀ + b_rz), n = tanh(gates_n + r ∘ (h W_nᵀ + b_n)), h' = n + z ∘ (h - n)
    rnn        h' = act(gates + h Wᵀ + b), act: tanh or relu                   W = weight + lora_B lora_A, merged once

ATen's loop computes a dense dW at each step, 2 N G H FLOP, half of the step's own work. Here the gradients of all
steps' h Wᵀ + b are kept, dg [T, N, G], and dB = dgᵀ (h Aᵀ), dA = (dg B)ᵀ h are four thin products a sequence. All that
needs no recursion is computed for all steps at once; a backward step is one product and a few passes over [N, H].
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.ops import _derivatives


def _gru(
    gates: torch.Tensor, h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states [T + 1, N, H], and r, z, n and h W_nᵀ + b_n side by side [T, N, 4H]."""
    T, N, H = gates.shape[0], *h.shape
    states, kept, wt = gates.new_empty(T + 1, N, H), gates.new_empty(T, N, 4 * H), w.t()
    states[0] = h
    for t in range(T):
        hw = torch.addmm(bias, states[t], wt)
        rz, n = kept[t, :, : 2 * H], kept[t, :, 2 * H : 3 * H]
        torch.add(gates[t, :, : 2 * H], hw[:, : 2 * H], out=rz).sigmoid_()
        kept[t, :, 3 * H :] = hw[:, 2 * H :]
        torch.addcmul(gates[t, :, 2 * H :], rz[:, :H], hw[:, 2 * H :], out=n).tanh_()
        torch.lerp(n, states[t], rz[:, H:], out=states[t + 1])
    return states, kept


def _gru_backward(
    dy: torch.Tensor, states: torch.Tensor, kept: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, N, H = dy.shape
    r, z, n, hn = kept.split(H, -1)
    to_n, to_z, to_r = (1 - z) * (1 - n * n), (states[:-1] - n) * z * (1 - z), hn * r * (1 - r)
    dgates, dg, dh = dy.new_empty(T, N, 3 * H), dy.new_empty(T, N, 3 * H), dy.new_zeros(N, H)
    for t in range(T - 1, -1, -1):
        dh = dh + dy[t]
        dn = torch.mul(dh, to_n[t], out=dgates[t, :, 2 * H :])
        torch.mul(dh, to_z[t], out=dgates[t, :, H : 2 * H])
        torch.mul(dn, to_r[t], out=dgates[t, :, :H])
        dg[t, :, : 2 * H] = dgates[t, :, : 2 * H]
        torch.mul(dn, r[t], out=dg[t, :, 2 * H :])
        dh = torch.addmm(dh * z[t], dg[t], w)
    return dgates, dg, dh


def _rnn(gates: torch.Tensor, h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
    """All states [T + 1, N, H]."""
    states, wt = gates.new_empty(gates.shape[0] + 1, *h.shape), w.t()
    states[0] = h
    torch.add(gates, bias, out=states[1:])
    for t in range(gates.shape[0]):
        state = states[t + 1].addmm_(states[t], wt)
        state.relu_() if relu else state.tanh_()
    return states


def _rnn_backward(
    dy: torch.Tensor, states: torch.Tensor, w: torch.Tensor, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = states[1:]
    slope = (y > 0).to(y.dtype) if relu else 1 - y * y
    dgates, dh = torch.empty_like(y), torch.zeros_like(y[0])
    for t in range(dy.shape[0] - 1, -1, -1):
        dh = torch.mul(dh + dy[t], slope[t], out=dgates[t]) @ w
    return dgates, dgates, dh


def _gru_derived(
    dy: torch.Tensor | None,
    to_states: torch.Tensor | None,
    to_kept: torch.Tensor | None,
    states: torch.Tensor,
    kept: torch.Tensor,
    w: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_gru_backward` in differentiable form; the gradients of states and kept may be None."""
    r, z, n, hn = kept.split(states.shape[-1], -1)
    parts = (None,) * 4 if to_kept is None else to_kept.split(states.shape[-1], -1)
    dh, gates, dgs = torch.zeros_like(states[0]), [], []
    for t in range(len(kept) - 1, -1, -1):
        more_r, more_z, more_n, more_hn = (_at(part, t) for part in parts)
        dh = dh + _at(dy, t) + _at(to_states, t + 1)
        dn = (dh * (1 - z[t]) + more_n) * (1 - n[t] * n[t])
        dr = (dn * hn[t] + more_r) * r[t] * (1 - r[t])
        dz = (dh * (states[t] - n[t]) + more_z) * z[t] * (1 - z[t])
        gates.append(torch.cat([dr, dz, dn], -1))
        dgs.append(torch.cat([dr, dz, dn * r[t] + more_hn], -1))
        dh = dh * z[t] + dgs[-1] @ w
    return torch.stack(gates[::-1]), torch.stack(dgs[::-1]), dh + _at(to_states, 0)


def _rnn_derived(
    dy: torch.Tensor | None, to_states: torch.Tensor | None, states: torch.Tensor, w: torch.Tensor, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_rnn_backward` in differentiable form."""
    dh, found = torch.zeros_like(states[0]), []
    for t in range(len(states) - 2, -1, -1):
        y = states[t + 1]
        found.append((dh + _at(dy, t) + _at(to_states, t + 1)) * ((y > 0).to(y.dtype) if relu else 1 - y * y))
        dh = found[-1] @ w
    gates = torch.stack(found[::-1])
    return gates, gates, dh + _at(to_states, 0)


def _at(gradient: torch.Tensor | None, t: int) -> torch.Tensor | float:
    return 0.0 if gradient is None else gradient[t]


class _Recurrent(torch.autograd.Function):
    """The states and what backward keeps; as outputs, the kept tensors carry the graph of a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        mode: str,
    ) -> tuple[torch.Tensor | None, ...]:
        merged = None if a is None or b is None else torch.addmm(weight, b, a)
        w, kept = weight if merged is None else merged, None
        if mode == "GRU":
            states, kept = _gru(gates, h, w, bias)
        else:
            states = _rnn(gates, h, w, bias, mode == "RNN_RELU")
        need = ctx.needs_input_grad
        ctx.save_for_backward(states, kept, w, a if need[5] else None, b if need[4] else None)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        # A copy, as ATen returns: a caller may write into it.
        return states[1:].clone(), states, kept, merged

    @staticmethod
    def backward(
        ctx: Any,
        dy: torch.Tensor | None,
        to_states: torch.Tensor | None,
        to_kept: torch.Tensor | None,
        dw: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        states, kept, w, a, b = ctx.saved_tensors
        gru, relu, need = ctx.mode == "GRU", ctx.mode == "RNN_RELU", ctx.needs_input_grad
        through = any(each is not None for each in (to_states, to_kept, dw))
        again = dy is None or through or _derivatives.derived(dy, None)
        if not again:
            assert dy is not None
            parts = _gru_backward(dy, states, kept, w) if gru else _rnn_backward(dy, states, w, relu)
        elif gru:
            parts = _gru_derived(dy, to_states, to_kept, states, kept, w)
        else:
            parts = _rnn_derived(dy, to_states, states, w, relu)
        dgates, dg, dh = parts
        rows, before = dg.reshape(-1, dg.shape[-1]), states[:-1].reshape(-1, states.shape[-1])
        da = (rows @ b).t() @ before if need[4] else None
        db = rows.t() @ (before @ a.t()) if need[5] else None
        dweight = rows.t() @ before if need[2] else None
        if dw is not None:  # a second derivative goes through the merged weight as a whole
            da = None if da is None else da + b.t() @ dw
            db = None if db is None else db + dw @ a.t()
            dweight = None if dweight is None else dweight + dw
        return (
            dgates if need[0] else None,
            dh if need[1] else None,
            dweight,
            rows.sum(0) if need[3] else None,
            da,
            db,
            None,
        )


def recurrent(
    gates: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    mode: str,
) -> torch.Tensor:
    """The states after each step, [T, N, H].

    gates      [T, N, G] fp32 | fp64: the input's share, with its bias; G = 3H for a GRU, H for an RNN
    h          [N, H]    the first state
    weight     [G, H], bias [G], lora_A [R, H], lora_B [G, R] with the scale in it, or both None: in the dtype of gates
    mode       "GRU" | "RNN_TANH" | "RNN_RELU", as nn.RNNBase names them
    Saves      the states, for a GRU its gates too [T, N, 4H], and the merged weight. Differentiable at will.
    """
    states: torch.Tensor = _Recurrent.apply(gates, h, weight, bias, lora_A, lora_B, mode)[0]
    return states
