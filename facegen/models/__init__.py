"""Diffusion models of the Stable Diffusion family: what they share, SD 1.x and SDXL, and small blocks adapters use."""
