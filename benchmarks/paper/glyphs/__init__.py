"""The embedded pipeline: a small class-conditional diffusion model of digits, trained here at one size."""
