"""Models to time, by name, with random weights and random inputs: `torchvision:resnet50`, `timm:vit_tiny_patch16_224`,
`hf:gpt2`. In: a name, a batch. Out: a `Case`. The packages are imported when a name asks for them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from trt_dynamo.errors import SettingsError
from trt_dynamo.setting_values import nearest

# torch2trt's README times these, each with one image of 224 by 224 in fp16.
TORCH2TRT = (
    "alexnet squeezenet1_0 squeezenet1_1 resnet18 resnet34 resnet50 resnet101 resnet152 densenet121 densenet169 "
    "densenet201 densenet161 vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn"
)

# Tables that others published: the models of each, to be timed at batch 1 in fp16.
TABLES = {
    "torch2trt": tuple(f"torchvision:{name}" for name in TORCH2TRT.split()),
    "efficientnet": ("torchvision:efficientnet_b0",),
}

TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its arguments; `items` is how many of them a call takes."""

    name: str
    model: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: int = 1

    @property
    def dtype(self) -> str:
        """The type of the model's floats: that of its first parameter, or of its first argument of floats."""
        parameters = [*self.model.parameters()] if isinstance(self.model, torch.nn.Module) else []
        leaves = [*parameters, *tree_leaves((tuple(self.args), dict(self.kwargs)))]
        floats = [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        return str(floats[0]).removeprefix("torch.") if floats else "no floats"

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """The case there, its floats in this type; a module is moved itself."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        model = self.model.to(device, dtype) if isinstance(self.model, torch.nn.Module) else self.model
        args, kwargs = tree_map_only(torch.Tensor, moved, (tuple(self.args), dict(self.kwargs)))
        return dataclasses.replace(self, model=model, args=args, kwargs=kwargs)


def case_of(name: str, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Case:
    """A user's own model; its items are the first size of the first tensor among its arguments."""
    tensors = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    return Case(name, model, args, kwargs, tensors[0].shape[0] if tensors and tensors[0].ndim else 1)


def named(spec: str, batch: int, *, size: int | None = None, tokens: int = TOKENS) -> Case | None:
    """The case of a name with a prefix that is known, else None. `size` is that of images, `tokens` that of texts.

    Raises:
        SettingsError: the package is not installed, or has no such model.
    """
    prefix, colon, name = spec.partition(":")
    if not colon or prefix not in SOURCES:
        return None
    torch.manual_seed(0)
    model, args, kwargs = SOURCES[prefix](name, batch, size, tokens)
    return Case(spec, model.eval(), args, kwargs, batch)


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(f"these models need {name}: pip install {name} ({error})") from None


Made = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


def torchvision(name: str, batch: int, size: int | None, _: int) -> Made:
    """Classifiers, segmenters, detectors (a list of images), video (16 frames) and optical flow (two images)."""
    models = package("torchvision").models
    known = models.list_models()
    if name not in known:
        raise unknown("torchvision", name, known)
    kind = models.get_model_builder(name).__module__.split(".")[2]
    extra: dict[str, Any] = {"weights_backbone": None} if kind in ("segmentation", "detection") else {}
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = False
    model = models.get_model(name, weights=None, **extra)
    if kind == "detection":
        return model, ([torch.rand(3, size or 320, size or 320) for _ in range(batch)],), {}
    side = size or (520 if kind == "segmentation" else 112 if kind == "video" else crop(models, name))
    if kind == "video":
        return model, (torch.randn(batch, 3, 16, side, side),), {}
    images = torch.randn(batch, 3, side, side)
    return model, (images, images.flip(0)) if kind == "optical_flow" else (images,), {}


def crop(models: Any, name: str) -> int:
    """The size of image that torchvision's own weights were trained for."""
    weights = models.get_model_weights(name)
    sides = getattr(next(iter(weights)).transforms(), "crop_size", None) or [224]
    return int(sides[0])


def timm(name: str, batch: int, size: int | None, _: int) -> Made:
    """Any model of timm's, at the size of image that it was trained for."""
    library = package("timm")
    if not library.is_model(name):
        raise unknown("timm", name, library.list_models())
    model = library.create_model(name, pretrained=False)
    channels, height, width = model.pretrained_cfg["input_size"]
    return model, (torch.randn(batch, channels, size or height, size or width),), {}


def transformers(name: str, batch: int, size: int | None, tokens: int) -> Made:
    """A model of transformers by its config: a type such as `gpt2`, a folder with a config.json, or a hub's name."""
    library = package("transformers")
    known = library.CONFIG_MAPPING
    try:
        config = library.AutoConfig.for_model(name) if name in known else library.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = nearest(name, known)
        words = str(error).strip().splitlines()[0]
        raise SettingsError(f"hf:{name} is no config{f' ({hint})' if hint else ''}: {words}") from None
    config.use_cache = False
    model = library.AutoModel.from_config(config)
    return model, (), inputs_of(model, config, batch, size, tokens)


def inputs_of(model: Any, config: Any, batch: int, size: int | None, tokens: int) -> dict[str, Any]:
    """Random inputs, by the name of the model's main one."""
    text = {"input_ids": torch.randint(0, getattr(text_config(config), "vocab_size", 100), (batch, tokens))}
    vision = getattr(config, "vision_config", config)
    side = size or getattr(vision, "image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    image = {"pixel_values": torch.randn(batch, getattr(vision, "num_channels", 3), height, width)}
    if model.main_input_name == "pixel_values":
        return image
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(batch, 16_000)}
    if model.main_input_name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        features = {"input_features": torch.randn(batch, getattr(config, "num_mel_bins", 80), frames)}
        return {**features, "decoder_input_ids": text["input_ids"][:, :1]} if config.is_encoder_decoder else features
    if hasattr(config, "vision_config"):
        length = min(tokens, getattr(text_config(config), "max_position_embeddings", tokens))
        return {"input_ids": text["input_ids"][:, :length], **image}
    return {**text, "decoder_input_ids": text["input_ids"]} if config.is_encoder_decoder else text


def text_config(config: Any) -> Any:
    return getattr(config, "text_config", config)


def unknown(source: str, name: str, known: Sequence[str]) -> SettingsError:
    hint = nearest(name, known)
    return SettingsError(f"{source} has no model {name!r}{f'; {hint}' if hint else ''}")


SOURCES: dict[str, Callable[[str, int, int | None, int], Made]] = {
    "torchvision": torchvision,
    "timm": timm,
    "hf": transformers,
}
