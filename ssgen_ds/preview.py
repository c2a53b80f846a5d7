"""`ssgen preview`: what the model will read and what it must predict, before any training.

Colours: dim = read only, green = trained, yellow = the model's own token read in place of gold, red = end token.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ssgen_ds.config import Recipe
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.selfgen.rounds import Record, RoundGenerator, Slot
from ssgen_ds.window import IGNORE, Sequence


def preview(recipe: Recipe, number: int) -> None:
    """Print the first `number` examples of the first step, at the peak mix rate, generated with the base model."""
    from ssgen_ds.build import prepare_inputs
    from ssgen_ds.distributed import process_group
    from ssgen_ds.modeling.load import load_model
    from ssgen_ds.selfgen.engine_sampler import EngineSampler

    console = Console()
    with process_group() as world:
        inputs = prepare_inputs(recipe, world)
        chat, datasets = inputs.chat, inputs.datasets
        rate = recipe.method.bss.mix_rate if recipe.method.uses_bss else 0.0
        items = datasets.plan.batch(0)[:number]
        slots = [Slot(0, item.example, item.visit, rate) for item in items]
        model = (
            load_model(recipe.model, recipe.adapter, {}, device=world.device) if recipe.method.name != "sft" else None
        )
        generator = RoundGenerator(
            recipe, chat, inputs.vocab_size, EngineSampler(model, world, sharded=False, batch=number)
        )
        records, _ = generator.generate(slots)
        console.print(
            Text.assemble("read only ", ("trained ", "green"), ("sampled ", "black on yellow"), ("end", "red"))
        )
        for slot, record in zip(slots, records, strict=True):
            _show(console, slot, record, generator.sequences(slot, record), chat)
        console.print(datasets.summary)


def _show(console: Console, slot: Slot, record: Record, sequences: list[Sequence], chat: ChatFormat) -> None:
    example = slot.example
    ending = "truncated: no end token is trained" if example.truncated else "ends in an end token"
    console.rule(
        f"{example.id}: {len(example.prompt_ids)} prompt + {len(example.response_ids)} response tokens, {ending}"
    )
    coins = record.coins or [False] * len(record.gold_ids)
    sampled = {len(example.prompt_ids) + t for t, coin in enumerate(coins) if coin}
    console.print(coloured(sequences[0], sampled, chat))
    if sampled:
        console.print(f"{len(sampled)} of {len(coins)} context tokens sampled, {record.bss_passes} passes", style="dim")
    for correction in sequences[1:]:
        console.print(f"correction, weight {correction.weight}, target: {record.target_kind}", style="bold")
        console.print(coloured(correction, set(), chat))


def coloured(sequence: Sequence, sampled: set[int], chat: ChatFormat) -> Text:
    """The tokens a sequence reads, coloured by what becomes of them; a gold label that differs is shown after `→`."""
    text = Text()
    for position, (token, label) in enumerate(zip(sequence.input_ids, sequence.labels, strict=True)):
        piece = chat.decode([token])
        if label == IGNORE:
            text.append(piece, "dim")
        elif position in sampled:
            text.append(piece, "black on yellow")
            if label != token:
                text.append(f"→{chat.decode([label])}", "green")
        else:
            text.append(piece, "red" if token in chat.stop_ids else "green")
    return text
