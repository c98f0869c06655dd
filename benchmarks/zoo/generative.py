"""diffusers' denoisers and VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Case, Inputs, add, image, load, settled


def unet(**options: Any) -> nn.Module:
    return settled(
        load("diffusers", "UNet2DConditionModel")(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            **options,
        )
    )


def unet_xl() -> nn.Module:
    return unet(use_linear_projection=True, resnet_time_scale_shift="scale_shift")


def vae() -> nn.Module:
    return settled(
        load("diffusers", "AutoencoderKL")(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            norm_num_groups=8,
            latent_channels=4,
            sample_size=32,
        )
    )


def flux() -> nn.Module:
    return settled(
        load("diffusers", "FluxTransformer2DModel")(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    )


def dit() -> nn.Module:
    return settled(
        load("diffusers", "DiTTransformer2DModel")(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            norm_num_groups=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
    )


def latents(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 4, size, size), torch.arange(batch) * 300 + 3, torch.randn(batch, 7, 32)), {}


def labelled(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 4, size, size), torch.arange(batch) * 300 + 3, torch.arange(batch) + 1), {}


def tokens(batch: int, size: int) -> Inputs:
    return (), {
        "hidden_states": torch.randn(batch, size, 4),
        "encoder_hidden_states": torch.randn(batch, 6, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch),
        "img_ids": torch.arange(size * 3).reshape(size, 3).float(),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


add(Case("diffusers/unet", "diffusers", unet, latents, (16, 24)))
add(Case("diffusers/unet-xl", "diffusers", unet_xl, latents, (16, 24)))
add(Case("diffusers/vae", "diffusers", vae, image, (32, 48)))
add(Case("diffusers/flux", "diffusers", flux, tokens, (16, 24)))
add(Case("diffusers/dit", "diffusers", dit, labelled, (8, 8)))
