"""Matrix products in float8 for training (Micikevicius et al. 2022, arXiv:2209.05433), by torchao.

Weights, optimiser and all else are those of a training in bfloat16. A linear layer rounds its input, its weight and its gradient
to eight bits on the way into a product. So checkpoints have what they have in every precision.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from audiot.attention.self_attention import PROJECTIONS, Product
from audiot.base.devices import autocast_dtype
from audiot.base.private import quiet_torchao
from audiot.model import Encoder

FP8 = "fp8"  # value of trainer.precision
AROUND = "bf16-mixed"  # Lightning's precision for all else
CAPABILITY = (8, 9)  # compute capability from which NVIDIA's GPUs multiply float8 matrices
# One scale for each tensor. By torchao, this is its fastest recipe: a scale for each row costs a slower product, and weights'
# gradients in bfloat16 (rowwise_with_gw_hp) are a third of the products.
RECIPE = "tensorwise"
MULTIPLE = 16  # both sides of a weight must be multiples of it, for the tensor cores
# Products of a layer grow with inputs · outputs, and casting its input, its weight and its gradient with inputs + outputs. By the
# measurements in docs/scaling.md, an H200 breaks even where inputs · outputs / (inputs + outputs) is 1,100 to 1,600, by
# the layer. Most other GPUs move less memory for each product, so that casts weigh more there.
LEAST = 1300


@functools.cache  # a layer that has another function is compiled anew
def float8_product(emulate: bool = False) -> Product:
    """The function of frames (…, i), a weight (o, i) and a bias (o,) that gives (…, o), as `F.linear` does.

    Its products are in float8, those of the backward pass too, where gradients are wanted. Else it is `F.linear`: validation and
    the pass of a teacher lose no accuracy.

    Args:
        emulate: Whether to round to float8, but multiply in float32, on any device.
    """
    with quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    def settings(pad: bool) -> tuple[Any, Any]:
        config = replace(Float8LinearConfig.from_recipe_name(RECIPE), pad_inner_dim=pad, emulate=emulate)
        layer = convert_to_float8_training(nn.Linear(MULTIPLE, MULTIPLE, device="meta"), config=config)
        return layer.linear_mm_config, layer.config

    even, uneven = settings(pad=False), settings(pad=True)

    def product(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(frames, weight, bias)
        # The gradient of the weight is a sum over frames. Where their number is no multiple of 16, zeros fill it up.
        chosen = uneven if frames.shape[:-1].numel() % MULTIPLE else even
        output = matmul_with_hp_or_float8_args.apply(frames.to(autocast_dtype(frames)), weight.t(), *chosen)
        return output if bias is None else output + bias.to(output.dtype)

    return product


def pays(inputs: int, outputs: int) -> bool:
    """Whether a product with a weight (outputs, inputs) is faster in float8, its casts included."""
    fits = inputs % MULTIPLE == 0 and outputs % MULTIPLE == 0
    return fits and inputs * outputs >= LEAST * (inputs + outputs)


def use(encoder: Encoder, product: Product) -> list[nn.Linear]:
    """Let a function compute the products of an encoder's layers that are large enough, in training.

    Args:
        encoder: The encoder. Its parameters and their names stay as they are.
        product: Function of `float8_product`.

    Returns:
        The linear layers whose products those are.

    Raises:
        ValueError: there are none.
    """
    used: list[nn.Linear] = []
    for layer in map(encoder.layer, range(len(encoder.layers))):
        attention, ffn = layer.attention, layer.ffn
        projections = [getattr(attention, name) for name in PROJECTIONS if hasattr(attention, name)]
        if projections and pays(encoder.embed_dim, len(projections) * encoder.embed_dim):
            attention.project = product
            used += projections
        if pays(encoder.embed_dim, encoder.embed_dim):
            attention.project_output = product
            used.append(attention.output)
        networks = [part for part in ffn if isinstance(part, nn.Linear)]
        if pays(networks[0].in_features, networks[0].out_features):
            ffn.product = product
            used += networks
    if not used:
        raise ValueError(
            f"trainer.precision={FP8} makes no layer of {encoder.embed_dim} channels faster, since its casts take longer than is "
            f"saved: both sides must be multiples of {MULTIPLE}, and inputs × outputs at least {LEAST:,} × (inputs + outputs); "
            f"set trainer.precision={AROUND}"
        )
    return used


def described(encoder: Encoder, used: list[nn.Linear]) -> str:
    """How many linear layers of an encoder are used in float8, and which are not."""
    known = {id(layer) for layer in used}
    layers = {name: part for name, part in encoder.named_modules() if isinstance(part, nn.Linear)}
    others = {
        f"{re.sub(r'layers[.][0-9]+[.]', '', name)} ({part.in_features} → {part.out_features})": None
        for name, part in layers.items()
        if id(part) not in known
    }
    stay = f"; in bfloat16: {', '.join(others)}" if others else ""
    return f"{len(used)} of {len(layers)} linear layers of the encoder{stay}"


class Float8(Callback):
    """Train an encoder in float8: its large layers `use` it from the beginning of the training."""

    def __init__(self) -> None:
        self.product = float8_product()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin, where Lightning begins a training."""
        if stage == "fit":
            self.begin(pl_module)

    def begin(self, module: pl.LightningModule) -> str:
        """Let the module's encoder use float8. It may do so already.

        Returns:
            Which layers do.

        Raises:
            ValueError: no layer is large enough.
        """
        encoder = module.get_submodule("model.encoder")
        assert isinstance(encoder, Encoder)
        return described(encoder, use(encoder, self.product))


def check_float8(device: torch.device) -> None:
    """Look whether a device and the libraries can train in float8.

    Raises:
        ValueError: the device has no products in float8.
        ModuleNotFoundError: torchao is not installed.
    """
    found = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} ({'.'.join(map(str, capability))})"
    if device.type != "cuda" or capability < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        raise ValueError(
            f"trainer.precision={FP8} needs a GPU that multiplies float8 matrices (compute capability {least} or more, as L4 and "
            f"H100 have), found {found}: set trainer.precision={AROUND}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(f"trainer.precision={FP8} needs torchao: pip install 'audiot[fp8]'", name="torchao")


def check_tasks_precision(precision: object) -> None:
    """Refuse float8 for tasks, whose training is not compiled.

    Raises:
        ValueError: the precision is float8.
    """
    if precision == FP8:
        raise ValueError(f"trainer.precision={FP8} is for pre-training, which is compiled: set trainer.precision={AROUND}")
