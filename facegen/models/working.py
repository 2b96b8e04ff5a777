"""How much memory a network works in besides its weights, from its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

# Numbers that are alive at the peak, for each place of the widest maps: fitted to the table in docs/memory.md.
UNET, VAE = 28.0, 4.0
ROWS = 2  # both halves of guidance


def working(network: nn.Module) -> int:
    """Bytes of activations of a UNet step or a VAE's decoding at the model's own picture size; 0 for other networks."""
    config: Any = getattr(network, "config", None)
    widths = getattr(config, "block_out_channels", None)
    if widths is None or config.sample_size is None:
        return 0
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    bytes_each = next(network.parameters()).element_size()
    if hasattr(config, "latent_channels"):
        wide = 4 if getattr(config, "force_upcast", False) else bytes_each
        return int(VAE * height * width * widths[min(1, len(widths) - 1)] * wide)
    return int(UNET * ROWS * height * width * widths[0] * bytes_each)
