"""Triton device code of fastpeft: one file an operator, launchers without validation or autograd."""
