"""The adapter for Diffusers: gives a pipeline's self-attention the scale λ, and records its entropy."""

import importlib.metadata

OLDEST_DIFFUSERS = (0, 38)


def check_version() -> None:
    """Raise ImportError if Diffusers is missing or older than `OLDEST_DIFFUSERS`."""
    try:
        installed = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("entropy_attn.diffusers needs Diffusers: pip install 'entropy_attn[diffusers]'") from None
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise ImportError(
            f"entropy_attn.diffusers needs Diffusers {oldest} or newer, {installed} is installed: "
            "pip install --upgrade diffusers"
        )


check_version()

from entropy_attn.diffusers.calibrating import calibrate, calibration_from  # noqa: E402
from entropy_attn.diffusers.calibration import Calibration  # noqa: E402
from entropy_attn.diffusers.enable import Handle, disable, enable  # noqa: E402
from entropy_attn.diffusers.processor import EntropyAttnProcessor  # noqa: E402
from entropy_attn.entropy import EntropyRecord, EntropyTable  # noqa: E402

__all__ = [
    "Calibration",
    "EntropyAttnProcessor",
    "EntropyRecord",
    "EntropyTable",
    "Handle",
    "calibrate",
    "calibration_from",
    "disable",
    "enable",
]
