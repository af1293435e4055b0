"""What tune/tiles.py times of the convolutions' kernels: 3 × 3 over the rows of its x as one image."""

from collections.abc import Callable

GEOMETRY = [1, 1], [1, 1], [1, 1], 1  # stride, padding, dilation, groups
P = 0.1


def _image(t):
    """(x [1, K, rows / 32, 32] channels-last, a [R, K, 3, 3])."""
    M, K = t.x.shape
    width = 32 if M % 32 == 0 else 1
    x = t.x.view(1, M // width, width, K).permute(0, 3, 1, 2)
    return x, t.a[:, :, None, None].expand(-1, -1, 3, 3)


def _shrink(m, t, p, tile):
    return m.conv_shrink(*_image(t), *GEOMETRY, p, t.seed if p else None, tile=tile)


def _da(m, t, p, tile):
    x, a = _image(t)
    return m.conv_grad_a(x, t.ds, a, x, *GEOMETRY, p, t.seed if p else None, False, True, tile=tile)


def _dx(m, t, p, tile):
    x, a = _image(t)
    dx = x.clone()
    m.conv_grad_a(x, t.ds, a, dx, *GEOMETRY, p, t.seed if p else None, True, False, dx_tile=tile)
    return dx


JOBS: dict[tuple[str, str], Callable] = {
    ("conv_shrink", "plain"): lambda m, t, tile: _shrink(m, t, 0.0, tile),
    ("conv_shrink", "dropout"): lambda m, t, tile: _shrink(m, t, P, tile),
    ("conv_grad_a", "da"): lambda m, t, tile: _da(m, t, 0.0, tile),
    ("conv_grad_a", "da_dropout"): lambda m, t, tile: _da(m, t, P, tile),
    ("conv_grad_a", "dx"): lambda m, t, tile: _dx(m, t, 0.0, tile),
    ("conv_grad_a", "dx_dropout"): lambda m, t, tile: _dx(m, t, P, tile),
}
