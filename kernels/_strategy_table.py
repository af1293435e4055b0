"""Measured choices of lora_linear's strategy, written by the tuner; keys without an entry use _cost's prediction.

Key: `_cost.strategy_key(...)`, (pass, arch, dtype, size bucket). Value: "accumulate" or "fused".
"""

# tuned: begin
TABLE: dict[tuple, str] = {}
# tuned: end
