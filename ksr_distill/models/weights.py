"""Released weights in, and back: strict two-way maps for the U-Net, the refiner, MoVQ, context."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, VQModel
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ksr_distill.models.refiner import RefinerContext, RefinerUNet
from ksr_distill.models.unet import KSRUNet
from ksr_distill.models.weight_configs import movq_config, refiner_config, sr_unet_config
from ksr_distill.models.weight_maps import REFINER_MAP, SR_UNET_MAP, WeightMap, movq_map

Model = TypeVar("Model", bound=ModelMixin)
Shape = tuple[int, ...]

_CODEBOOK = "quantize.embedding.weight"
_SHOWN = 3


def sr_unet_from_released(
    state_dict: Mapping[str, Tensor], *, num_groups: int | None = None
) -> KSRUNet:
    """Return the released super-resolution U-Net as a KSRUNet.

    Args:
        state_dict: Released names. Its tensors become the parameters: nothing is copied.
        num_groups: Of the group norms, which no shape tells; None takes base_channels / 4.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape than its model has.
    """
    config = sr_unet_config(_shapes(state_dict), num_groups=num_groups)
    return _build(KSRUNet, config, state_dict, SR_UNET_MAP)


def refiner_from_released(
    state_dict: Mapping[str, Tensor], *, num_groups: int | None = None, head_dim: int | None = None
) -> RefinerUNet:
    """Return Kandinsky 3.0 Flash's U-Net as a RefinerUNet.

    Args:
        state_dict: Released names. Its tensors become the parameters: nothing is copied.
        num_groups: Of the group norms, which no shape tells; None takes 32 where it divides.
        head_dim: Of the attentions, which no shape tells; None takes 64 where it divides.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape than its model has.
    """
    config = refiner_config(_shapes(state_dict), num_groups=num_groups, head_dim=head_dim)
    return _build(RefinerUNet, config, state_dict, REFINER_MAP)


def movq_from_released(
    state_dict: Mapping[str, Tensor], *, num_groups: int | None = None
) -> VQModel:
    """Return the released MoVQ as diffusers' VQModel; decode it through ``models.movq``.

    Args:
        state_dict: Released names. Its tensors become the parameters: nothing is copied.
        num_groups: Of the group norms, which no shape tells; None takes 32 where it divides.

    Raises:
        ValueError: If a name is missing, unknown, or has another shape than its model has.
    """
    config = movq_config(_shapes(state_dict), num_groups=num_groups)
    weight_map = movq_map(len(config["block_out_channels"]))
    return _build(VQModel, config, state_dict, weight_map)


def context_from_released(
    context: Float[Tensor, "1 n d"],
    mask: Bool[Tensor, "1 n"] | Int[Tensor, "1 n"] | None = None,
) -> RefinerContext:
    """Return the released context cut to its one valid token.

    Args:
        mask: 1 keeps a token; exactly one may be kept, for only then the others change nothing.
            None expects the released layout: the first row, then padding rows that are all equal.
    """
    if mask is not None:
        kept = mask[0].nonzero()[:, 0].tolist()
        if len(kept) != 1:
            raise ValueError(f"context_mask keeps {len(kept)} tokens; only one can stand alone")
        token = context[:, kept]
    elif context.shape[1] > 1 and not bool((context[:, 1:] == context[:, 1:2]).all()):
        raise ValueError(
            f"the context's {context.shape[1]} rows are not one token and equal padding; "
            "give its context_mask.pt too (--mask)"
        )
    else:
        token = context[:, :1]
    model = RefinerContext(dim=context.shape[2])
    model.tokens = torch.nn.Parameter(token.clone(), requires_grad=False)
    return model.eval()


def released_state_dict(model: ModelMixin) -> dict[str, Tensor]:
    """Return the parameters of a KSRUNet, RefinerUNet or VQModel as the released code names them.

    Raises:
        ValueError: If the model is none of these, or computes what the released code cannot.
    """
    if isinstance(model, KSRUNet):
        _check_is_expressible(model)
    weight_map = _map_of(model)
    return {
        weight_map.to_released(name): weight_map.tensor_to_released(name, value).contiguous()
        for name, value in model.state_dict().items()
        if name != _CODEBOOK
    }


def _build(
    model_class: Callable[..., Model],
    config: dict[str, Any],
    state_dict: Mapping[str, Tensor],
    weight_map: WeightMap,
) -> Model:
    with torch.device("meta"):
        model = model_class(**config)
    ours = {name: value for name, value in model.state_dict().items() if name != _CODEBOOK}
    expected = {
        weight_map.to_released(name): tuple(weight_map.tensor_to_released(name, value).shape)
        for name, value in ours.items()
    }
    check_names_and_shapes(expected, {k: tuple(v.shape) for k, v in state_dict.items()})
    converted = {
        name: weight_map.tensor_to_ours(name, state_dict[weight_map.to_released(name)])
        for name in ours
    }
    if isinstance(model, VQModel):
        codebook = (model.config.num_vq_embeddings, model.config.vq_embed_dim)
        converted[_CODEBOOK] = torch.zeros(codebook, dtype=_widest(state_dict))
    model.load_state_dict(_in_one_dtype(converted), strict=True, assign=True)
    return model.eval()


def check_names_and_shapes(expected: Mapping[str, Shape], given: Mapping[str, Shape]) -> None:
    """Refuse a state dict that differs from the expected one in any name or shape, by name."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    reshaped = [
        f"{name} is {shape}, not {expected[name]}"
        for name, shape in given.items()
        if name in expected and shape != expected[name]
    ]
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", reshaped),
        )
        if names
    ]
    if complaints:
        raise ValueError(f"of {len(expected)} parameters: " + "; ".join(complaints))


def _map_of(model: ModelMixin) -> WeightMap:
    if isinstance(model, KSRUNet):
        return SR_UNET_MAP
    if isinstance(model, RefinerUNet):
        return REFINER_MAP
    if isinstance(model, VQModel):
        return movq_map(len(model.config.block_out_channels))
    raise ValueError(f"a {type(model).__name__} has no released layout")


def _check_is_expressible(unet: KSRUNet) -> None:
    if unet.config.predict_residual:
        raise ValueError(
            "predict_residual=True: the released code adds no enlarged lowres to the output; "
            "only models with predict_residual=False can be written in its layout"
        )
    if unet.config.upsampling != "transposed_conv":
        raise ValueError(
            f"upsampling={unet.config.upsampling!r}: the released code knows only transposed_conv"
        )


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def _widest(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    return max((value.dtype for value in state_dict.values()), key=lambda dtype: dtype.itemsize)


def _in_one_dtype(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return float tensors in the widest dtype among them; a model has one dtype."""
    dtype = _widest(state_dict)
    return {name: value.to(dtype) for name, value in state_dict.items()}
