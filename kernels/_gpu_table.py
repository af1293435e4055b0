"""Copy rates that were measured, bytes read and written per second by device name, written by the tuner.

What is absent has the rate of its data sheet times the share of it that an H100 reaches (`_cost.arch_of`).
"""

# tuned: begin
COPY_RATE: dict[str, float] = {}
# tuned: end
