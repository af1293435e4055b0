"""Measured copy rates, bytes read and written per second by device name, written by the tuner.

A GPU without an entry has its data sheet's rate times the share that an H100 reaches (`_cost.arch_of`).
"""

# tuned: begin
COPY_RATE: dict[str, float] = {}
# tuned: end
