"""`ssgen preview`: what the model will read and what it must predict, before any training.

Each sequence is shown in blocks: `reads` is context without loss, `learns` is trained. Inside `learns` a token that the
model sampled itself is shown with the gold label it stands for; colours where there are some, brackets where not.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.data.window import IGNORE, Sequence
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.selfgen.generated import Generated, Slot
from ssgen_ds.selfgen.rounds import RoundGenerator

SHOWN_TOKENS = 48  # of a long stretch that is only read, at either end
READ, LEARNT, SAMPLED, END = "dim", "green", "black on yellow", "bold red"


def preview(recipe: Recipe, number: int) -> None:
    """Print the first `number` training examples, mixed at the peak rate; what is sampled comes from the base model."""
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.modeling.load import load_model
    from ssgen_ds.sampler.block import BlockChooser
    from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
    from ssgen_ds.training.foundations import prepare_inputs

    with process_group() as world:
        inputs = prepare_inputs(recipe, world)
        rate = recipe.method.bss.mix_rate if recipe.method.uses_bss else 0.0
        slots = _first_slots(inputs.datasets.plan, number, rate)
        model: Any = None
        if recipe.method.name != "sft":
            quantization = recipe.quantization
            model = world.together(
                lambda: load_model(recipe.model, recipe.adapter, {}, device=world.device, quantization=quantization)
            )
        sampler = EngineSampler(model, world, BatchLimit(rows=8))
        generator = RoundGenerator(
            recipe, inputs.chat, inputs.vocab_size, sampler, BlockChooser(1, sampler, inputs.vocab_size)
        )
        records, _ = generator.generate(slots)
        printer = Printer(Console(quiet=not world.is_main, highlight=False), inputs.chat)
        printer.legend(recipe.method.uses_bss)
        for slot, record in zip(slots, records, strict=True):
            printer.example(slot, record, generator.sequences(slot, record))
        printer.summary(inputs.datasets.summary)
        world.barrier()


def _first_slots(plan: Any, number: int, rate: float) -> list[Slot]:
    slots: list[Slot] = []
    step = 1
    while len(slots) < number:
        slots += [Slot(step, item.example, item.visit, rate) for item in plan.batch(step)]
        step += 1
    return slots[:number]


class Printer:
    """Writes examples to a console; without colours, brackets say the same."""

    def __init__(self, console: Console, chat: ChatFormat) -> None:
        self.console = console
        self.chat = chat
        self.plain = console.color_system is None

    def legend(self, uses_bss: bool) -> None:
        parts = [Text("reads: context without loss", READ), Text("learns: trained", LEARNT), self._end("end token")]
        if uses_bss:
            parts.insert(2, Text.assemble(self._sampled("sampled", "gold"), " the model's own token → the label"))
        self.console.print(Text("   ").join(parts), soft_wrap=True)

    def example(self, slot: Slot, record: Generated, sequences: list[Sequence]) -> None:
        """The example as it is trained on and, with RAC, its correction."""
        example = slot.example
        ending = "cut, so no end token is trained" if example.truncated else "end token included"
        cut = ", cut to fit" if example.prompt_truncated else ""
        title = f"{len(example.prompt_ids)} prompt tokens{cut}, {len(example.response_ids)} response tokens, {ending}"
        self.console.print()
        self.console.print(Text.assemble((example.id, "bold"), f": {title}"), soft_wrap=True)
        coins = record.mixed.coins if record.mixed else []
        sampled = {len(example.prompt_ids) + t for t, coin in enumerate(coins) if coin}
        self.console.print(self.blocks(sequences[0], sampled))
        if record.mixed:
            self._note(
                f"{len(sampled)} of {len(coins)} response tokens that it reads are the model's own "
                f"(mix rate {slot.mix_rate:g}), settled in {record.mixed.passes} passes"
            )
        if record.draft and record.target:
            correction = sequences[1]
            kept = f"{record.draft.kept} of {len(record.draft.ids)} tokens of the draft kept"
            self.console.print()
            self._note(f"its correction: weight {correction.weight:g}, target {record.target.kind}, {kept}")
            self.console.print(self.blocks(correction, set()))
        elif record.draft:
            self._note("no correction: the draft is empty")

    def summary(self, summary: dict[str, Any]) -> None:
        """One line of counts about the whole data set."""
        counts = [f"{key.replace('_', ' ')} {value}" for key, value in summary.items() if isinstance(value, int)]
        self.console.print()
        self._note("data: " + ", ".join(counts))
        if summary.get("unused_columns"):
            self._note(f"columns that nothing is taken from: {', '.join(summary['unused_columns'])}")
        if summary.get("bad_rows"):
            self._note(f"skipped rows are listed in {summary['skipped']}")

    def blocks(self, sequence: Sequence, sampled: set[int]) -> Table:
        """A sequence cut where the loss begins or ends: a label column and the text of each stretch."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=6, no_wrap=True)
        table.add_column(overflow="fold")
        positions = range(len(sequence.labels))
        for is_read, stretch in groupby(positions, key=lambda position: sequence.labels[position] == IGNORE):
            span = list(stretch)
            if is_read:
                table.add_row(Text("reads", READ), self._read([sequence.input_ids[i] for i in span]))
            else:
                table.add_row(Text("learns", LEARNT), self._learnt(sequence, span, sampled))
        return table

    def _read(self, ids: list[int]) -> Text:
        """Context, its middle left out when it is long."""
        hidden = len(ids) - 2 * SHOWN_TOKENS
        if hidden <= SHOWN_TOKENS:
            return Text(self.chat.decode(ids).rstrip("\n"), READ)
        head, tail = self.chat.decode(ids[:SHOWN_TOKENS]), self.chat.decode(ids[-SHOWN_TOKENS:])
        return Text.assemble((head, READ), (f" [... {hidden} tokens ...] ", "cyan"), (tail.rstrip("\n"), READ))

    def _learnt(self, sequence: Sequence, span: list[int], sampled: set[int]) -> Text:
        """Gold tokens as running text; sampled ones and the end token stand out."""
        text = Text()
        ends = self.chat.end_ids

        def kind(position: int) -> str:
            return "sampled" if position in sampled else "end" if sequence.labels[position] in ends else "gold"

        for what, stretch in groupby(span, key=kind):
            positions = list(stretch)
            if what == "gold":  # decoded together: a character may be spread over several tokens
                text.append(self.chat.decode([sequence.labels[i] for i in positions]), LEARNT)
            for i in positions:
                read, label = sequence.input_ids[i], sequence.labels[i]
                if what == "sampled":
                    gold = None if read == label else self.chat.decode([label])
                    text.append_text(self._sampled(self.chat.decode([read]), gold))
                elif what == "end":
                    text.append_text(self._end(self.chat.decode([label])))
        return text

    def _sampled(self, read: str, gold: str | None) -> Text:
        """The model's own token and, where it differs, `→` and its label; here blanks matter, so they are shown."""
        shown = Text.assemble((_visible(read), SAMPLED))
        if gold is not None:
            shown.append(f"→{_visible(gold)}", f"{LEARNT} underline")
        return Text.assemble("[", shown, "]") if self.plain else shown

    def _end(self, piece: str) -> Text:
        return Text(f"{{{piece}}}" if self.plain else piece, END)

    def _note(self, text: str) -> None:
        self.console.print(Text(text, "italic cyan"), soft_wrap=self.plain)


def _visible(piece: str) -> str:
    return piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
