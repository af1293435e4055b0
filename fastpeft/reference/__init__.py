"""The meaning of every operator in plain PyTorch: slow on purpose, and shipped as the backend ``eager``."""
