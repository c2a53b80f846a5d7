"""The recipe: typed, every default written here and only here. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from ssgen_ds.recipe.user_paths import expanded

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
PathText = Annotated[str, AfterValidator(expanded)]
Column = Literal["prompt", "completion", "messages", "id", "system", "tools"]
PathOrNone = Annotated[str | None, AfterValidator(lambda path: None if path is None else expanded(path))]


def _number_or(*words: str) -> AfterValidator:
    """A whole number from 1 on, or one of a few words."""

    def check(value: int | str) -> int | str:
        if value not in words and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"must be {' or '.join(repr(word) for word in words)} or a whole number from 1 on")
        return value

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    path: PathText  # hub id, folder, GGUF file, or package:MODULE/file for one inside an installed package
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on an accelerator, float32 on a CPU
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    adapter_path: PathOrNone = None


class AdapterConfig(Section):
    kind: Literal["none", "lora"] = "none"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    dtype: Literal["auto", "float32"] = "auto"  # that it computes in; auto: the base's


class QuantizationConfig(Section):
    """Of the frozen base under a LoRA adapter."""

    kind: Literal["none", "nf4"] = "none"
    double: bool = True  # the scales of the blocks are quantised, too: .37 bits a weight less


class SourceConfig(Section):
    """One entry of a mixture. `columns` and `prompt` override those of `data`."""

    path: PathText
    weight: Annotated[float, Field(gt=0)] = 1.0
    split: str = "train"  # hub ids only
    name: str | None = None  # hub ids only: the configuration
    columns: dict[Column, str] | None = None
    prompt: str | None = None


class DataConfig(Section):
    train: list[SourceConfig]
    eval: list[SourceConfig] = []
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    columns: dict[Column, str] = {}
    prompt: str | None = None  # template over the row's columns: "Summarize:\n\n{document}"
    system: str | None = None
    chat_template: PathOrNone = None  # a Jinja file that replaces the tokenizer's own
    chat_template_kwargs: dict[str, JsonValue] = {}  # arguments of the template, such as enable_thinking: false
    ignore_fields: list[str] = []  # fields of messages, and columns, that are left out though they say something
    max_prompt_tokens: Positive = 1024
    max_response_tokens: Positive = 512
    over_length: Literal["truncate", "skip", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    loss_on: Literal["last", "all"] = "last"
    streaming: bool = False
    packing: bool = False  # a forward pass reads its sequences as one row without padding, isolated from each other

    @model_validator(mode="before")
    @classmethod
    def _one_source_or_many(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            for key in ("train", "eval"):
                if key in data:
                    entries = data[key] if isinstance(data[key], list) else [data[key]]
                    data[key] = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
        return data


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 keeps all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class BssConfig(SamplingConfig):
    mix_rate: Share = 0.1  # the peak; the schedule scales it and never exceeds it
    schedule: Literal["constant", "linear", "cosine", "inverse_sigmoid"] = "constant"


class RacConfig(SamplingConfig):
    max_draft_tokens: Positive = 128
    cut: Literal["none", "uniform"] = "none"
    target: Literal["reference", "rewrite"] = "reference"
    correction_weight: Annotated[float, Field(ge=0)] = 1.0
    correction_cue: str = "Review your answer above. Correct its mistakes and give the improved answer only."
    rewrite_cue: str = (
        "The reference answer is:\n\n{reference}\n\n"
        "Rewrite your answer above so that it agrees with the reference. Give the answer only."
    )
    metric: Literal["rougeL", "f1", "exact_match", "math"] = "rougeL"


class MethodConfig(Section):
    name: Literal["sft", "bss", "rac", "bss+rac"] = "sft"
    bss: BssConfig = BssConfig()
    rac: RacConfig = RacConfig()

    @property
    def uses_bss(self) -> bool:
        return self.name in ("bss", "bss+rac")

    @property
    def uses_rac(self) -> bool:
        return self.name in ("rac", "bss+rac")


class TrainConfig(Section):
    epochs: Positive | None = None
    max_steps: Positive | None = None
    global_batch: Positive = 32  # examples per optimizer step, over all ranks
    # Sequences per forward pass on one rank; auto: as many as fit, found by measuring before the first step.
    micro_batch: Annotated[int | str, Field(union_mode="left_to_right"), _number_or("auto")] = 4
    micro_batch_tokens: Positive | None = None  # per forward pass on one rank; a longer sequence goes alone
    lr: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03  # below 1: share of all steps; else steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: Annotated[float, Field(ge=0)] = 1.0  # global gradient norm; 0 turns clipping off
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"  # 8-bit: bitsandbytes
    # Updates in a row that may be left out because loss or gradient was not finite; one more ends the run.
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def length(self) -> str:
        """For messages."""
        number, unit = (self.max_steps, "step") if self.max_steps else (self.epochs, "epoch")
        return f"{number} {unit}{'s' * (number != 1)}"


class SelfgenConfig(Section):
    refresh_every: Positive = 8  # optimizer steps per round
    noise: Literal["fresh", "common"] = "fresh"
    # ZeRO-3: gather each layer at each call, or all at once. QLoRA: dequantise at each call (sharded), or once.
    strategy: Literal["auto", "sharded", "gathered"] = "auto"
    # Coins tried in one pass (W); auto measures the model's calls and chooses for every round.
    block: Annotated[int | str, Field(union_mode="left_to_right"), _number_or("auto", "all")] = "auto"
    # Sequences generated together on one rank; auto: as many as the memory for their keys and values allows.
    batch: Annotated[int | str, Field(union_mode="left_to_right"), _number_or("auto")] = "auto"
    # The passes that sample a mixed context are its training forward, too; auto: where that is exact and fits.
    reuse: Literal["auto", "off", "on"] = "auto"
    cuda_graph: bool = False  # replay calls of one token a row; not run on a GPU yet


class EvalConfig(SamplingConfig):
    every: Positive | None = None  # optimizer steps; None: at the end only
    max_examples: Positive = 256
    metrics: list[str] = []  # of generated answers, as `ssgen evaluate --metrics` has them; []: the loss alone
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0 is greedy
    correct: Annotated[int, Field(ge=0)] = 0  # correction turns after the first answer, at most
    best: str | None = None  # a metric, or loss: the checkpoint of the step where it is best is kept, too


class CheckpointConfig(Section):
    every: Positive | None = None  # optimizer steps; None: at the end only
    keep: Positive = 2


class RecoveryConfig(Section):
    """Seconds, and how often a run may crash at the same step."""

    rendezvous: Annotated[float, Field(gt=0)] = 120.0  # for all ranks to meet at the start
    rank_silence: Annotated[float, Field(ge=3)] = 60.0  # without a sign of life of a rank: the others end
    collective_timeout: Annotated[float, Field(ge=3)] = 1800.0  # without progress on any rank: all end
    max_restarts: Annotated[int, Field(ge=0)] = 3  # that got no further than the run before; 0: no limit


class LogConfig(Section):
    tensorboard: bool = True
    wandb: bool = False
    project: str = "ssgen-ds"


class Recipe(Section):
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    data: DataConfig
    method: MethodConfig = MethodConfig()
    train: TrainConfig
    deepspeed: PathText = "ds_configs/zero2.json"
    selfgen: SelfgenConfig = SelfgenConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    log: LogConfig = LogConfig()
    output_dir: PathText
    resume: PathText = "auto"  # auto | never | PATH of a checkpoint

    @property
    def generates(self) -> bool:
        """Whether the run generates at all: to train on it, or to evaluate."""
        return self.method.name != "sft" or bool(self.eval.metrics)
