"""The tasks, chosen by what a wrong token in the context does to the gold token after it.

reverse   Reverse the prompt and replace each letter by another, always the same. A place of the answer is a function of
          one place of the prompt: it is still determined, and still as easy, after a wrong token.
sort      Put the prompt's letters in order. Still determined by the prompt after a wrong token; but the easy way to
          find the next letter is from the last one, and that way a wrong letter leads astray.
sums      Running sums of digits, each step written out: the digit and the sum so far. The next sum is found from the
          last one. After a wrong one the gold sum can only be had by adding up the whole prompt anew, which nobody
          does step by step: the step that is right there is not gold.

Places of `sums` carry a letter in prompt and answer, so that finding the next digit is not what is hard.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

LETTERS = string.ascii_lowercase
MODULUS = 7  # of `sums`
CUE = "!"  # asks for a correction
_CIPHER = dict(zip(LETTERS, random.Random(1).sample(LETTERS, len(LETTERS)), strict=True))


def reverse(rng: random.Random, length: int) -> tuple[str, str]:
    prompt = "".join(rng.choices(LETTERS, k=length))
    return prompt, "".join(_CIPHER[letter] for letter in reversed(prompt))


def sort(rng: random.Random, length: int) -> tuple[str, str]:
    prompt = "".join(rng.choices(LETTERS, k=length))
    return prompt, "".join(sorted(prompt))


def sums(rng: random.Random, length: int) -> tuple[str, str]:
    digits = [rng.randrange(MODULUS) for _ in range(length)]
    totals = [sum(digits[: place + 1]) % MODULUS for place in range(length)]
    places = list(zip(LETTERS, digits, totals, strict=False))
    return "".join(f"{at}{digit}" for at, digit, _ in places), "".join(f"{at}{x}{total}" for at, x, total in places)


TASKS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {"reverse": reverse, "sort": sort, "sums": sums}


def write_data(
    folder: Path, task: str, num_train: int, train_lengths: tuple[int, int], eval_lengths: tuple[int, ...], each: int
) -> None:
    """`folder/TASK-train.jsonl` and, `each` prompts of every length, `folder/TASK-eval.jsonl`; no prompt is in both."""
    rng, make = random.Random(f"{task} of the controlled study"), TASKS[task]
    held_out: dict[str, dict[str, object]] = {}

    def row(name: str, length: int) -> dict[str, object]:
        while True:
            prompt, completion = make(rng, length)
            if prompt not in held_out:
                return {"id": name, "prompt": prompt, "completion": completion, "length": length}

    for length in eval_lengths:
        for i in range(each):
            new = row(f"{task}-eval-{length}-{i}", length)
            held_out[str(new["prompt"])] = new
    train = [row(f"{task}-train-{i}", rng.randint(*train_lengths)) for i in range(num_train)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("eval", held_out.values()), ("train", train)):
        text = "".join(json.dumps(item) + "\n" for item in rows)
        (folder / f"{task}-{name}.jsonl").write_text(text, encoding="utf-8")


def save_model(folder: Path, seed: int, layers: int, width: int) -> None:
    """A llama with fresh weights, and a tokenizer whose tokens are characters, as a Hugging Face folder."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "\n", CUE, *string.digits, *LETTERS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=width**-0.5 / 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
