"""What goes with the weights wherever a model is written: where it stops, its template, tokenizer, code and notes.

generation_config.json   stops at the turn's end that was trained, besides the source's own stop ids
tokenizer files          the source's, byte for byte; the chat template is the one that was trained with
config.json              the source's own words, so that older transformers reads the same model
*.py                     code that the model brings along, where it may run
ssgen.json               the system prompt and the correction cue, which no other file has a place for
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssgen_ds.data.paths import HUB_ID
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import QuantizationConfig, Recipe, Section
from ssgen_ds.recipe.validation import validate
from ssgen_ds.run.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssgen_ds.data.tokenize import ChatFormat

NOTES_FILE = "ssgen.json"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.tiktoken", "*.model", TEMPLATE, "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# What the written model alone knows: the source may say something else, or nothing.
_OF_THE_MODEL = ("architectures", "tie_word_embeddings", "quantization_config", "vocab_size")


class Notes(Section):
    """ssgen.json: what the prompts of a trained model looked like, as far as the template does not say it.

    quantization: of the base that an adapter was trained on, and that it is to be used with.
    """

    format: Literal[1] = 1
    system: str | None = None
    correction_cue: str | None = None
    max_prompt_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    quantization: QuantizationConfig | None = None
    turn_end: str | None = None  # for reading; generation_config.json has the id


@dataclass(frozen=True)
class TrainedAs:
    """How a model was trained, as far as a folder with it must say so."""

    turn_end_id: int
    chat_template: str | None  # the text that replaced the tokenizer's own; None: that one
    notes: Notes
    revision: str | None = None  # the source's revision on the hub
    carries_code: bool = False  # the source's own code was allowed to run


def trained_as(recipe: Recipe, chat: ChatFormat) -> TrainedAs:
    """What a model that this recipe trains takes along."""
    notes = Notes(
        system=recipe.data.system,
        correction_cue=recipe.method.rac.correction_cue,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        chat_template_kwargs=recipe.data.chat_template_kwargs or None,
        quantization=None if recipe.quantization.kind == "none" else recipe.quantization,
        turn_end=chat.tokenizer.convert_ids_to_tokens(chat.turn_end_id),
    )
    return TrainedAs(
        turn_end_id=chat.turn_end_id,
        chat_template=None if recipe.data.chat_template is None or chat.template is None else chat.template.text,
        notes=notes,
        revision=recipe.model.revision,
        carries_code=recipe.model.trust_remote_code,
    )


def read_notes(model: str) -> Notes | None:
    """The notes of a folder or hub id; None where there are none.

    Raises:
        UserError: the file cannot be read, or says what this version does not know.
    """
    file = _notes_file(model)
    if file is None:
        return None
    try:
        raw = json.loads(file.read_bytes().rstrip(b"\0").decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}; restore it, or delete it") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{file}: damaged: expected an object with system, correction_cue, ...; restore it, or delete it"
        )
    notes, problems = validate(Notes, raw, {})
    if problems or notes is None:
        raise UserError.from_list(f"{file}: written by another version, or damaged; restore it, or delete it", problems)
    return notes


def _notes_file(model: str) -> Path | None:
    if Path(model).exists() or not HUB_ID.fullmatch(model):
        file = Path(model) / NOTES_FILE
        return file if file.is_file() else None
    return _cached(model, NOTES_FILE, None, local_files_only=False)


def complete_folder(
    folder: Path, tokenizer: PreTrainedTokenizerBase, source: str, trained: TrainedAs | None = None
) -> None:
    """Write into a folder with weights everything that goes with them.

    Args:
        folder: with the weights, and with config.json unless they are an adapter's.
        source: folder or hub id of the model that was trained.
        trained: None for a model of which nothing but its source is known.
    """
    origin = _folder_of(source, None if trained is None else trained.revision)
    if origin is None or not _copy_tokenizer(origin, folder):
        tokenizer.save_pretrained(folder)
    carries_code = (trained is not None and trained.carries_code) or any(folder.glob("*.py"))
    if carries_code and origin is not None:
        for file in origin.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
    _rewrite(folder / TOKENIZER, lambda config: _older_tokenizer(config, carries_code))
    theirs = {} if origin is None else _read(origin / CONFIG)
    _rewrite(folder / CONFIG, lambda written: _source_words(theirs, written, carries_code))
    if trained is None:
        return
    if trained.chat_template is not None:
        _set_template(folder, trained.chat_template)
    _stop_at(folder, origin, trained.turn_end_id)
    notes = trained.notes
    if (folder / CONFIG).is_file():  # no adapter: the weights are whole
        notes = notes.model_copy(update={"quantization": None})
    write_whole(folder / NOTES_FILE, json.dumps(notes.model_dump(), indent=2, ensure_ascii=False) + "\n")


def absolute_source(source: str) -> str:
    """A folder's full path, so that what names it can be used from anywhere; a hub id as it is."""
    return os.path.abspath(source) if Path(source).is_dir() else source


