"""The paper's rule and its calibrated form."""

import math

import pytest
import torch

from entropy_attn import entropy_scale


def test_paper_rule():
    # Stable Diffusion at 224 x 224, trained at 512 x 512: log_4096(784) = 0.8012.
    assert entropy_scale(784, 4096, 40) == pytest.approx(math.sqrt(0.80121 / 40), rel=1e-5)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 160, 512])
@pytest.mark.parametrize("train_entropy", [0.0, 3.3])
def test_trained_size_gives_the_trained_scale(head_dim, train_entropy):
    assert entropy_scale(4096, 4096, head_dim, train_entropy) == 1 / math.sqrt(head_dim)


def test_calibrated_rule_keeps_entropy_under_equation_5():
    # Eq. 5: entropy = ln N - σ²/2 with σ² proportional to λ².
    T, N, H_T, d = 4096, 9216, 7.1, 64
    variance_at_T = 2 * (math.log(T) - H_T)
    variance_at_N = variance_at_T * entropy_scale(N, T, d, H_T) ** 2 * d
    assert math.log(N) - variance_at_N / 2 == pytest.approx(H_T)


def test_tensors_give_tensors():
    N = torch.tensor([784, 4096, 9216])
    scales = entropy_scale(N, 4096, 64)
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([entropy_scale(int(n), 4096, 64) for n in N], rel=1e-6)
    calibrated = entropy_scale(784, 4096, 64, torch.tensor([[0.0], [2.0]]))
    assert calibrated.shape == (2, 1)
    assert calibrated[1, 0].item() == pytest.approx(entropy_scale(784, 4096, 64, 2.0), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 4096, 64), ValueError, "num_tokens must be at least 2, got 1"),
        ((784, 1, 64), ValueError, "train_tokens must be at least 2, got 1"),
        ((784, 4096, 0), ValueError, "head_dim must be at least 1, got 0"),
        ((784, 4096, 64, -0.1), ValueError, "train_entropy must be a finite number of nats, 0 or more, got -0.1"),
        ((784, 4096, 64, math.nan), ValueError, "train_entropy must be a finite number of nats, 0 or more, got nan"),
        ((784, 4096, 64, 6.7), ValueError, r"train_entropy must be below ln\(num_tokens\) = 6.6644 nats, got 6.7"),
        ((9216, 4096, 64, 8.4), ValueError, r"train_entropy must be below ln\(train_tokens\) = 8.3178 nats, got 8.4"),
        ((784.0, 4096, 64), TypeError, "num_tokens must be an int or a tensor, got float"),
        ((784, True, 64), TypeError, "train_tokens must be an int or a tensor, got bool"),
        ((784, 4096, 64, "0"), TypeError, "train_entropy must be a float or a tensor, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        entropy_scale(*arguments)
