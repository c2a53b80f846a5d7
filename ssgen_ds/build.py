"""From a recipe to a Trainer. Cheap checks first: everything a user can get wrong is found before weights load."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssgen_ds import checkpoint, run_folder
from ssgen_ds.checkpoint import TrainState
from ssgen_ds.config import Recipe
from ssgen_ds.data.ahead import ReadAhead
from ssgen_ds.data.loader import Datasets, build_datasets
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.distributed import World, keep_freed_memory
from ssgen_ds.ds_config import (
    build_ds_config,
    offloads_optimizer,
    offloads_parameters,
    with_fitting_bucket,
    zero_stage,
)
from ssgen_ds.errors import UserError
from ssgen_ds.evaluate.during import TrainingEvaluation
from ssgen_ds.evaluate.scorers import Scorer
from ssgen_ds.logbook import Logbook, missing_packages
from ssgen_ds.loss import check_loss
from ssgen_ds.memory import return_freed_memory
from ssgen_ds.micro_batch import choose_packing
from ssgen_ds.modeling import families
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.cached import check_cache
from ssgen_ds.modeling.convert import cache_root
from ssgen_ds.modeling.gather import full_shape
from ssgen_ds.modeling.load import load_config, load_model, load_tokenizer, resolve_dtype
from ssgen_ds.modeling.optimizer import build_optimizer
from ssgen_ds.modeling.quantization import quantization_problems, slow_quantization
from ssgen_ds.plan.run import offload_problems
from ssgen_ds.progress import Progress
from ssgen_ds.recovery import check_resumable, choose_checkpoint, find_checkpoints
from ssgen_ds.selfgen.block import BlockChooser
from ssgen_ds.selfgen.bss import context_sequence
from ssgen_ds.selfgen.engine_sampler import inference_mode
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.rounds import RoundGenerator
from ssgen_ds.selfgen.strategy import build_sampler, host_bytes
from ssgen_ds.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Tokens in every form."""

    tokenizer: Any
    chat: ChatFormat
    datasets: Datasets
    vocab_size: int  # width of the logits; the tokenizer may know fewer


@dataclass
class Foundations:
    """What is known before any weight is loaded."""

    recipe: Recipe
    checkpoint: Path | None
    state: TrainState  # at which training starts: the checkpoint's, or step 0
    ds_config: dict[str, Any]
    inputs: Inputs
    total_steps: int


def lay_foundations(recipe: Recipe, world: World) -> Foundations | None:
    """Run folder, tokenizer, data, DeepSpeed file; None when the run in output_dir is already finished."""
    run_dir = Path(recipe.output_dir)
    world.together(lambda: run_folder.open_run(recipe) if world.is_main else None)
    if world.broadcast(run_folder.is_finished(run_dir)):
        return None
    dtype = str(resolve_dtype(recipe.model, world.device)).removeprefix("torch.")
    ds_config = world.together(lambda: build_ds_config(recipe, world.size, dtype))
    world.together(lambda: Scorer(recipe.eval.metrics, "eval.metrics"))  # one of the user's own may not be there
    world.together(lambda: _refuse(missing_packages(recipe.log) + quantization_problems(recipe)))
    if world.is_main and (slow := slow_quantization(recipe, world.device.type)):
        log.warning(slow)
    inputs = prepare_inputs(recipe, world)
    if offloads_optimizer(ds_config) or offloads_parameters(ds_config):
        free = host_bytes(world)
        world.together(lambda: _refuse(offload_problems(recipe, dtype, world.size, free)))
    fingerprints = inputs.datasets.fingerprint, inputs.chat.fingerprint()
    state = TrainState(0, 0, *fingerprints, world.size, zero_stage(ds_config), run_folder.package_versions())
    checkpoint_path, state = _starting_point(recipe, state, world)
    total_steps = recipe.train.max_steps or recipe.train.epochs * inputs.datasets.plan.steps_per_epoch
    return Foundations(recipe, checkpoint_path, state, ds_config, inputs, total_steps)


def _starting_point(recipe: Recipe, state: TrainState, world: World) -> tuple[Path | None, TrainState]:
    """The checkpoint to go on from and its state, as rank 0 sees them; None and `state` to start at step 0."""
    run_dir = Path(recipe.output_dir)
    found = world.together(lambda: find_checkpoints(run_dir, recipe.resume) if world.is_main else [])
    path = choose_checkpoint(found, run_dir, world)
    if path is None:
        return None, state

    def check() -> TrainState:
        what = f"resume: {path} was trained by another recipe"
        run_folder.refuse_changes(path / checkpoint.RECIPE, recipe, what)
        return check_resumable(path, checkpoint.read_state(path), state, log.warning)

    return path, world.broadcast(world.together(lambda: check() if world.is_main else None))


