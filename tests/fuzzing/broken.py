"""The invalid calls. Each has one mistake, and the error must name one of the arguments listed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fuzzing.calls import Call

INPUTS = ("query", "key", "value")
FLAGS = ("is_causal", "enable_gqa", "return_entropy", "return_lse")


@dataclass(frozen=True)
class Way:
    """One mistake. `code` is Python that makes `arguments` invalid.

    `line` replaces <B>, <H>, <Nq> and <Nk> with sizes, <layout> with the other layout and <other> with another dtype.
    """

    named: tuple[str, ...]
    code: str
    applies: Callable[[Call], bool] = lambda call: True

    def line(self, call: Call) -> str:
        heads, tokens = (1, 2) if call.layout == "bhnd" else (2, 1)
        sizes = {"B": call.B, "H": call.heads, "Nq": call.Nq, "Nk": call.Nk}
        code = self.code.replace("axis_of_heads", str(heads)).replace("axis_of_tokens", str(tokens))
        for name, size in sizes.items():
            code = code.replace(f"<{name}>", str(size))
        code = code.replace("<layout>", repr("bnhd" if call.layout == "bhnd" else "bhnd"))
        return code.replace("<other>", "bfloat16" if call.dtype == "float16" else "float16")


WAYS: dict[str, Way] = {}


def _way(name: str, named: str, code: str, applies: Callable[[Call], bool] = lambda call: True) -> None:
    WAYS[name] = Way(tuple(named.split("|")), code, applies)


def _set(argument: str, value: str, applies: Callable[[Call], bool] = lambda call: True, named: str = "") -> None:
    _way(f"{argument}={value}", named or argument, f"arguments[{argument!r}] = {value}", applies)


def _not_empty(call: Call) -> bool:
    return min(call.B, call.Hkv, call.group, call.Nq, call.Nk) > 0


def _free(call: Call) -> bool:
    """Whether the call has no mask and is not causal, so that a mask can be added."""
    return not call.mask and not call.causal


def _no_scale(call: Call) -> bool:
    return call.scale.kind == "none"


def _rule(call: Call) -> bool:
    return call.scale.kind == "rule"


def _ways_of_inputs() -> None:
    for name in INPUTS:
        it = f"arguments[{name!r}]"
        for value in ("None", "1.0", f"{it}.tolist()", "np.zeros((1, 1, 1, 8), np.float32)"):
            _set(name, value)
        # One axis too few or too many, or an axis of another size.
        _set(name, f"{it}[0]", _not_empty)
        _set(name, f"{it}.unsqueeze(0)")
        _set(name, f"torch.cat([{it}, {it}])", _not_empty, "query|key|value")
        # Another dtype, device, memory format or class.
        _set(name, f"{it}.to(torch.<other>)", named="query|key|value")
        _set(name, f"{it}.int()", lambda call: not call.poison, "query|key|value")
        _set(name, f"{it}.to(torch.complex64)", named="query|key|value")
        _set(name, f"{it}.to('meta')", named="query|key|value")
        _set(name, f"{it}.to_sparse()")
        _set(name, f"torch.nested.nested_tensor(list({it}))", _not_empty)
        _set(name, f"torch.nested.nested_tensor(list({it}), layout=torch.jagged)", _not_empty)
        _subclass(name)
        _way(f"{name} requires grad", name, f"{it} = {it}.detach().clone().requires_grad_()")
    for dtype in ("int32", "int64", "bool", "uint8", "complex64"):
        every = "arguments |= {name: torch.zeros_like(arguments[name], dtype=torch.%s) for name in %s}"
        _way(f"all of {dtype}", "query", every % (dtype, INPUTS))
    none_left = "arguments |= {name: arguments[name][..., :0] for name in ('query', 'key')}"
    _way("head dim 0", "query|key", none_left)
    _set("key", "torch.cat([arguments['key']] * 2, -1)", named="query|key")
    _set("value", "torch.cat([arguments['value']] * 2, axis_of_tokens)", lambda c: c.Nk > 0, "key|value")
    _set("value", "torch.cat([arguments['value']] * 2, axis_of_heads)", lambda c: c.Hkv > 0, "key|value")
    more = "arguments |= {n: torch.cat([arguments[n]] * (<H> + 1), axis_of_heads) for n in ('key', 'value')}"
    _way("more heads of keys", "query|key", more + "; arguments['enable_gqa'] = True", _not_empty)
    fewer = "arguments.pop('enable_gqa')"
    _way("fewer heads of keys without enable_gqa", "query|key|enable_gqa", fewer, lambda c: c.group > 1 and c.Hkv > 0)
    _way("the other layout", "query|key", "arguments['layout'] = <layout>", _shows_its_layout)


def _shows_its_layout(call: Call) -> bool:
    """Whether the other layout gives query and key unequal numbers of heads, and is invalid for no other reason."""
    return call.group == 1 and not call.gqa and call.Nq != call.Nk and call.B > 0 and not call.mask and not call.causal


def _subclass(name: str, applies: Callable[[Call], bool] = lambda call: True) -> None:
    """A tensor subclass with its own __torch_function__."""
    code = (
        "arguments[NAME] = arguments[NAME].as_subclass(type('Halved', (torch.Tensor,), {'__torch_function__': "
        "classmethod(lambda cls, f, types, args=(), kwargs=None: torch._C._disabled_torch_function_impl("
        "f, types, args, kwargs or {}))}))"
    )
    _way(f"{name} of a class of its own", name, code.replace("NAME", repr(name)), applies)


def _ways_of_masks() -> None:
    for value in ("True", "[[True]]", "np.ones((<Nq>, <Nk>), bool)", "'causal'"):
        _set("attn_mask", value, _free)
    full = "<Nq>, <Nk>"
    shapes = (
        "<Nq> + 2, <Nk>",
        "<Nq>, <Nk> + 2",
        f"<B> + 2, 1, {full}",
        f"<H> + 2, {full}",
        f"1, 1, 1, {full}",
        "<Nk>,",
    )
    for shape in shapes:
        _set("attn_mask", f"torch.ones(({shape}), dtype=torch.bool)", _free)
    for dtype in ("int32", "uint8", "complex64"):
        _set("attn_mask", f"torch.ones(1, 1, <Nq>, <Nk>, dtype=torch.{dtype})", _free)
    _set("attn_mask", "torch.ones(<Nq>, <Nk>, dtype=torch.<other>)", _free)
    _set("attn_mask", "torch.ones(<Nq>, <Nk>, dtype=torch.float64)", lambda c: _free(c) and c.dtype != "float64")
    _set("attn_mask", "torch.ones(<Nq>, <Nk>, dtype=torch.bool, device='meta')", _free)
    _set("attn_mask", "torch.ones(<Nq>, <Nk>).to_sparse()", _free)
    _set("attn_mask", "causal_upper_left(<Nq> + 2, <Nk>)", _free)
    _set("attn_mask", "causal_lower_right(<Nq>, <Nk> + 2)", _free)
    grad = "arguments['attn_mask'] = torch.zeros(<Nq>, <Nk>, requires_grad=True)"
    _way("attn_mask requires grad", "attn_mask", grad, _free)
    _subclass("attn_mask", lambda call: call.mask is not None)
    _set("is_causal", "True", lambda call: call.mask is not None, "is_causal|attn_mask")


def _ways_of_scales() -> None:
    for value in ("'0.1'", "[0.1]", "True", "1j", "math.nan", "math.inf", "-math.inf", "1e39"):
        _set("scale", value, _no_scale)
    for value in ("np.float32('nan')", "np.float64('inf')", "np.ones(2)"):
        _set("scale", value, _no_scale)
    for value in ("torch.ones(<B> + 7, <H> + 7)", "torch.ones(1, 1, 1, 1, 1, 1)", "torch.ones((), device='meta')"):
        _set("scale", value, _no_scale)
    for dtype in ("float16", "int64", "bool", "complex64"):
        _set("scale", f"torch.ones((), dtype=torch.{dtype})", _no_scale)
    _set("scale", "torch.ones((), dtype=torch.float64)", lambda call: _no_scale(call) and call.dtype != "float64")
    _way("scale requires grad", "scale", "arguments['scale'] = torch.ones((), requires_grad=True)", _no_scale)
    _set("scale", "0.1", _rule, "scale|train_tokens")
    _set(
        "train_tokens",
        "64",
        lambda call: call.scale.kind not in ("none", "rule", "rule per sample"),
        "scale|train_tokens",
    )
    for value in ("9.0", "'9'", "True", "1", "0", "-5", "10**30", "np.float64(9.0)", "[9]", "1j"):
        _set("train_tokens", value, lambda call: _no_scale(call) and call.Nk >= 2)
        _set("num_tokens", value, _rule)
    _set("num_tokens", "9", _no_scale)
    _set("num_tokens", "torch.full((<B>,), 9)", _no_scale)
    for value in (
        "torch.ones(<B>)",
        "torch.full((<B> + 1,), 9)",
        "torch.tensor(9)",
        "torch.full((<B>,), 9, device='meta')",
    ):
        _set("num_tokens", value, _rule)
    for value in ("'0'", "math.nan", "math.inf", "-1.0", "100.0", "True", "[0.0]", "1j"):
        _set("train_entropy", value, _rule)
    _set("train_entropy", "1.0", _no_scale)


def _ways_of_the_rest() -> None:
    for value in ("0.1", "1", "-0.1", "math.nan", "'0'", "[0.0]", "torch.tensor(0.0)", "torch.tensor(0.1)"):
        _set("dropout_p", value)
    for name in FLAGS:
        for value in ("1", "0", "'yes'", "None", "torch.tensor(True)", "[True]"):
            _set(name, value, lambda call: call.mask is None)
    for value in ("'nbhd'", "'BHND'", "None", "1", "['bhnd']"):
        _set("layout", value)
    for value in ("'cuda'", "None", "1", "['cpu']", "'Cpu'"):
        _set("backend", value)


_ways_of_inputs()
_ways_of_masks()
_ways_of_scales()
_ways_of_the_rest()
