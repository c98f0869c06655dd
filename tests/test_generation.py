"""Generation by transformers with its own caches: the tokens are eager's, and attention runs in engines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from trt_dynamo.reports import report

OPTIONS: dict[str, Any] = {"runtime": "reference", "min_segment_nodes": 1, "rebuild": "sync"}
WORDS = 97


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=32,
        n_head=2,
        vocab_size=WORDS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=96,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS, max_position_embeddings=64, pad_token_id=0, eos_token_id=96,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=16, vocab_size=WORDS,
        pad_token_id=0, eos_token_id=96,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


CASES = [
    (llama, "static", "forward"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (gpt2, "static", "forward"), (t5, "static", "forward"), (gpt2, "dynamic", "forward"),
        (llama, "dynamic", "generate"), (llama, "static", "generate"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("make", "cache", "way"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.filterwarnings("ignore")  # transformers' and Dynamo's own
def test_greedy_tokens_are_those_of_eager(make: Any, cache: str, way: str) -> None:
    eager = make().eval()
    model = copy.deepcopy(eager)
    if way == "forward":
        model.forward = torch.compile(model.forward, backend="tensorrt", options=OPTIONS)
        run = model.generate
    else:
        whole: Any = torch.compile(model, backend="tensorrt", options=OPTIONS)
        run = whole.generate
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    prompt = torch.randint(2, 90, (2, 7))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    for _ in range(2):
        ours = run(prompt, attention_mask=mask, **options)
        assert torch.equal(ours, eager.generate(prompt, attention_mask=mask, **options))
        prompt = prompt.flip(0)
    counts = report()
    assert counts["engine_calls"] >= 38 or way == "generate"
    assert (counts["eager_calls"] == 0 and counts["rebuilds"] == 0) or cache == "dynamic"
