"""What must hold to the bit or to rounding, on two ranks: the cases of `test_numerics.py`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from ssgen_ds.attempts import ATTEMPTS_FILE
from ssgen_ds.build import build_trainer, lay_foundations
from ssgen_ds.config import Recipe
from ssgen_ds.distributed import World
from ssgen_ds.errors import StopRequested, UserError
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.gather import full_state_dict
from ssgen_ds.selfgen.filters import Sampling
from ssgen_ds.selfgen.rac import free_request
from ssgen_ds.selfgen.rounds import Generated
from ssgen_ds.selfgen.store import read_round
from ssgen_ds.step import accumulate_gradients, train_step
from ssgen_ds.train import fit_and_export
from ssgen_ds.trainer import Trainer
from ssgen_ds.window import Packing, Sequence, build_window
from tests.support.stopping import stopping
from tests.support.tiny_runs import tiny_recipe

Case = Callable[[World, Path], Any]


def trainer_for(recipe: Recipe, world: World) -> Trainer:
    foundations = lay_foundations(recipe, world)
    assert foundations is not None
    return build_trainer(foundations, world)


def fresh(folder: Path, name: str, world: World, **overrides: Any) -> Recipe:
    """A recipe with an output folder of its own, empty."""
    output = folder / f"ranks{world.size}" / name
    if world.is_main:
        shutil.rmtree(output, ignore_errors=True)
    world.barrier()
    return tiny_recipe(folder, output, adapter__rank=4, **overrides)


def weights_hash(run_dir: Path) -> str:
    """Of the exported tensors, bit for bit."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for file in sorted((run_dir / "model").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokens_of(run_dir: Path) -> list[list[Generated]]:
    return [read_round(path) for path in sorted((run_dir / "selfgen").glob("*.parquet"))]


TIMES = (
    *("step_seconds", "eval_seconds", "selfgen_seconds", "tokens_per_second", "peak_memory_bytes"),
    *("peak_generate_bytes", "peak_train_bytes", "peak_optimizer_bytes"),
    *("checkpoint_seconds", "checkpoint_bytes"),
)
_COSTS = (
    "calls token_forwards draws accepted_length first_draws guess_hits flips flip_rate flip_bound ties strategy block"
)
ROUND_COSTS = tuple(f"selfgen_{name}" for name in _COSTS.split())


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without what a clock or a resume in mid-round changes."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES + ROUND_COSTS} for row in rows]


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradient_case(stage: int, micro_batch: int) -> Case:
    """Full gradients of one window, saved for comparison across micro batches, ranks and stages."""

    def case(world: World, folder: Path) -> str:
        recipe = fresh(folder, f"grad-{stage}-{micro_batch}", world, deepspeed=f"ds_configs/zero{stage}.json")
        trainer = trainer_for(recipe, world)
        sequences = [
            Sequence([5, 6, 7, 8 + i, *range(20, 20 + 3 * i), 9], [-100, -100, 7, *range(30, 31 + 3 * i), 9])
            for i in range(3)
        ] + [Sequence([40, 41, 42], [-100, -100, 42], weight=0.5)]
        window = build_window(sequences, Packing(micro_batch), world.rank, world.size, world.device)
        accumulate_gradients(trainer.engine, window, world)
        gradients = {n: safe_get_full_grad(p) for n, p in trainer.engine.module.named_parameters()}
        path = folder / f"grad-{world.size}-{stage}-{micro_batch}.pt"
        if world.is_main:
            torch.save(gradients, path)
        return str(path)

    return case


# -- resume ------------------------------------------------------------------------------------------------------------