def _folder_of(source: str, revision: str | None) -> Path | None:
    """The folder with the source's small files: itself, or what was fetched of a hub id; None where neither is."""
    if Path(source).is_dir():
        return Path(source)
    file = _cached(source, CONFIG, revision, local_files_only=True)
    return None if file is None else file.parent


def _cached(name: str, file: str, revision: str | None, *, local_files_only: bool) -> Path | None:
    """A file of a hub id; None where there is none, or it cannot be had."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name, file, revision=revision, local_files_only=local_files_only, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # no such repository, or no name of one: loading its model says so
        return None
    return None if found is None else Path(found)


def _copy_tokenizer(origin: Path, folder: Path) -> bool:
    """Copy the tokenizer as it is, unless it is there already; False when the source has none."""
    if not (origin / TOKENIZER).is_file():
        return False
    if origin.resolve() == folder.resolve():
        return True
    for pattern in _TOKENIZER_FILES:
        for file in origin.glob(pattern):
            target = folder / file.relative_to(origin)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    return True


def _set_template(folder: Path, template: str) -> None:
    """Write the template to both places that versions of transformers read, so that all find the same one."""
    write_whole(folder / TEMPLATE, template)
    for other in ("chat_template.json", "additional_chat_templates"):
        if (folder / other).is_dir():
            shutil.rmtree(folder / other)
        else:
            (folder / other).unlink(missing_ok=True)
    _rewrite(folder / TOKENIZER, lambda config: {**config, "chat_template": template})


def _stop_at(folder: Path, origin: Path | None, end: int) -> None:
    """Stop ids: the trained end first, then those that the source stops at; a padding id is never added to them."""
    written = folder / GENERATION
    config = _read(written) or ({} if origin is None else _read(origin / GENERATION))
    own = config.get("eos_token_id")
    if own is None:
        model = _read(folder / CONFIG) or ({} if origin is None else _read(origin / CONFIG))
        own = model.get("eos_token_id", model.get("text_config", {}).get("eos_token_id"))
    own = [] if own is None else [own] if isinstance(own, int) else own
    stops = list(dict.fromkeys([end, *own]))
    # With this mark transformers may make the configuration again from the model's, which has other stop ids.
    config.pop("_from_model_config", None)
    config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    write_whole(written, json.dumps(config, indent=2) + "\n")


def _source_words(theirs: dict[str, Any], written: dict[str, Any], carries_code: bool) -> dict[str, Any]:
    """config.json in the source's words where it is the same kind of model, else ours with what older readers need.

    transformers 5 writes some settings, such as rope_theta, only where transformers 4 does not look.
    """
    if theirs.get("model_type") != written.get("model_type"):
        config = dict(written)
    else:
        config = {**theirs}
        for key in _OF_THE_MODEL:
            config.pop(key, None)
            if written.get(key) is not None:
                config[key] = written[key]
        for key in ("dtype", "torch_dtype"):
            if key in theirs:
                config[key] = written.get("dtype")
        if not {"dtype", "torch_dtype"} & theirs.keys():
            config["dtype"] = written.get("dtype")
    if not carries_code:
        config.pop("auto_map", None)
    return _with_older_rope(config)


def _with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor, where a configuration has only rope_parameters."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    older: dict[str, Any] = {}
    full = rope.get("full_attention", rope)
    if "rope_theta" in full:
        older["rope_theta"] = full["rope_theta"]
    if "partial_rotary_factor" in full:
        older["partial_rotary_factor"] = full["partial_rotary_factor"]
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    return {**older, **config}


def _older_tokenizer(config: dict[str, Any], carries_code: bool) -> dict[str, Any]:
    """Names of transformers 5 in the words of 4, which both read: only where a tokenizer was written by 5."""
    config = dict(config)
    if not carries_code:
        config.pop("auto_map", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a JSON file says, where there is one."""
    if file.is_file():
        config = _read(file)
        changed = change(config)
        if changed != config:
            write_whole(file, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
