"""CUDA kernels compiled for the CPU and run thread by thread."""
