"""The second embedded pipeline: a small text-conditional diffusion model of emoji, trained here at one size."""
