"""The fixed point on any Hugging Face model: the tokens of sequential sampling, in a fraction of the model calls.

python examples/fixed_point.py MODEL [MIX_RATE]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point
from ssgen_ds.sampler.noise import Stream, gumbel, sequence_key, uniform
from ssgen_ds.sampler.requests import Request

PROMPT = "What do bees do?"
GOLD = """Bees carry pollen from flower to flower while they collect nectar. Back in the hive they turn the nectar into
honey, which feeds the whole colony in winter. A worker lives for about six weeks in summer, and visits thousands of
flowers in that time. The queen lays the eggs, up to two thousand of them on a warm day, and lives for several years.
When a hive grows too full, the old queen leaves with half of the workers to find another home. A scout that has found a
good place dances for the others, and the dance tells them in which direction to fly and how far."""

name, mix_rate = sys.argv[1], float((sys.argv[2:] or [0.1])[0])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
prompt_ids, gold_ids = tokenizer(PROMPT)["input_ids"], tokenizer(GOLD, add_special_tokens=False)["input_ids"][:128]

# Everything random is drawn first. A coin says whether a position holds the model's token or the gold one.
key = sequence_key(seed=0, stream=Stream.BSS, example_id="bees", visit=0)
keys, positions = torch.full((len(gold_ids),), key), torch.arange(len(gold_ids))
coins = (uniform(keys, positions) < mix_rate).tolist()

# Sequentially: one model call for each token.
mixed_ids: list[int] = []
for t, is_sampled in enumerate(coins):
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt_ids + mixed_ids])).logits[0, -1]
    sampled = (logits_V + gumbel(keys[:1], positions[t : t + 1], len(logits_V))[0]).argmax().item()
    mixed_ids.append(sampled if is_sampled else gold_ids[t])

# In parallel: the fixed point of all positions at once, from the gold tokens as the first guess.
request = Request(prompt_ids, gold_ids, coins, key)
[result], stats = sample_fixed_point(CachedCausalLM(model), [request], Sampling(), None)

print(f"{sum(coins)} of {len(coins)} tokens are the model's own")
print(f"sequentially {len(coins)} model calls, in parallel {stats.calls}")
print("the same tokens" if result.tokens == mixed_ids else "other tokens")
