"""The adapter for Diffusers: λ and the entropy in the self-attention of a pipeline, and out again."""

from entropy_attn.diffusers.version import check_version

check_version()

from entropy_attn.diffusers.calibrating import calibrate, calibration_from  # noqa: E402
from entropy_attn.diffusers.calibration import Calibration  # noqa: E402
from entropy_attn.diffusers.enabling import disable, enable  # noqa: E402
from entropy_attn.diffusers.handle import Handle  # noqa: E402
from entropy_attn.diffusers.processor import EntropyAttnProcessor  # noqa: E402
from entropy_attn.diffusers.record import EntropyRecord, EntropyTable  # noqa: E402

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
