"""The method once more, one sequence and one token at a time: what a finished run is compared with.

Written from docs/method.md, in plain torch, transformers and numpy. Nothing of `ssgen_ds` is imported, no cache is
used, nothing is batched: whatever the product does to be fast must give what this gives.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100
BSS, DRAFT, REWRITE, CUT = 1, 2, 3, 4
TIE = 1e-3  # between the two best scores: rounding may decide
Record = dict[str, Any]

# -- randomness: a hash of (seed, stream, visit, example) and of (position, token) -----------------------------------

MASK, GOLDEN = 0xFFFFFFFF, 0x9E3779B1


def mix(x: Any) -> Any:
    """lowbias32, of one 32-bit word or an array of them."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def key_of(seed: int, stream: int, visit: int, example_id: str) -> int:
    text = f"{seed}\x1f{stream}\x1f{visit}\x1f{example_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def words(key: int, position: int) -> tuple[int, int]:
    low = mix((key & MASK) ^ mix(position * GOLDEN & MASK))
    high = mix((key >> 32) + low & MASK)
    return mix(low ^ high), high


def uniform(key: int, position: int) -> float:
    low, high = words(key, position)
    return (mix(mix(low) ^ high) + 0.5) / 2**32


def gumbel(key: int, position: int, vocabulary: int) -> np.ndarray:
    low, high = words(key, position)
    tokens = mix(np.arange(1, vocabulary + 1, dtype=np.uint64) * GOLDEN & MASK)
    bits = mix((tokens + low & MASK) ^ high) & 0x7FFFFFFF
    return -np.log(-np.log1p(-(bits + 0.5) / 2**31))


# -- one draw ----------------------------------------------------------------------------------------------------------


def filtered(logits: np.ndarray, banned: list[int], settings: dict[str, Any]) -> np.ndarray:
    """Ban, divide by the temperature, keep the best k, keep the smallest set that has the mass p."""
    scores = logits.copy()
    scores[banned] = -np.inf
    if settings["temperature"] == 0:
        return scores
    scores /= settings["temperature"]
    if settings["top_k"]:
        scores[scores < np.sort(scores)[-settings["top_k"]]] = -np.inf
    if settings["top_p"] < 1:
        order = np.argsort(-scores, kind="stable")
        shares = np.exp(scores[order] - scores.max())
        shares /= shares.sum()
        mass = 0.0
        for token, share in zip(order, shares, strict=True):
            if mass >= settings["top_p"]:
                scores[token] = -np.inf
            mass += share
    return scores


def f1(answer: str, gold: str) -> float:
    """SQuAD's: of the bags of words in lower case, without punctuation and articles."""

    def bag(text: str) -> Counter[str]:
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())

    common = (bag(answer) & bag(gold)).total()
    return 2 * common / (bag(answer).total() + bag(gold).total()) if common else 0.0


# -- schedules over all steps; steps count from 0 ----------------------------------------------------------------------


def mix_rate(step: int, steps: int, settings: dict[str, Any]) -> float:
    share = step / (steps - 1)

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-10 * (x - 0.5)))

    shares = {
        "constant": 1.0,
        "linear": share,
        "cosine": (1 - math.cos(math.pi * share)) / 2,
        "inverse_sigmoid": (logistic(share) - logistic(0)) / (logistic(1) - logistic(0)),
    }
    return settings["mix_rate"] * shares[settings["schedule"]]


