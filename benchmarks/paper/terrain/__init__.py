"""Terrain: a diffusion model that others trained, of height maps by difficulty. Its weights come from a package."""
