"""The options that generate, evaluate and gap share. It is imported to show their help, so it needs no torch."""

from typing import Annotated

import typer

from ssgen_ds.errors import UserError

Model = Annotated[
    str, typer.Option("--model", help="Run folder, checkpoint, adapter, Hugging Face folder or id, or GGUF file.")
]
DataFile = Annotated[str, typer.Option(help="Prompts and references: a file, glob or hub id, in any data format.")]
Correct = Annotated[int, typer.Option(min=0, help="Correct the first answer at most this many times.")]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0)]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0)]
Batch = Annotated[str, typer.Option(help="Sequences decoded together on a rank; auto: as many as memory allows.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N examples.")]
MaxPromptTokens = Annotated[
    int | None, typer.Option(min=1, help="Cut longer prompts, as the training of the compared model did.")
]
Prompt = Annotated[str | None, typer.Option(help="Prompt template over the columns; default: the run's.")]
ReferenceColumn = Annotated[
    str | None, typer.Option(help="Column of the gold answers; default: the run's, or completion.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model. Read it first.")
]
DeepSpeedFile = Annotated[
    str | None, typer.Option("--deepspeed", help="DeepSpeed file. With ZeRO-3 the ranks share the model.")
]


def rows_of(text: str) -> int | str:
    """The value of --batch. Raises UserError."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch: must be auto or a whole number from 1 on, got {text!r}")
    return int(text)
