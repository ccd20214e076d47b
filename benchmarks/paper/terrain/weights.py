"""The weights of `TerrainUNet`, read from the ONNX file of the installed package adaptive-terrain-diffusion."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from terrain.unet import TerrainUNet

PACKAGE, VERSION = "adaptive-terrain-diffusion", "0.4.2"
FILE = "weights/terrain_consistency_unet_difficulty100.onnx"
INSTALL = "pip install 'entropy_attn[terrain]'"
# What parts of a weight's name in the file are called in `TerrainUNet`, in the order of replacement.
NAMES = {
    "network.out.2.": "conv_out.", "network.": "", "input_blocks": "down_blocks", "middle_block": "mid_block",
    "output_blocks": "up_blocks", "label_emb.": "label_embed.", "in_layers.2": "conv1", "emb_layers.1": "modulation",
    "out_layers.3": "conv2", "skip_connection": "skip", "proj_out": "to_out.0",
}  # fmt: skip


def weights_file() -> Path:
    """The package's file of weights. The package itself is not imported.

    Raises:
        ValueError: the package is not installed, or in another version.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{PACKAGE} is missing: {INSTALL}") from None
    if version != VERSION:
        raise ValueError(f"{PACKAGE} must be {VERSION}, whose network is known, got {version}: {INSTALL}")
    spec = importlib.util.find_spec("terrain_diffusion")
    if spec is None or spec.origin is None:
        raise ValueError(f"{PACKAGE} {version} has no module terrain_diffusion: {INSTALL}")
    return Path(spec.origin).parent / FILE


def load(dtype: torch.dtype = torch.float32) -> TerrainUNet:
    """The network with the package's weights. Raises ValueError as `weights_file`, or if onnx is missing."""
    path = weights_file()
    try:
        import onnx
    except ImportError:
        raise ValueError(f"onnx is missing: {INSTALL}") from None
    unet = TerrainUNet().eval()
    state = state_of(onnx.load(path).graph, unet)
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return unet.requires_grad_(False)


def state_of(graph: Any, unet: TerrainUNet) -> dict[str, torch.Tensor]:
    """The state dict for `unet` in the graph of the ONNX file.

    Convolutions and linear layers have their names in the file. Query, key and value come in one 1 x 1 convolution.
    Group norms have no names: each is an InstanceNormalization, a Mul and an Add, in the order of execution.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith("network."):
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "qkv" in name:
            for part, third in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                state[name.replace("qkv", part)] = third.flatten(1) if third.ndim == 4 else third
        else:
            state[name] = tensor.flatten(1) if "to_out" in name and tensor.ndim == 4 else tensor
    produced = {output: node for node in graph.node for output in node.output}
    shifts = [node for node in graph.node if node.op_type == "Add" and node.output[0].startswith("group_norm")]
    norms = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.GroupNorm)]
    for norm, shift in zip(norms, shifts, strict=True):
        state[f"{norm}.weight"] = tensors[produced[shift.input[0]].input[1]].flatten()
        state[f"{norm}.bias"] = tensors[shift.input[1]].flatten()
    return state
