"""A small class-conditional diffusion pipeline that draws digits, trained here at one size, to be sampled at others."""
