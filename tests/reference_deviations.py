"""The ONNX backend tests of which NVIDIA's parser (TensorRT-RTX 1.7.1) makes something else than ONNX means.

Out: `DEVIATIONS`, the reason by case id (`group/name/variant`). The list is strict: one that passes is an error.
"""

from __future__ import annotations


def both(*names: str) -> list[str]:
    """The case ids of both variants."""
    return [f"node/{name}/{variant}" for name in names for variant in ("raw", "const")]


def raw(*names: str) -> list[str]:
    return [f"node/{name}/raw" for name in names]


def const(*names: str) -> list[str]:
    return [f"node/{name}/const" for name in names]


def casts(start: str, end: str) -> list[str]:
    """The casts of float16 and float32 values, as Cast, CastLike and the latter's expansion."""
    found = []
    for source in ("FLOAT16", "FLOAT"):
        found += raw(f"test_cast_{start}{source}_to_{end}")
        found += both(f"test_castlike_{start}{source}_to_{end}", f"test_castlike_{start}{source}_to_{end}_expanded")
    return found


REASONS = {
    "Trilu without `upper` is upper by default; the parser makes a lower one": [
        *raw("test_triu", "test_triu_square"),
        *both("test_triu_neg", "test_triu_one_row", "test_triu_out_neg_out", "test_triu_out_pos", "test_triu_pos"),
        *both("test_triu_square_neg"),
    ],
    "Attention's nonpad_kv_seqlen is dropped": both(
        "test_attention_4d_causal_nonpad_batch_prefill",
        "test_attention_4d_causal_nonpad_continued_prefill",
        "test_attention_4d_causal_nonpad_negative_offset_structural_empty",
        "test_attention_4d_gqa_causal_nonpad_decode",
        "test_attention_4d_gqa_causal_nonpad_decode_fp16",
    ),
    "Attention's window sizes are dropped": both("test_attention_bidirectional_window", "test_attention_local_window"),
    "a row of Attention without a key to attend to is zeros in ONNX, 0/0 by TensorRT's formula": both(
        "test_attention_23_boolmask_fullymasked_row_nan_robustness"
    ),
    "a cast to INT4 out of its range wraps in the test, and is undefined in TensorRT, which builds none": casts(
        "", "INT4"
    ),
    "saturate=0 of a cast to FP8 is dropped": casts("no_saturate_", "FLOAT8E4M3FN"),
    "layout=1 of a recurrent operator is dropped": both(
        "test_gru_batchwise", "test_lstm_batchwise", "test_simple_rnn_batchwise"
    ),
    "an unsigned zero point is dropped, and the result becomes INT8": raw(
        "test_quantizelinear", "test_quantizelinear_axis", "test_quantizelinear_blocked_asymmetric"
    ),
    "Resize with align_corners takes the ratio of the sizes in TensorRT, of the scales in ONNX": const(
        "test_resize_downsample_scales_cubic_align_corners", "test_resize_downsample_scales_linear_align_corners"
    ),
    "in ceil mode TensorRT keeps a last window that starts in the padding": raw(
        "test_averagepool_2d_ceil_last_window_starts_on_pad", "test_maxpool_2d_ceil_output_size_reduce_by_one"
    ),
    "SpaceToDepth's mode CRD is dropped": raw("test_spacetodepth_crd_mode_example"),
    "where min > max, ONNX gives max and TensorRT's CLIP gives min": const("test_clip_min_greater_than_max"),
}

DEVIATIONS = {case: reason for reason, cases in REASONS.items() for case in cases}
