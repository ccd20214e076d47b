"""Device code of entropy_attn and the tables that decide its shape. Installed as ``entropy_attn.kernels``."""
