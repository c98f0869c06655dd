"""torchvision's classifiers, segmenters, detectors, video and flow; timm's backbones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Case, Inputs, add, image, load, settled

# torch2trt's table, all 20 of it
TABLE = [
    "alexnet",
    "squeezenet1_0",
    "squeezenet1_1",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "densenet121",
    "densenet169",
    "densenet201",
    "densenet161",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
]
OTHERS = [
    "googlenet",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
]
# those that read or check the size of the image: one size only
FIXED = {"inception_v3": 299, "vit_b_32": 224, "maxvit_t": 224}


def classifier(name: str) -> nn.Module:
    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False, "aux_logits": False}
    return settled(load("torchvision.models", name)(weights=None, **extra))


def segmenter(name: str) -> nn.Module:
    return settled(load("torchvision.models.segmentation", name)(weights=None, weights_backbone=None))


def detector(name: str, **options: Any) -> nn.Module:
    """With scores that lie apart: among equal ones the last bit decides which boxes are kept."""
    model = settled(load("torchvision.models.detection", name)(weights=None, weights_backbone=None, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("cls" in part or "classification" in part):
                parameter.normal_(0, 8 / parameter[0].numel() ** 0.5, generator=generator)
    return model


def images(batch: int, size: int) -> Inputs:
    """A list, as detectors take it, of images of two shapes."""
    return ([torch.rand(3, size, size - 16 * (index % 2)) for index in range(batch)],), {}


def clip(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 3, 8, size, size),), {}


def two_images(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)), {"num_flow_updates": 3}


for name in (*TABLE, *OTHERS):
    add(Case(name, "torchvision", functools.partial(classifier, name), image, (96, 128)))
for name, size in FIXED.items():
    add(Case(name, "torchvision", functools.partial(classifier, name), image, (size, size)))
for name in ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
    add(Case(name, "segmentation", functools.partial(segmenter, name), image, (96, 128)))

FOUND = "sizes that depend on what is detected"
SMALL = {"num_classes": 4, "min_size": 96, "max_size": 128}
DETECTORS: dict[str, dict[str, Any]] = {
    "ssdlite320_mobilenet_v3_large": {"num_classes": 4},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {**SMALL, "box_score_thresh": 0.0},
    "fasterrcnn_resnet50_fpn": {**SMALL, "box_score_thresh": 0.0},
    "retinanet_resnet50_fpn": {**SMALL, "score_thresh": 0.0},
    "maskrcnn_resnet50_fpn": {**SMALL, "box_score_thresh": 0.0},
}
for name, options in DETECTORS.items():
    make = functools.partial(detector, name, **options)
    add(Case(name, "detection", make, images, (96, 112), breaks=FOUND))

add(Case("r3d_18", "video", lambda: settled(load("torchvision.models.video", "r3d_18")(weights=None)), clip, (32, 48)))
add(
    Case(
        "raft_small",
        "video",
        lambda: settled(load("torchvision.models.optical_flow", "raft_small")(weights=None)),
        two_images,
        (128, 144),
    )
)


def backbone(name: str, **options: Any) -> nn.Module:
    return settled(load("timm", "create_model")(name, pretrained=False, **options))


# by name: the two sizes of the image, what `timm.create_model` is told
TIMM: dict[str, tuple[int, int, dict[str, Any]]] = {
    "vit_small_patch16_224": (224, 224, {"depth": 4}),
    "vit_tiny_patch16_224_any_size": (64, 96, {"dynamic_img_size": True, "depth": 4}),
    "deit3_small_patch16_224": (224, 224, {"depth": 4}),
    "beit_base_patch16_224": (224, 224, {"depth": 2}),
    "eva02_tiny_patch14_224": (224, 224, {"depth": 4}),
    "swinv2_tiny_window8_256": (256, 256, {}),
    "hiera_tiny_224": (224, 224, {}),
    "cait_xxs24_224": (224, 224, {}),
    "xcit_nano_12_p16_224": (224, 224, {}),
    "levit_128s": (224, 224, {}),
    "efficientformer_l1": (224, 224, {}),
    "mixer_s32_224": (224, 224, {}),
    "convnext_atto": (64, 96, {}),
    "convnextv2_atto": (64, 96, {}),
    "maxvit_pico_rw_256": (256, 256, {}),
    "coatnet_nano_rw_224": (224, 224, {}),
    "mobilevit_xxs": (64, 128, {}),  # torch guards by what a reshape of the patches divides
    "mobilenetv4_conv_small": (64, 96, {}),
    "efficientnet_lite0": (64, 96, {}),
    "ghostnet_100": (64, 96, {}),
    "nfnet_l0": (64, 96, {}),
    "fastvit_t8": (64, 96, {}),
    "hrnet_w18_small": (64, 96, {}),
    "poolformer_s12": (64, 96, {}),
    "davit_tiny": (64, 96, {}),
    "halonet26t": (256, 256, {}),
    "botnet26t_256": (256, 256, {}),
}
for name, (small, large, options) in TIMM.items():
    make = functools.partial(backbone, name.removesuffix("_any_size"), **options)
    add(Case(f"timm/{name}", "timm", make, image, (small, large)))
