"""The host memory that it takes to make engines of large language models: a Llama of any size with random weights, from
its configuration to the plan in the cache. Nothing runs, and no GPU is needed.

Usage: python -m benchmarks.large_models [--layers 2,4] [--hidden 2048] [--weights inputs,frozen] [--mapped] [--json]

Each row is a process of its own. `peak` is the largest resident set above that of a process that has only imported
torch and TensorRT; `own` counts its anonymous pages alone, without files that are mapped (the weights, with --mapped),
which the kernel may drop. Both are shown over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent


class Memory:
    """The largest resident set, and the largest one without files, in bytes, since `start`."""

    def __init__(self) -> None:
        self.before = self.now()
        self.peak, self.own = 0, 0

    @staticmethod
    def now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAn"))
        }
        return found["VmRSS"], found["RssAnon"]

    def look(self) -> None:
        total, own = self.now()
        self.peak, self.own = max(self.peak, total - self.before[0]), max(self.own, own - self.before[1])

    @contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.look()


def llama(layers: int, hidden: int, heads: int, vocabulary: int) -> nn.Module:
    """A Llama on the meta device, with the proportions of the one with 8 billion parameters (32 layers, 4096)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with torch.device("meta"):
        made: nn.Module = LlamaForCausalLM(config)
    return made.to(torch.bfloat16).eval()


def fill(model: nn.Module, folder: Path, *, mapped: bool) -> None:
    """Gives the model random weights in memory, or the memory of a file that holds them."""
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        file = folder / f"{len(weights)}.safetensors"
        value = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.02)
        if mapped:
            save_file({name: value}, file)
            value = load_file(file)[name]
        weights[name] = value
    model.load_state_dict(weights, assign=True)
    # Buffers that are no part of the state: the frequencies of the rotary embedding.
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.rand(buffer.shape, dtype=buffer.dtype)


class Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, use_cache=False).logits
        return logits


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    from trt_dynamo import trt
    from trt_dynamo.ahead_of_time import build_ahead, settings_for
    from trt_dynamo.settings import Settings

    trt.load()
    torch.zeros(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = llama(arguments.layers, arguments.hidden, arguments.heads, arguments.vocabulary)
        memory = Memory()
        fill(model, folder, mapped=arguments.mapped)
        bytes_of_weights = sum(each.nbytes for each in {id(p): p for p in model.parameters()}.values())
        settings = Settings(weights=arguments.weights, cache_dir=folder / "cache", progress="off")
        tokens = torch.randint(0, arguments.vocabulary, (1, arguments.length))
        started = time.perf_counter()
        with memory.watched():
            made = build_ahead(Call(model), (tokens,), {}, settings_for(arguments.target, settings))
        seconds = time.perf_counter() - started
        plans = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    return {
        "layers": arguments.layers,
        "weights": arguments.weights,
        "parameters": sum(each.numel() for each in model.parameters()),
        "weight_bytes": bytes_of_weights,
        "peak": memory.peak / bytes_of_weights,
        "own": memory.own / bytes_of_weights,
        "seconds": seconds,
        "plan_bytes": plans,
        "engines": len(made.keys),
        "problems": made.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4", help="of the Llama; several are several rows")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--weights", default="inputs,frozen", help="the setting, one row each")
    parser.add_argument("--target", default="8.9", help="the compute capability to build for")
    parser.add_argument("--mapped", action="store_true", help="the weights are memory of a file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        logging.basicConfig(level=logging.WARNING)
        arguments.layers = int(arguments.layers)
        print(json.dumps(measure(arguments)))
        return
    same = [f"--{n}={getattr(arguments, n)}" for n in ("hidden", "heads", "vocabulary", "length", "target")]
    if not arguments.json:
        print("layers  weights  parameters  weights MB  peak  own  seconds  plan MB  engines")
    for layers in arguments.layers.split(","):
        for weights in arguments.weights.split(","):
            row = [f"--layers={layers}", f"--weights={weights}", *same, "--row", *["--mapped"] * arguments.mapped]
            command = [sys.executable, "-m", "benchmarks.large_models", *row]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{layers:>6}  {weights:<7}  ended with {done.returncode}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(found) if arguments.json else line(found))


def line(found: dict[str, Any]) -> str:
    text = (
        f"{found['layers']:>6}  {found['weights']:<7}  {found['parameters'] / 1e6:8.0f} M  "
        f"{found['weight_bytes'] / 2**20:10.0f}  {found['peak']:4.2f}  {found['own']:4.2f}  {found['seconds']:7.1f}  "
        f"{found['plan_bytes'] / 2**20:7.1f}  {found['engines']:7}"
    )
    return "\n".join([text, *(f"        {problem}" for problem in found["problems"])])


if __name__ == "__main__":
    main()
