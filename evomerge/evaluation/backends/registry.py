"""What can answer requests, by name. Imports nothing, because a search.yaml and the command line need the names."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["native", "hf", "vllm"]
"""`native` is our own scorer; `hf` is lm-eval's HFLM; `vllm` is lm-eval's VLLM on a live engine (an extra, on GPUs)."""