def resume_case(adapter: str, stage: int, method: str, **more: Any) -> Case:
    """Stopped after every single step and continued each time, against uninterrupted."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        settings = {
            "method__name": method,
            "adapter__kind": adapter,
            "adapter__dropout": 0.1,
            "deepspeed": f"ds_configs/zero{stage}.json",
            "train__max_steps": 5,
            "train__schedule": "cosine",
            "selfgen__refresh_every": 3,
            "method__rac__cut": "uniform",
            "data__eval_fraction": 0.2,
            "eval__every": 2,
        } | more
        whole = fresh(folder, f"whole-{adapter}-{stage}-{method}", world, **settings)
        fit_and_export(whole, world)
        cut = fresh(folder, f"cut-{adapter}-{stage}-{method}", world, **settings)
        stops = 0
        for _ in range(10):
            try:
                fit_and_export(cut, stopping(world))
                break
            except StopRequested:
                stops += 1
        one, two = Path(whole.output_dir), Path(cut.output_dir)
        return {
            "stops": stops,
            "same_weights": weights_hash(one) == weights_hash(two),
            "same_tokens": tokens_of(one) == tokens_of(two),
            "same_metrics": metrics_of(one) == metrics_of(two),
            "checkpoints": sorted(path.name for path in (two / "checkpoints").iterdir()),
        }

    return case


def earlier_visits_case(stage: int) -> Case:
    """Weights that stand still and common noise: what was generated in epoch 1 is the right guess in epoch 2.

    Three runs of two epochs: in one go, stopped after every step, and that with the rounds' files removed each time.
    """

    def case(world: World, folder: Path) -> dict[str, Any]:
        runs = {}
        for name in ("whole", "cut", "bare"):
            recipe = fresh(
                folder,
                f"visits-{stage}-{name}",
                world,
                method__name="bss+rac",
                method__rac__target="rewrite",
                method__rac__rewrite_cue="Gold: {reference}",
                data__max_response_tokens=16,
                deepspeed=f"ds_configs/zero{stage}.json",
                selfgen__noise="common",
                selfgen__refresh_every=1,
                train__lr=1e-30,
                train__global_batch=13,
                train__max_steps=None,
                train__epochs=2,
            )
            generated: list[dict[str, Any]] = []
            for _ in range(1 if name == "whole" else 4):
                with suppress(StopRequested):
                    fit_and_export(recipe, world if name == "whole" else stopping(world))
                if name == "bare" or len(tokens_of(Path(recipe.output_dir))) == 4:
                    groups = tokens_of(Path(recipe.output_dir))
                    generated += [asdict(item) for group in groups for item in group]
                world.barrier()
                if name == "bare" and world.is_main:
                    for file in (Path(recipe.output_dir) / "selfgen").glob("*.parquet"):
                        file.unlink()
                world.barrier()
            rows = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
            costs = [{key: row[key] for key in ("selfgen_passes", *ROUND_COSTS)} for row in rows]
            runs[name] = {"generated": generated, "costs": costs}
        return runs

    return case


# -- identities --------------------------------------------------------------------------------------------------------


def same_as_sft_case(**overrides: Any) -> Case:
    """Methods that are switched off leave plain SFT, bit for bit."""

    def case(world: World, folder: Path) -> bool:
        hashes = []
        for name, settings in (("sft", {"method__name": "sft"}), ("off", overrides)):
            recipe = fresh(folder, f"identity-{name}", world, deepspeed="ds_configs/zero2.json", **settings)
            fit_and_export(recipe, world)
            hashes.append(weights_hash(Path(recipe.output_dir)))
        return hashes[0] == hashes[1]

    return case


def generation_leaves_no_trace_case(stage: int, adapter: str, **more: Any) -> Case:
    """The next training step is bitwise the same with and without a generation before it."""
    settings = {"deepspeed": f"ds_configs/zero{stage}.json", "model__gradient_checkpointing": True} | more

    def case(world: World, folder: Path) -> dict[str, Any]:
        losses, weights = [], []
        for generates in (False, True):
            recipe = fresh(
                folder,
                f"trace-{stage}-{adapter}",
                world,
                adapter__kind=adapter,
                adapter__dropout=0.2 if adapter == "lora" else 0.0,
                **settings,
            )
            trainer = trainer_for(recipe, world)
            sequences = [Sequence(list(range(3, 20)), list(range(3, 20))[:0] + [-100] * 9 + list(range(12, 20)))] * 4
            window = build_window(sequences, Packing(2), world.rank, world.size, world.device)
            for number in range(3):
                if generates:
                    requests = [free_request([5, 6, 7], 6 + i, 11 * i, frozenset({2})) for i in range(3)]
                    trainer.generator.sampler.sample(requests, Sampling(), 1)
                torch.manual_seed(number)
                losses.append(train_step(trainer.engine, window, 1e-2, world).loss)
            state = full_state_dict(trainer.engine.module)
            weights.append({name: tensor.clone() for name, tensor in (state or {}).items()})
        same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        return {"without": losses[:3], "with": losses[3:], "same_weights": same}

    return case


# -- generation on uneven ranks ----------------------------------------------------------------------------------------


def uneven_case(stage: int, number: int, **more: Any) -> Case:
    """Requests that end at different steps, or fewer requests than ranks: no hang, and the same tokens everywhere."""
    settings = {"deepspeed": f"ds_configs/zero{stage}.json", "selfgen__batch": 2} | more

    def case(world: World, folder: Path) -> list[list[int]]:
        recipe = fresh(folder, f"uneven-{stage}-{number}", world, **settings)
        trainer = trainer_for(recipe, world)
        requests = [
            free_request([4 + i, 60, 70 - i], 3 + 5 * i, 12345 + 11 * i, frozenset(range(3, 9))) for i in range(number)
        ]
        results, _, _ = trainer.generator.sampler.sample(requests, Sampling(), 1)
        mine = [result.tokens for result in results]
        assert world.gather(mine) == [mine] * world.size
        return mine

    return case


def rewrite_case(stage: int) -> Case:
    """RAC whose targets the model writes itself, with a uniform cut: what was generated in two rounds."""

    def case(world: World, folder: Path) -> list[dict[str, Any]]:
        recipe = fresh(
            folder,
            f"rewrite-{stage}",
            world,
            deepspeed=f"ds_configs/zero{stage}.json",
            method__name="rac",
            method__rac__target="rewrite",
            method__rac__cut="uniform",
            method__rac__rewrite_cue="Gold: {reference}",
            data__max_response_tokens=12,
        )
        fit_and_export(recipe, world)
        return [asdict(generated) for group in tokens_of(Path(recipe.output_dir)) for generated in group]

    return case


# -- faults ------------------------------------------------------------------------------------------------------------


def non_finite_case(stage: int, where: str, dtype: str) -> Case:
    """NaN on one rank only, in the loss or in the gradient alone: all ranks leave the update out, the weights stay."""

    def case(world: World, folder: Path) -> dict[str, Any]:
        settings = {"deepspeed": f"ds_configs/zero{stage}.json", "model__dtype": dtype}
        recipe = fresh(folder, f"nan-{stage}-{where}-{dtype}", world, **settings)
        trainer = trainer_for(recipe, world)
        before = full_state_dict(trainer.engine.module)
        sequences = [Sequence([5, 6, 7, 8], [-100, 6, 7, 8])] * 4
        window = build_window(sequences, Packing(2), world.rank, world.size, world.device)
        head = trainer.engine.module.get_output_embeddings()

        def poison(module: Any, args: Any, output: torch.Tensor) -> Any:
            if world.rank != world.size - 1:
                return None
            if where == "loss":
                return output * float("nan")
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output

        handle = head.register_forward_hook(poison)
        skipped = [not train_step(trainer.engine, window, 1e-2, world).is_applied for _ in range(2)]
        handle.remove()
        after = full_state_dict(trainer.engine.module)
        same = all(torch.equal(before[name], after[name]) for name in before) if before else True
        # The step after it is what it would have been: nothing of the bad gradient is left anywhere.
        goes_on = train_step(trainer.engine, window, 1e-2, world)
        fresh_trainer = trainer_for(recipe, world)
        first = train_step(fresh_trainer.engine, window, 1e-2, world)
        one, two = (full_state_dict(each.engine.module) for each in (trainer, fresh_trainer))
        return {
            "skipped": world.gather(skipped),
            "same_weights": same,
            "same_after": goes_on == first and all(torch.equal(one[name], two[name]) for name in one or {}),
        }

    return case


# -- export ------------------------------------------------------------------------------------------------------------


def export_case(adapter: str, stage: int) -> Case:
    """`model/` loads with transformers or peft as it is and gives the engine's logits."""

    def case(world: World, folder: Path) -> float | None:
        recipe = fresh(
            folder, f"export-{adapter}-{stage}", world, adapter__kind=adapter, deepspeed=f"ds_configs/zero{stage}.json"
        )
        trainer = trainer_for(recipe, world)
        with trainer.progress:
            trainer.fit()
        module = trainer.engine.module.eval()
        ids = torch.tensor([[5, 9, 30, 40, 41, 42]])
        with torch.no_grad():
            expected = module(input_ids=ids).logits
        out = Path(recipe.output_dir) / "model"
        tokenizer = trainer.generator.chat.tokenizer
        save_model(module, tokenizer, out, recipe.model.path, is_main=world.is_main)
        world.barrier()
        if not world.is_main:
            return None
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        loader = AutoPeftModelForCausalLM if adapter == "lora" else AutoModelForCausalLM
        with torch.no_grad():
            loaded = loader.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids).logits
        return (loaded - expected).abs().max().item()

    return case


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused_case(**overrides: Any) -> Case:
    """The message of the UserError that every rank raises."""

    def case(world: World, folder: Path) -> str:
        message = ""
        try:
            recipe = fresh(folder, "refused", world, **overrides)
            fit_and_export(recipe, world)
        except UserError as error:
            message = str(error)
        messages = world.gather(message)
        assert len(set(messages)) == 1, messages
        assert not (folder / f"ranks{world.size}" / "refused" / "metrics.jsonl").exists()
        return message

    return case


