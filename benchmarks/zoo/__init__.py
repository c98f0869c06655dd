"""Models as people use them, with random weights: what of each becomes engines, how long that takes, how exact it is.

`python -m benchmarks.zoo` measures (see `--help`), into `results.jsonl`; `python -m benchmarks.zoo --page` writes
docs/models.md from it. Needs torchvision, timm, transformers, diffusers and torchaudio, each only for its own models.
"""
