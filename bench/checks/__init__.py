"""What a GPU has to prove about correctness."""

import common  # noqa: F401 - fastpeft becomes importable