def mixture_case(world: World, folder: Path) -> dict[str, Any]:
    """Two weighted sources of different shapes, all assistant turns trained, a file to evaluate on."""
    if world.is_main:
        turns = [
            {"role": "user", "content": "sun"},
            {"role": "assistant", "content": "moon"},
            {"role": "user", "content": "cat"},
            {"role": "assistant", "content": "dog"},
        ]
        rows = [{"messages": [*turns[:3], {"role": "assistant", "content": f"dog {i}"}]} for i in range(8)]
        (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        (folder / "chat.jinja").write_text(template)
    world.barrier()
    recipe = fresh(
        folder,
        "mixture",
        world,
        method__name="bss+rac",
        deepspeed="ds_configs/zero3.json",
        data__train=[{"path": str(folder / "chat.jsonl"), "weight": 2.0}, {"path": str(folder / "train.jsonl")}],
        data__eval=str(folder / "train.jsonl"),
        data__chat_template=str(folder / "chat.jinja"),
        data__loss_on="all",
        train__max_steps=None,
        train__epochs=2,
        eval__every=4,
    )
    fit_and_export(recipe, world)
    rows = metrics_of(Path(recipe.output_dir))
    return {
        "steps": len(rows),
        "epochs": [row["epoch"] for row in rows],
        "eval": [row.get("eval_loss") for row in rows],
    }


def empty_data_case(world: World, folder: Path) -> str:
    if world.is_main:
        (folder / "empty.jsonl").write_text("")
    world.barrier()
    return refused_case(data__train=str(folder / "empty.jsonl"))(world, folder)


def other_recipe_case(world: World, folder: Path) -> dict[str, str]:
    """Starting another recipe, or something else, in the folder of a finished run: refused, nothing overwritten."""
    recipe = fresh(folder, "owner", world)
    fit_and_export(recipe, world)
    world.barrier()  # rank 0 writes last
    run_dir = Path(recipe.output_dir)
    files = _contents_and_times(run_dir)
    messages = {}
    for name, overrides in (("changed", {"train__lr": 0.5, "method__name": "bss"}), ("never", {"resume": "never"})):
        try:
            fit_and_export(tiny_recipe(folder, run_dir, adapter__rank=4, **overrides), world)
        except UserError as error:
            messages[name] = str(error)
    fit_and_export(recipe, world)  # finished: says so, touches nothing
    world.barrier()
    assert files == _contents_and_times(run_dir)
    return messages


def _contents_and_times(run_dir: Path) -> dict[str, tuple[str, int]]:
    """Of all files; attempts.jsonl has no time: a start is noted there before it is refused, and then taken back."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns if path.name != ATTEMPTS_FILE else 0,
        )
        for path in run_dir.rglob("*")
        if path.is_file()
    }


def bf16_case(adapter: str, stage: int) -> Case:
    """bfloat16 trains at every stage, close to float32."""

    def case(world: World, folder: Path) -> dict[str, list[float]]:
        losses = {}
        for dtype in ("float32", "bfloat16"):
            recipe = fresh(
                folder,
                f"{dtype}-{adapter}-{stage}",
                world,
                model__dtype=dtype,
                model__gradient_checkpointing=True,
                adapter__kind=adapter,
                method__name="bss",
                deepspeed=f"ds_configs/zero{stage}.json",
                train__lr=1e-3,
            )
            fit_and_export(recipe, world)
            rows = metrics_of(Path(recipe.output_dir))
            losses[dtype] = [row["loss"] for row in rows]
        return losses | {"mismatches": [row["selfgen_mismatches"] for row in rows]}

    return case


def offload_case(world: World, folder: Path) -> dict[str, list[float]]:
    losses = {}
    for name, file in (("resident", "zero3"), ("offloaded", "zero3_offload")):
        recipe = fresh(folder, name, world, deepspeed=f"ds_configs/{file}.json", method__name="bss")
        fit_and_export(recipe, world)
        losses[name] = [row["loss"] for row in metrics_of(Path(recipe.output_dir))]
    return losses


def resume_path_case(world: World, folder: Path) -> dict[str, Any]:
    """`resume: PATH` continues another folder's checkpoint; a recipe that trains differently is refused."""
    settings = {
        "method__name": "bss",
        "deepspeed": "ds_configs/zero2.json",
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
    }
    whole = fresh(folder, "path-whole", world, **settings)
    fit_and_export(whole, world)
    path = Path(whole.output_dir) / "checkpoints" / "step-00000003"
    message = ""
    try:
        fit_and_export(fresh(folder, "path-other", world, **settings, resume=str(path), train__lr=0.5), world)
    except UserError as error:
        message = str(error)
    branch = fresh(folder, "path-branch", world, **settings, resume=str(path))
    fit_and_export(branch, world)
    one, two = Path(whole.output_dir), Path(branch.output_dir)
    return {
        "same_weights": weights_hash(one) == weights_hash(two),
        "steps": [row["step"] for row in metrics_of(two)],
        "refused": message,
    }


STAGES = (0, 1, 2, 3)
CASES: dict[str, Case] = {
    **{f"gradient-{stage}-{micro}": gradient_case(stage, micro) for stage in STAGES for micro in (1, 2, 4)},
    **{
        f"resume-{adapter}-{stage}": resume_case(adapter, stage, "bss+rac")
        for adapter in ("none", "lora")
        for stage in (2, 3)
    },
    "resume-none-0": resume_case("none", 0, "sft"),
    "resume-none-1": resume_case("none", 1, "bss"),
    "resume-streaming": resume_case(
        "none", 2, "bss", data__streaming=True, data__eval_fraction=0.0, eval__every=None, selfgen__noise="common"
    ),
    **{f"visits-{stage}": earlier_visits_case(stage) for stage in (0, 3)},
    "mixture": mixture_case,
    "rewrite-3": rewrite_case(3),
    "sft-bss": same_as_sft_case(method__name="bss", method__bss__mix_rate=0.0),
    "sft-rac": same_as_sft_case(method__name="rac", method__rac__correction_weight=0.0),
    **{
        f"trace-{stage}-{adapter}": generation_leaves_no_trace_case(stage, adapter)
        for stage in (2, 3)
        for adapter in ("none", "lora")
    },
    **{f"uneven-{stage}-{number}": uneven_case(stage, number) for stage in (0, 3) for number in (1, 5)},
    **{
        f"nan-{stage}-{where}-{dtype}": non_finite_case(stage, where, dtype)
        for stage in STAGES
        for where in ("loss", "gradient")
        for dtype in ("float32", "bfloat16")
    },
    **{f"export-{adapter}-{stage}": export_case(adapter, stage) for adapter in ("none", "lora") for stage in (2, 3)},
    "refused-file": refused_case(data__train="missing.jsonl"),
    "refused-column": refused_case(data__columns={"completion": "answr"}),
    "refused-empty": empty_data_case,
    "refused-masked": refused_case(data__columns={"completion": "blank"}),
    "refused-model": refused_case(model__path="./no-such-model"),
    "refused-context": refused_case(data__max_prompt_tokens=4000),
    "refused-ds": refused_case(deepspeed="ds_configs/zero9.json"),
    "other-recipe": other_recipe_case,
    "path": resume_path_case,
    "offload": offload_case,
    **{f"bf16-{adapter}-{stage}": bf16_case(adapter, stage) for adapter in ("none", "lora") for stage in STAGES},
}
