"""facegen: diffusion-based face generation and personalization."""

__version__ = "0.1.0"
