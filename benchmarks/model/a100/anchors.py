"""Published speeds on an A100, each with its address, and what the model makes of the same kernels.

A figure is compared with the estimate for the card it was measured on. What cuBLAS reaches on that card tells how much
power the card has. Where the source does not say, the card is taken to be an A100 SXM4 at 400 W.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from . import estimate, loops
from .estimate import Card, Estimate, waves

PAGES = "https://github.com/triton-lang/triton/blob/{}/main/_sources/getting-started/tutorials/{}.rst.txt"
OLDER = "22f4a18254d1d7b05eb305a4b22c993f49ad8c4e"
NEWER = "001d977d8a92cc9d15563693d0740e77374bac84"
# Of the same pages, for matrices of 4096; cuBLAS has tiles of 256 x 128.
AT_BOOST = estimate.SXM4_400_W.at_boost * waves(4096, rows=256)
DOCUMENTATION = {OLDER: Card(220.0, AT_BOOST), NEWER: Card(218.2, AT_BOOST)}
ISSUE = "https://github.com/triton-lang/triton/issues/{}"

CUDA_ATTENTION, TRITON_ATTENTION, TRITON_MATMUL = "attention, CUDA C++", "attention, Triton", "matrix product, Triton"
FLEX_ATTENTION = "FlexAttention, relative"


@dataclass(frozen=True)
class Anchor:
    """published: TFLOP/s; their mean is compared. loops: a pattern of names; the fastest is taken, as the tutorials
    take it. useful: the part of the time that the main loop has work for, see `causal` and `waves`. fitted: whether
    estimate.OTHER was chosen on it. relative_to: a loop whose modelled speed the published figures are shares of."""

    name: str
    family: str
    loops: str
    published: tuple[float, ...]
    source: str
    card: Card = estimate.SXM4_400_W
    useful: float = 1.0
    fitted: bool = False
    relative_to: str | None = None


def causal(tokens: int, queries: int = 128) -> float:
    """Useful part of the products where a tile of queries also multiplies the hidden half of its diagonal block."""
    return tokens / (tokens + queries)


def _documentation(name: str, page: str, family: str, loop: str, *published: float,
                   useful: float = 1.0) -> Anchor:  # fmt: skip
    tutorial = "03-matrix-multiplication" if family == TRITON_MATMUL else "06-fused-attention"
    return Anchor(name, family, loop, published, PAGES.format(page, tutorial), DOCUMENTATION[page], useful, fitted=True)


def _comment(name: str, family: str, loop: str, head_dim: int, milliseconds: float) -> Anchor:
    """4 x 32 heads of 16384 tokens, causal."""
    operations = 4 * 4 * 32 * 16384**2 * head_dim / 2
    published = operations / milliseconds / 1e9
    return Anchor(name, family, loop, (published,), ISSUE.format(1934), useful=causal(16384))


ANCHORS = [
    # Triton's documentation is built on an A100, and two states of its pages are compared: one with block pointers,
    # from the time of Triton 3.1, and one with tensor descriptors. 4 x 32 heads, 8192 and 16384 tokens; matrices of
    # 4096.
    _documentation("older tutorial, D = 64", OLDER, TRITON_ATTENTION, "triton_3.1.0_attention_64_*",
                   173.3, 175.1),
    _documentation("older tutorial, D = 64, causal", OLDER, TRITON_ATTENTION, "triton_3.1.0_attention_64_*",
                   166.1, 171.8, useful=causal(12288)),
    _documentation("older tutorial, matrices", OLDER, TRITON_MATMUL, "triton_3.1.0_matmul_*",
                   216.1, useful=waves(4096)),
    _documentation("newer tutorial, D = 64", NEWER, TRITON_ATTENTION, "triton_3.7.1_attention_64_*",
                   163.2, 157.4),
    _documentation("newer tutorial, D = 64, causal", NEWER, TRITON_ATTENTION, "triton_3.7.1_attention_64_*",
                   160.7, 166.0, useful=causal(12288)),
    _documentation("newer tutorial, D = 128", NEWER, TRITON_ATTENTION, "triton_3.7.1_attention_128_*",
                   168.4, 164.6),
    _documentation("newer tutorial, D = 128, causal", NEWER, TRITON_ATTENTION,
                   "triton_3.7.1_attention_128_*", 171.1, 175.3, useful=causal(12288)),
    _documentation("newer tutorial, matrices", NEWER, TRITON_MATMUL, "triton_3.7.1_matmul_*",
                   195.7, useful=waves(4096)),
    # An A100 that is not the one above: matrices of 2816, 2944, 3072 and 3200.
    Anchor("matrices, April 2024", TRITON_MATMUL, "triton_3.1.0_matmul_*", (233.2, 251.7, 230.2, 244.3),
           ISSUE.format(3551), useful=waves(2816, 2944, 3072, 3200)),
    # A comment of September 2024 with times in milliseconds. It does not name the card; no other card of that year
    # without tensor cores for FP8 is as fast.
    _comment("FlashAttention-2, D = 64, causal", CUDA_ATTENTION, "flash_attention_64_causal", 64, 24.150),
    _comment("FlashAttention-2, D = 128, causal", CUDA_ATTENTION, "flash_attention_128_causal", 128, 41.7995),
    _comment("tutorial, Sept. 2024, D = 64, causal", TRITON_ATTENTION, "triton_3.1.0_attention_64_*", 64, 23.5133),
    _comment("tutorial, Sept. 2024, D = 128, causal", TRITON_ATTENTION, "triton_3.1.0_attention_128_*", 128, 46.7501),
    # The paper's abstract: 50 to 73 % of the maximum. The highest is at D = 128 without a mask.
    Anchor("FlashAttention-2's paper, highest", CUDA_ATTENTION, "flash_attention_128", (0.73 * 312,),
           "https://arxiv.org/abs/2307.08691"),
    # PyTorch's announcement: 90 % of FlashAttention-2 forward, without TFLOP/s or a head dim. So the modelled speed is
    # compared with that of FlashAttention-2's loop.
    *(Anchor(f"FlexAttention, D = {head_dim}", FLEX_ATTENTION, f"triton_3.7.1_flex_attention_{head_dim}_*", (0.9,),
             "https://pytorch.org/blog/flexattention/", relative_to=f"flash_attention_{head_dim}")
      for head_dim in (64, 128)),
]  # fmt: skip


@dataclass(frozen=True)
class Checked:
    anchor: Anchor
    loop: str
    estimate: Estimate
    unit: float = 1.0  # TFLOP/s that a published figure of 1 stands for

    @property
    def published(self) -> float:
        return statistics.mean(self.anchor.published) * self.unit

    @property
    def error(self) -> float:
        """Positive where the model is too fast."""
        return self.estimate.speed / self.published - 1


def check(anchor: Anchor, runs: int) -> Checked:
    """The estimate of the fastest of an anchor's loops."""
    found = []
    unit = 1.0 if anchor.relative_to is None else _estimate(anchor, anchor.relative_to, runs).speed
    for name in loops.matching(anchor.loops):
        found.append(Checked(anchor, name, _estimate(anchor, name, runs), unit))
    if not found:
        raise FileNotFoundError(f"no loop matches {anchor.loops} in {loops.FOLDER}")
    return max(found, key=lambda checked: checked.estimate.speed)


def _estimate(anchor: Anchor, loop_name: str, runs: int) -> Estimate:
    loop = loops.load(loop_name)
    return estimate.estimate(loop.code, loop.flops, anchor.card, runs, anchor.useful)


def largest_error(checked: list[Checked]) -> float:
    return max(abs(c.error) for c in checked)


def mean_error(checked: list[Checked]) -> float:
    return statistics.mean(c.error for c in checked)
