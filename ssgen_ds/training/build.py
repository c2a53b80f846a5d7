"""From what is known of a run to its Trainer: here weights load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ssgen_ds.checkpoint import save as checkpoint
from ssgen_ds.data.lengths import longest_evaluated, longest_sequence
from ssgen_ds.data.read_ahead import ReadAhead
from ssgen_ds.distributed.host_memory import keep_freed_memory, return_freed_memory
from ssgen_ds.distributed.world import World
from ssgen_ds.evaluate.gold_loss import GoldLoss
from ssgen_ds.evaluate.while_training import TrainingEvaluation
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.cached import inference_mode
from ssgen_ds.modeling.gather import full_shape
from ssgen_ds.modeling.load import load_model
from ssgen_ds.modeling.loss import check_loss
from ssgen_ds.modeling.optimizer import build_optimizer
from ssgen_ds.recipe.deepspeed import (
    with_fitting_bucket,
    zero_stage,
)
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.run import folder as run_folder
from ssgen_ds.run.layout import CALL_COST_FILE, METRICS_FILE, ROUND
from ssgen_ds.run.logbook import Logbook, carry_over
from ssgen_ds.run.progress import Progress
from ssgen_ds.sampler.block import BlockChooser
from ssgen_ds.sampler.build import build_sampler
from ssgen_ds.selfgen.bss import context_sequence
from ssgen_ds.selfgen.history import History
from ssgen_ds.selfgen.rounds import RoundGenerator
from ssgen_ds.training.foundations import Foundations, Inputs
from ssgen_ds.training.micro_batch import Measured, choose_packing
from ssgen_ds.training.one_forward import one_forward
from ssgen_ds.training.rounds import Rounds
from ssgen_ds.training.saver import Saver
from ssgen_ds.training.trainer import Trainer


def build_engine(foundations: Foundations, world: World) -> Any:
    """Load the model, add the adapter, hand both to DeepSpeed."""
    import deepspeed

    recipe, ds_config, chat = foundations.recipe, foundations.ds_config, foundations.inputs.chat
    if world.device.type == "cpu":
        (keep_freed_memory if zero_stage(ds_config) == 3 else return_freed_memory)()
    model = world.together(
        lambda: load_model(
            recipe.model,
            recipe.adapter,
            ds_config,
            device=world.device,
            quantization=recipe.quantization,
            control=world.control,
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
            longest = max(longest_sequence(recipe, chat)[0], longest_evaluated(recipe, chat)[0])
            world.together(lambda: check_cache(engine.module, longest))
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
    blocks = BlockChooser(recipe.selfgen.block, sampler, inputs.vocab_size, progress.message, run_dir / CALL_COST_FILE)
    longest = _longest(recipe, inputs)
    packing, choice = choose_packing(engine, recipe, longest, world, progress.message, state.micro_batch)
    examples = inputs.datasets.evaluation
    evaluation = TrainingEvaluation(
        recipe=recipe,
        chat=inputs.chat,
        blocks=blocks,
        examples=examples,
        gold=GoldLoss(engine, [context_sequence(example, None) for example in examples], packing, world),
        total_steps=foundations.total_steps,
        progress=progress,
        logbook=logbook,
    )
    saver = Saver(engine, recipe, world, state.step, spared=evaluation.best.step)
    plan = ReadAhead(inputs.datasets.plan, recipe.selfgen.refresh_every, foundations.total_steps)
    taken = 0.0 if choice is None else Measured(**choice).bytes_needed
    reuse = one_forward(engine, recipe, packing, longest, taken, world, progress.message)
    generator = RoundGenerator(recipe, inputs.chat, inputs.vocab_size, sampler, blocks, reuse)
    rounds = Rounds(
        recipe=recipe,
        world=world,
        plan=plan,
        generator=generator,
        history=History(run_dir, world),
        saver=saver,
        progress=progress,
        total_steps=foundations.total_steps,
        resumed=None if path is None or recipe.method.name == "sft" else path / ROUND,
    )
    return Trainer(
        recipe=recipe,
        world=world,
        engine=engine,
        plan=plan,
        generator=generator,
        rounds=rounds,
        evaluation=evaluation,
        saver=saver,
        state=replace(state, micro_batch=choice),
        total_steps=foundations.total_steps,
        logbook=logbook,
        progress=progress,
        packing=packing,
        one_forward=reuse,
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
    if foundations.checkpoint is not None:
        carry_over(foundations.checkpoint.parents[1] / METRICS_FILE, run_dir / METRICS_FILE, step)
    return Logbook(run_dir, recipe.log, step, run_dir.name, recipe.model_dump(mode="json"))