def prepare_inputs(recipe: Recipe, world: World) -> Inputs:
    """Tokenizer, model configuration and data, checked against each other, the same on every rank."""
    tokenizer = world.main_first(lambda: load_tokenizer(recipe.model))
    config = world.together(lambda: load_config(recipe.model))
    world.together(lambda: families.check(config, recipe.generates))
    if recipe.data.packing:
        world.together(lambda: families.check_packing(config))
    chat = world.together(lambda: ChatFormat(tokenizer, recipe.data, generation_stops(config)))
    world.together(lambda: _refuse(context_problems(recipe, chat, config.get_text_config())))
    datasets = world.main_first(lambda: build_datasets(recipe, chat, cache_dir=cache_root() / "data"))
    return Inputs(tokenizer, chat, datasets, config.get_text_config().vocab_size)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def generation_stops(config: Any) -> list[int]:
    """End-of-sequence ids that the model's configuration names; one, several or none."""
    stops = config.get_text_config().eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def context_problems(recipe: Recipe, chat: ChatFormat, config: Any) -> list[str]:
    """Whether the longest sequence that the recipe allows fits the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)  # a family trait: some have no limit
    return [
        f"{what} = {longest} tokens, but the model has {limit} positions; lower data.max_prompt_tokens"
        for longest, what in (longest_sequence(recipe, chat), _longest_evaluated(recipe, chat))
        if limit is not None and longest > limit
    ]


def _longest_evaluated(recipe: Recipe, chat: ChatFormat) -> tuple[int, str]:
    """The most tokens that answering an evaluation example may take, and the sum that this is."""
    evaluation = recipe.eval
    if not evaluation.metrics:
        return 0, ""
    longest, what = recipe.data.max_prompt_tokens + evaluation.max_new_tokens, "data.max_prompt_tokens + "
    if not evaluation.correct:
        return longest, f"{what}eval.max_new_tokens"
    longest += len(chat.correction_ids(recipe.method.rac.correction_cue)) + evaluation.max_new_tokens
    return longest, f"{what}2 * eval.max_new_tokens + the correction cue"


def longest_sequence(recipe: Recipe, chat: ChatFormat) -> tuple[int, str]:
    """The most tokens that a sequence may have by the recipe, and the sum that this is."""
    longest = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    what = "data.max_prompt_tokens + data.max_response_tokens"
    if recipe.method.uses_rac:
        rac = recipe.method.rac
        longest += rac.max_draft_tokens + len(chat.correction_ids(rac.correction_cue))
        what += " + method.rac.max_draft_tokens + the correction cue"
        if rac.target == "rewrite":  # its prompt also shows the reference
            longest += recipe.data.max_response_tokens + len(chat.correction_ids(rac.rewrite_cue))
            what += " + data.max_response_tokens + the rewrite cue"
    return longest, what


def build_engine(foundations: Foundations, world: World) -> Any:
    """Load the model, add the adapter, hand both to DeepSpeed."""
    import deepspeed

    recipe, ds_config = foundations.recipe, foundations.ds_config
    if world.device.type == "cpu":
        (keep_freed_memory if zero_stage(ds_config) == 3 else return_freed_memory)()
    model = world.together(
        lambda: load_model(
            recipe.model, recipe.adapter, ds_config, device=world.device, quantization=recipe.quantization
        )
    )
    if recipe.adapter.kind == "lora":
        model = world.together(
            lambda: apply_adapter(model, recipe.adapter, recipe.model.adapter_path, recipe.train.seed)
        )
    trained = sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad)
    ds_config = with_fitting_bucket(ds_config, trained, world.size)
    optimizer = build_optimizer(model, recipe.train, ds_config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    engine.train()  # loading leaves eval mode, in which dropout and gradient checkpointing do nothing
    with inference_mode(engine.module):
        world.together(lambda: check_loss(engine.module, recipe.data.packing))
        if recipe.generates:
            world.together(lambda: check_cache(engine.module))
    return engine


def build_trainer(foundations: Foundations, world: World) -> Trainer:
    """The trainer at its starting point: step 0, or the checkpoint's."""
    recipe, path = foundations.recipe, foundations.checkpoint
    stage, state = zero_stage(foundations.ds_config), foundations.state
    engine = build_engine(foundations, world)
    if path is not None:
        checkpoint.load_engine(engine, path, world)
    logbook = world.together(lambda: _open_logbook(foundations, state.step, stage, world) if world.is_main else None)
    progress = Progress(
        foundations.total_steps, world.is_main, state.step + 1, steps_per_round=recipe.selfgen.refresh_every
    )
    inputs, run_dir = foundations.inputs, Path(recipe.output_dir)
    sampler = build_sampler(engine, recipe, world, progress.message)
    blocks = BlockChooser(
        recipe.selfgen.block, sampler, inputs.vocab_size, progress.message, run_dir / "selfgen" / "call_cost.json"
    )
    return Trainer(
        recipe=recipe,
        world=world,
        engine=engine,
        plan=ReadAhead(inputs.datasets.plan, recipe.selfgen.refresh_every, foundations.total_steps),
        eval_sequences=[context_sequence(example, None) for example in inputs.datasets.evaluation],
        evaluation=TrainingEvaluation(recipe, inputs.chat, inputs.vocab_size, inputs.datasets.evaluation, sampler),
        generator=RoundGenerator(recipe, inputs.chat, inputs.vocab_size, sampler, blocks),
        history=History(run_dir, world),
        state=state,
        total_steps=foundations.total_steps,
        logbook=logbook,
        progress=progress,
        packing=choose_packing(engine, recipe, _longest(recipe, inputs), world, progress.message),
        resumed_round=None if path is None or recipe.method.name == "sft" else path / "round.parquet",
    )


def _longest(recipe: Recipe, inputs: Inputs) -> int:
    """Tokens of the longest sequence that training may see: by the data where that is known, else by the recipe."""
    longest, _ = longest_sequence(recipe, inputs.chat)
    unused = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens - inputs.datasets.longest
    return longest - max(0, unused)


def _open_logbook(foundations: Foundations, step: int, stage: int, world: World) -> Logbook:
    recipe = foundations.recipe
    run_dir = Path(recipe.output_dir)
    environment = run_folder.describe_environment(
        world_size=world.size,
        device=str(world.device.type),
        zero_stage=stage,
        total_steps=foundations.total_steps,
        data=foundations.inputs.datasets.summary,
    )
    run_folder.start_run(recipe, environment)
    return Logbook(run_dir, recipe.log, step, run_dir.name, recipe.model_dump(mode="json"))
