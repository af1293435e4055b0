"""What our layers are compared with, on the same tensors."""

import common  # noqa: F401 - fastpeft becomes importable
