"""What compile/kernels.py compiles of the convolutions' kernels."""

import torch

# Images of a ResNet's stage: 3 × 3, a strided 1 × 1 of a ragged width, groups in three dimensions.
CONVOLUTIONS = (
    ((8, 256, 64, 64), 1, (3, 3), ((1, 1), (1, 1), (1, 1))),
    ((8, 72, 31, 31), 1, (1, 1), ((2, 2), (0, 0), (1, 1))),
    ((2, 96, 8, 16, 16), 2, (3, 3, 3), ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
)


def _meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def convolution(op, x_dtype, R, a_dtype):
    seed = _meta((1,), torch.int64)
    for shape, groups, kernel, geometry in CONVOLUTIONS if R == 16 and a_dtype == torch.float32 else CONVOLUTIONS[:1]:
        x, a = _meta(shape, x_dtype), _meta((R, shape[1] // groups, *kernel), a_dtype)
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        rows = op.windows_of(shape, kernel, *geometry).M
        for p in (0.0, 0.1):
            if op.__name__.endswith("conv_shrink"):
                op.conv_shrink(x, a, *geometry, groups, p, seed)
            else:
                op.conv_grad_a(x, _meta((rows, groups * R), x_dtype), a, x, *geometry, groups, p, seed, True, True)
