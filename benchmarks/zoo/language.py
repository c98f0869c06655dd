"""transformers' models from their configs, a few layers each, at the widths that people use where that is cheap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Case, Inputs, add, load, settled, text, token_ids

WIDE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 1000,
}
NARROW: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 688,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
}


def from_config(model: str, config: str, **options: Any) -> nn.Module:
    made = load("transformers", config)(**options)
    if hasattr(made, "use_cache"):
        made.use_cache = False
    return settled(load("transformers", model)(made))


def hugging_face(
    name: str,
    model: str,
    config: str,
    inputs: Callable[[int, int], Inputs] = text,
    sizes: tuple[int, int] = (12, 20),
    breaks: str = "",
    **options: Any,
) -> None:
    make = functools.partial(from_config, model, config, **options)
    add(Case(f"transformers/{name}", "transformers", make, inputs, sizes, breaks))


def pixels(batch: int, size: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, size, size)}


def pair(batch: int, length: int) -> Inputs:
    """For an encoder and a decoder."""
    args, kwargs = text(batch, length)
    return args, {**kwargs, "decoder_input_ids": token_ids(batch, length - 5)}


def samples(batch: int, length: int) -> Inputs:
    return (), {"input_values": torch.randn(batch, length)}


def ids_only(batch: int, length: int) -> Inputs:
    return (), {"input_ids": token_ids(batch, length)}


def speech(batch: int, length: int) -> Inputs:
    return (), {"input_features": torch.randn(batch, 80, 100), "decoder_input_ids": token_ids(batch, length)}


def image_and_text(batch: int, length: int) -> Inputs:
    args, kwargs = text(batch, length)
    return args, {**kwargs, "pixel_values": torch.randn(batch, 3, 32, 32)}


def image_and_points(batch: int, points: int) -> Inputs:
    labels = torch.ones(batch, 1, points, dtype=torch.int64)
    return (), {
        "pixel_values": torch.randn(batch, 3, 64, 64),
        "input_points": torch.rand(batch, 1, points, 2) * 64,
        "input_labels": labels,
    }


def image_and_mask(batch: int, size: int) -> Inputs:
    mask = torch.ones(batch, size, size, dtype=torch.int64)
    mask[0, :, size * 3 // 4 :] = 0
    return (), {"pixel_values": torch.randn(batch, 3, size, size), "pixel_mask": mask}


hugging_face("bert", "BertModel", "BertConfig", **WIDE)
hugging_face("roberta", "RobertaForSequenceClassification", "RobertaConfig", **WIDE)
hugging_face(
    "distilbert", "DistilBertModel", "DistilBertConfig", dim=256, n_layers=2, n_heads=4, hidden_dim=512, vocab_size=1000
)
hugging_face("albert", "AlbertModel", "AlbertConfig", embedding_size=64, **NARROW)
hugging_face(
    "deberta-v2",
    "DebertaV2Model",
    "DebertaV2Config",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    **NARROW,
)
hugging_face("modernbert", "ModernBertModel", "ModernBertConfig", local_attention=8, pad_token_id=0, **NARROW)
hugging_face("xlnet", "XLNetModel", "XLNetConfig", d_model=64, n_layer=2, n_head=4, d_inner=128, vocab_size=1000)
hugging_face(
    "longformer",
    "LongformerModel",
    "LongformerConfig",
    sizes=(16, 24),
    breaks="its code asks whether any token is global",
    attention_window=8,
    **NARROW,
)
hugging_face(
    "fnet",
    "FNetModel",
    "FNetConfig",
    ids_only,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=128,
    vocab_size=1000,
)
hugging_face("gpt2", "GPT2LMHeadModel", "GPT2Config", n_layer=2, n_head=12, n_embd=768, vocab_size=1000)
hugging_face("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **NARROW)
hugging_face("llama", "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4, **NARROW)
hugging_face("mistral", "MistralForCausalLM", "MistralConfig", num_key_value_heads=4, sliding_window=8, **NARROW)
hugging_face("qwen2", "Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=4, **NARROW)
hugging_face("qwen3", "Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=4, head_dim=32, **NARROW)
hugging_face(
    "gemma2", "Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=4, head_dim=32, sliding_window=8, **NARROW
)
hugging_face("phi", "PhiForCausalLM", "PhiConfig", **NARROW)
hugging_face("bloom", "BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4, vocab_size=1000)
hugging_face("mixtral", "MixtralForCausalLM", "MixtralConfig", num_key_value_heads=4, num_local_experts=4, **NARROW)
hugging_face(
    "qwen3-moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    num_key_value_heads=4,
    head_dim=32,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    **NARROW,
)
hugging_face(
    "gpt-oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    num_key_value_heads=4,
    head_dim=32,
    num_local_experts=8,
    sliding_window=8,
    **NARROW,
)
hugging_face(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    pair,
    d_model=256,
    d_kv=32,
    d_ff=512,
    num_layers=2,
    num_heads=8,
    vocab_size=1000,
)
hugging_face(
    "bart",
    "BartForConditionalGeneration",
    "BartConfig",
    pair,
    d_model=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=256,
    decoder_ffn_dim=256,
    vocab_size=1000,
    max_position_embeddings=64,
)
hugging_face("mamba", "MambaForCausalLM", "MambaConfig", ids_only, (8, 8), hidden_size=64, num_hidden_layers=2,
             state_size=8, vocab_size=1000)  # fmt: skip

TINY_WHISPER: dict[str, Any] = {
    "d_model": 384,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "vocab_size": 1000,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
hugging_face("whisper", "WhisperForConditionalGeneration", "WhisperConfig", speech, (6, 9), **TINY_WHISPER)

SIGHT: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 384,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_PART: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}
hugging_face(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    image_and_text,
    (10, 14),
    text_config={**TEXT_PART, "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 1},
    vision_config=SIGHT,
    projection_dim=32,
)
hugging_face("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", pixels, (32, 32), **SIGHT)
hugging_face("vit", "ViTForImageClassification", "ViTConfig", pixels, (32, 32), **SIGHT)
hugging_face("dinov2", "Dinov2Model", "Dinov2Config", pixels, (48, 64), **SIGHT)
hugging_face("beit", "BeitModel", "BeitConfig", pixels, (32, 32), use_relative_position_bias=True, **SIGHT)
hugging_face(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    pixels,
    (64, 96),
    hidden_sizes=[16, 32, 32, 32],
    depths=[1, 1, 1, 1],
    decoder_hidden_size=32,
)
hugging_face(
    "wav2vec2",
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    samples,
    (2000, 2600),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    conv_dim=(16, 16, 16),
    conv_stride=(5, 2, 2),
    conv_kernel=(10, 3, 3),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)


def detr() -> nn.Module:
    inner = load("transformers", "ResNetConfig")(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = load("transformers", "DetrConfig")(
        use_timm_backbone=False,
        backbone_config=inner,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    )
    return settled(load("transformers", "DetrForObjectDetection")(config))


def sam() -> nn.Module:
    config = load("transformers", "SamConfig")(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 64,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 8,
            "image_embedding_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    return settled(load("transformers", "SamModel")(config))


add(Case("transformers/detr", "transformers", detr, image_and_mask, (64, 96)))
add(Case("transformers/sam", "transformers", sam, image_and_points, (3, 5)))
