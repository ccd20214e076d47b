"""The versions of Diffusers that the adapter works with."""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (0, 38)


def check_version() -> None:
    """Raise ImportError unless a Diffusers that the adapter knows is installed."""
    try:
        installed = version("diffusers")
    except PackageNotFoundError:
        raise ImportError("entropy_attn.diffusers needs Diffusers: pip install 'entropy_attn[diffusers]'") from None
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"entropy_attn.diffusers needs Diffusers {oldest} or newer, {installed} is installed: "
            "pip install --upgrade diffusers"
        )
