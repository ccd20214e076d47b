"""The running softmax of a tile of queries, with the sum that its entropy comes from.

For each block of keys, with u = log2(e) * (scale * (q.k) + mask), *centred* at the running maximum m:

    m' = max(m, max u)    x = u - m'    p = 2^x    d = m - m'    a = 2^d
    t <- a * (t + d * l) + sum p * x
    l <- a * l + sum p
    acc <- a * acc + p @ v

and at the end, in nats:

    entropy = ln 2 * (log2 l - t / l)        lse = ln 2 * (m + log2 l)        out = acc / l

The uncentred form, entropy = lse - E[score], loses three digits once the logits carry an offset.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32
EPSILON = tl.constexpr(1.1920928955078125e-07)  # float32
# While |m| is below 2^26, its rounding moves x by at most 4.
LARGE = tl.constexpr(67108864.0)


class Softmax(NamedTuple):
    """The state: m, l, t [M] and acc, [M, width] for each piece of the head dim of value. All are float32.

    m is the running maximum in units of ln 2. With a floating mask it is in nats, where the lowest float is finite.
    """

    m: tl.tensor
    l: tl.tensor
    t: tl.tensor
    acc: tl.tuple


@triton.jit
def empty(LOWEST: tl.constexpr, C: tl.constexpr):
    """The state before the first key, with the running maximum at LOWEST."""
    M: tl.constexpr = C.tile.block_m
    acc = ()
    for i in tl.static_range(len(C.value_pieces)):
        acc = acc + (zeros(M, C.value_pieces[i][1]),)
    return Softmax(tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32), acc)


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr):
    """tl.zeros takes the elements of a constexpr tuple only as parameters of their own."""
    return tl.zeros([M, N], tl.float32)


@triton.jit
def column(scale, C: tl.constexpr):
    """A scale for a tile [M, width]: [M, 1] if every query has its own, else the number itself."""
    return scale[:, None] if C.scale == "per_query" else scale


@triton.jit
def fold(state, s, unit, C: tl.constexpr, HIDES: tl.constexpr, ANY_SIZE: tl.constexpr):
    """Fold a block of scores s [M, N] into the state: returns the state, its acc not yet added to, and p [M, N].

    unit: what s is multiplied by to be in the unit of m, a number or [M]. HIDES: a score may be -inf.
    ANY_SIZE: |m| may be LARGE.
    """
    top = tl.max(s, 1)
    m = top * unit
    if ANY_SIZE:
        # Rounded down: the highest score's x is then not negative, however far apart floats of the size of m are.
        m = tl.minimum(m, LARGEST)
        m = tl.where(tl.fma(top, unit, -m) < 0, m - tl.abs(m) * EPSILON, m)
    m = tl.maximum(state.m, m)
    x = tl.fma(s, column(unit, C), -m[:, None])  # the product is not rounded: an offset of the logits costs no digits
    d = state.m - m
    if C.mask == "floating":
        x *= LOG2E
        d *= LOG2E
    if ANY_SIZE:
        x = tl.where(x > 4.0, 4.0, x)  # tl.minimum would turn NaN into 4
        d = tl.maximum(d, -1000.0)  # l is 0 before the first key, and 0 * -inf is NaN
    a = tl.math.exp2(d)
    p = tl.math.exp2(x)
    t = state.t
    if C.entropy:
        if HIDES:
            x = tl.maximum(x, -1000.0)  # p is 0 there, and 0 * -inf is NaN
        px = tl.fma(p, x, 0.0) if C.round_products else p * x
        t = tl.fma(tl.fma(state.l, d, t), a, tl.sum(px, 1))
    l = state.l * a + tl.sum(p, 1)
    acc = ()
    for i in tl.static_range(len(state.acc)):
        acc = acc + (state.acc[i] * a[:, None],)
    return Softmax(m, l, t, acc), p


@triton.jit
def accumulate(state, p, values, C: tl.constexpr):
    """Add p @ v to acc. values: [N, width] for each piece of the head dim of value."""
    acc = ()
    for i in tl.static_range(len(values)):
        acc = acc + (tl.dot(p.to(values[i].dtype), values[i], state.acc[i], input_precision=C.precision),)
    return Softmax(state.m, state.l, state.t, acc)


@triton.jit
def begin_again(state, C: tl.constexpr):
    """After blocks without ANY_SIZE, which began at m = -LARGE: whether a row was too large for them in magnitude, or
    saw no key; and the state to go on with, empty then."""
    again = tl.max(tl.abs(state.m), 0) >= LARGE
    acc = ()
    for i in tl.static_range(len(state.acc)):
        acc = acc + (tl.where(again, 0.0, state.acc[i]),)
    m = tl.where(again, -LARGEST, state.m)
    return again, Softmax(m, tl.where(again, 0.0, state.l), tl.where(again, 0.0, state.t), acc)


@triton.jit
def results(state, C: tl.constexpr):
    """Output, entropy and log-sum-exp of the rows, these in nats. A row that saw no key has l = 0: its output and
    entropy are 0, its log-sum-exp is -inf."""
    inverse = 1.0 / tl.where(state.l == 0.0, 1.0, state.l)
    out = ()
    for i in tl.static_range(len(state.acc)):
        out = out + (state.acc[i] * inverse[:, None],)
    entropy = (tl.math.log2(state.l) - state.t * inverse) * LN2
    entropy = tl.where((state.l == 0.0) | (entropy < 0.0), 0.0, entropy)  # rounding may dip below 0
    nats = 1.0 if C.mask == "floating" else LN2
    return out, entropy, state.m * nats + tl.math.log2(state.l) * LN2