def learning_rate(step: int, steps: int, train: dict[str, Any]) -> float:
    warmup = int(train["warmup"])
    if step < warmup:
        return train["lr"] * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    shares = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return train["lr"] * shares[train["schedule"]]


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Sequential:
    """A run of `recipe` (as in its recipe.yaml) over `rows` from `model`, a plain causal LM in float32.

    `recorded` holds what the product wrote for each (step, place): where the two best scores are a tie, its token is
    followed, and the tie is counted.
    """

    recipe: dict[str, Any]
    rows: list[dict[str, str]]
    tokenizer: Any
    model: torch.nn.Module
    recorded: dict[tuple[int, int], Record]
    ties: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        train = self.recipe["train"]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": train["weight_decay"]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(train["betas"]), foreach=False, fused=False)
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self.beyond = list(range(len(self.tokenizer), self.model.config.vocab_size))
        self.special, self.end = special, self.tokenizer.eos_token_id
        method = self.recipe["method"]
        self.steps = train["max_steps"]
        self.uses_bss, self.uses_rac = "bss" in method["name"], "rac" in method["name"]
        self.bss, self.rac = method["bss"], method["rac"]

    # which examples

    def batch(self, step: int) -> tuple[list[dict[str, str]], int]:
        """The rows of a step in order, and the visit."""
        train, count = self.recipe["train"], len(self.rows)
        per_epoch = math.ceil(count / train["global_batch"])
        epoch, window = divmod(step, per_epoch)
        raw = np.random.Philox(np.random.SeedSequence([train["seed"], 0, epoch])).random_raw(count)
        order = np.argsort(raw, kind="stable")[window * train["global_batch"] :][: train["global_batch"]]
        return [self.rows[i] for i in order], epoch

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def prompt(self, row: dict[str, str]) -> list[int]:
        return self.ids(f"{row['prompt']}\n\n")

    def gold(self, row: dict[str, str]) -> list[int]:
        return [*self.ids(row["completion"]), self.end][: self.recipe["data"]["max_response_tokens"]]

    # what is generated

    def key(self, stream: int, visit: int, row: dict[str, str]) -> int:
        visit = visit if self.recipe["selfgen"]["noise"] == "fresh" else 0
        return key_of(self.recipe["train"]["seed"], stream, visit, row["id"])

    @torch.no_grad()
    def draw(
        self, context: list[int], settings: dict[str, Any], banned: list[int], key: int, position: int, found: Any
    ) -> int:
        logits = self.model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1]
        scores = filtered(logits.double().numpy(), banned, settings)
        if settings["temperature"] > 0:
            scores = scores + gumbel(key, position, len(scores))
        best = int(scores.argmax())
        recorded = found[position] if found and position < len(found) else best
        if recorded != best and scores[best] - scores[recorded] < TIE:
            self.ties += 1
            return recorded
        return best

    def free(self, prompt: list[int], budget: int, key: int, found: Any) -> tuple[list[int], int | None]:
        """A draft or a rewrite without the end token that stopped it, and that token."""
        answer: list[int] = []
        banned = [*(set(self.special) - {self.end}), *self.beyond]
        while len(answer) < budget:
            token = self.draw(prompt + answer, self.rac, banned, key, len(answer), found)
            if token == self.end:
                return answer, token
            answer.append(token)
        return answer, None

    def record(self, step: int, place: int, row: dict[str, str], visit: int, mixes: bool) -> Record:
        """What the round file must say of one example at one step."""
        prompt, gold = self.prompt(row), self.gold(row)
        record: Record = dict.fromkeys(
            ["coins", "mixed_ids", "draft_ids", "draft_stop_id", "draft_kept", "rewrite_ids", "rewrite_stop_id"]
        )
        rate = mix_rate(step, self.steps, self.bss) if self.uses_bss else 0.0
        record |= {"step": step, "example_id": row["id"], "visit": visit, "mix_rate": rate, "gold_ids": gold}
        record |= {"target_ids": None, "target_kind": None}
        found = self.recorded.get((step, place), {})
        if mixes:
            record |= self.mixed(prompt, gold, rate, self.key(BSS, visit, row), found.get("mixed_ids"))
        if self.uses_rac:
            record |= self.draft(prompt, gold, row, visit, found)
        return record

    def mixed(self, prompt: list[int], gold: list[int], rate: float, key: int, found: Any) -> Record:
        coins = [uniform(key, t) < rate for t in range(len(gold) - 1)] + [False]
        context: list[int] = []
        for t, coin in enumerate(coins):
            banned = [*self.special, *self.beyond]
            token = self.draw(prompt + context, self.bss, banned, key, t, found) if coin else gold[t]
            context.append(token)
        return {"coins": coins, "mixed_ids": context}

    def draft(self, prompt: list[int], gold: list[int], row: dict[str, str], visit: int, found: Record) -> Record:
        budget = self.rac["max_draft_tokens"]
        draft, stop = self.free(prompt, budget, self.key(DRAFT, visit, row), _sampled(found, "draft"))
        made = {"draft_ids": draft, "draft_stop_id": stop, "draft_kept": len(draft)}
        if not draft:
            return made
        if self.rac["cut"] == "uniform":
            made["draft_kept"] = 1 + int(uniform(self.key(CUT, visit, row), 0) * len(draft))
        made |= {"target_ids": gold, "target_kind": "reference"}
        return made | (self.rewrite(prompt, draft, row, visit, found) if self.rac["target"] == "rewrite" else {})

    def rewrite(self, prompt: list[int], draft: list[int], row: dict[str, str], visit: int, found: Record) -> Record:
        """The whole draft is shown, whatever the cut keeps of it."""
        cue = self.ids("\n\n" + self.rac["rewrite_cue"].replace("{reference}", row["completion"]) + "\n\n")
        budget, key = self.recipe["data"]["max_response_tokens"], self.key(REWRITE, visit, row)
        ids, stop = self.free(prompt + draft + cue, budget, key, _sampled(found, "rewrite"))
        made: Record = {"rewrite_ids": ids, "rewrite_stop_id": stop}
        before, after = (f1(self.tokenizer.decode(x), row["completion"]) for x in (draft, ids))
        if stop is not None and (after > before or after == 1.0):
            made |= {"target_ids": [*ids, self.end], "target_kind": "rewrite"}
        return made

    def round(self, number: int) -> list[Record]:
        """All that the weights of now generate for round `number` (from 1)."""
        every = self.recipe["selfgen"]["refresh_every"]
        steps = range((number - 1) * every, min(number * every, self.steps))
        mixes = self.uses_bss and any(mix_rate(step, self.steps, self.bss) > 0 for step in steps)
        records = []
        for step in steps:
            rows, visit = self.batch(step)
            records += [self.record(step, place, row, visit, mixes) for place, row in enumerate(rows)]
        return records

    # one update

    def sequences(self, row: dict[str, str], record: Record | None) -> list[tuple[list[int], list[int], float]]:
        """What is read, what is to be predicted, and the weight of that."""
        prompt, gold = self.prompt(row), self.gold(row)
        mixed = None if record is None else record["mixed_ids"]
        found = [(prompt + (mixed or gold), [IGNORE] * len(prompt) + gold, 1.0)]
        if record is not None and record["target_ids"]:
            cue = self.ids(f"\n\n{self.rac['correction_cue']}\n\n")
            before = prompt + record["draft_ids"][: record["draft_kept"]] + cue
            target = record["target_ids"]
            found.append((before + target, [IGNORE] * len(before) + target, self.rac["correction_weight"]))
        return found

    def update(self, step: int, records: list[Record]) -> dict[str, float]:
        """AdamW on sum(w * nll) / sum(w) over the tokens of the step; what metrics.jsonl must say of it."""
        rows, _ = self.batch(step)
        mine = [record for record in records if record["step"] == step] or [None] * len(rows)
        every = [one for row, record in zip(rows, mine, strict=True) for one in self.sequences(row, record)]
        total, weight = torch.zeros(()), 0.0
        for ids, labels, share in every:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            nll = F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORE, reduction="sum")
            total, weight = total + share * nll, weight + share * sum(label != IGNORE for label in labels)
        self.optimizer.zero_grad()
        loss = total / weight
        loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        clip = self.recipe["train"]["clip"]
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        rate = learning_rate(step, self.steps, self.recipe["train"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        tokens = sum(len(ids) for ids, _, _ in every)
        return {"loss": loss.item(), "lr": rate, "grad_norm": norm.item(), "num_tokens": tokens}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def _sampled(found: Record, name: str) -> list[int] | None:
    """The product's free sample, its stop id included."""
    ids, stop = found.get(f"{name}_ids"), found.get(f"{name}_stop_id")
    return None if ids is None else [*ids, *([] if stop is None else [stop])]
