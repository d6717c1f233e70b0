"""Checkpoints as the hub has them: known to the Auto classes, checked tensor by tensor, saved back.

A folder in the layout of deepseek-ai/deepseek-moe-16b-base stores each expert on its own; in memory
they are stacked. The library's reversible conversion does both directions.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, ModelError
from octavo.models import load_config, load_tokenizer, quiet_library
from octavo.models import load_model as load_checked
from octavo.rundir import atomic

from deepseekmoe.accounting import tensors
from deepseekmoe.architecture import DeepseekMoeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseekmoe.modeling import DeepseekMoeForCausalLM

log = logging.getLogger(__name__)

#: "User: ...", a blank line, "Assistant: ...", end of text: as the released chat model was trained.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

#: What is fetched of a hub id: weights, configurations, tokenizers of all kinds.
FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]

#: Options of `load` that say where the files come from.
FETCHING = ("revision", "token", "cache_dir", "force_download", "local_files_only")

#: Model types that are no DeepSeekMoE of this paper, and where they belong.
FOREIGN = {
    "deepseek_v2": "DeepSeek-V2 (latent attention): load it with transformers' own class",
    "deepseek_v3": "DeepSeek-V3 (latent attention): load it with transformers' own class",
    "deepseek_v32": "DeepSeek-V3.2 (latent attention): load it with transformers' own class",
    "deepseek_v4": "DeepSeek-V4: load it with transformers' own class",
    "llama": "a dense LLaMA: `deepseekmoe upcycle` makes experts of it",
}


def register() -> None:
    """Make the Auto classes know the model type `deepseek`; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from deepseekmoe.modeling import DeepseekMoeForCausalLM, DeepseekMoeModel

    AutoConfig.register("deepseek", DeepseekMoeConfig, exist_ok=True)
    AutoModel.register(DeepseekMoeConfig, DeepseekMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekMoeConfig, DeepseekMoeForCausalLM, exist_ok=True)


def load(
    source: str | Path, *, tokenizer: bool = True, **options: Any
) -> "tuple[DeepseekMoeForCausalLM, PreTrainedTokenizerBase | None]":
    """A model and its tokenizer from a folder or a hub id, in evaluation mode.

    Args:
        source: a folder in the released layout, or one that this package saved; of a hub id the files
            are fetched into the hub's cache, or found there when offline, and checked as a folder is.
        tokenizer: whether there is one to load.
        **options: for `from_pretrained`: dtype, device_map, attn_implementation, revision, ...

    Raises:
        ModelError: the family is another, a tensor is missing, there twice, of another shape or not
            of this model, or the tokenizer knows more tokens than the model; it is named.
    """
    from transformers import AutoModelForCausalLM

    register()
    place = Path(source).expanduser()
    if not place.is_dir():
        fetching = {name: options.pop(name) for name in FETCHING if name in options}
        place = _fetch(str(source), **fetching)
    check_folder(place)
    model: Any = load_checked(AutoModelForCausalLM, place, **options)
    model.name_or_path = model.config.name_or_path = str(source)
    words = load_tokenizer(place) if tokenizer else None
    if words is not None:
        check_tokenizer(words, model.config.vocab_size, source)
    return model.eval(), words


def _fetch(source: str, **options: Any) -> Path:
    """The folder of a hub id's files in the hub's cache; a foreign model's weights are not fetched.

    Raises:
        ModelError: the hub gives no such model, or it is of another family.
    """
    from huggingface_hub import snapshot_download

    if source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder")
    log.debug("%s: asking the hub", source)
    try:
        with quiet_library():
            read_config(Path(snapshot_download(source, allow_patterns="config.json", **options)))
            log.info("%s: fetching what the hub's cache has not", source)
            return Path(snapshot_download(source, allow_patterns=FILES, **options))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise ModelError(
            f"{source}: neither a folder here nor a model the hub gave; check the name, or give a "
            f"local folder when offline ({first})"
        ) from None


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Stop, before any work is done, where a model would replace something.

    Raises:
        ConfigError: there is something, and overwriting was not asked for.
    """
    if folder.exists() and not overwrite:
        raise ConfigError(f"{folder} exists already; choose another --out or add --overwrite")


def save(folder: Path, model: Any, tokenizer: Any = None, max_shard_size: str = "50GB") -> None:
    """Write a model in the released layout, and its tokenizer, into a folder that appears whole.

    Args:
        folder: what lies there is replaced.
        model: of this package.
        tokenizer: of the model, or None.
        max_shard_size: of a file of weights, like 5GB.
    """
    with atomic(folder) as temporary, quiet_library():
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def load_moe_config(source: str | Path) -> DeepseekMoeConfig:
    """A model's configuration.

    Raises:
        ModelError: it cannot be had, or is of another family.
    """
    register()
    config = load_config(source)
    if not isinstance(config, DeepseekMoeConfig):
        raise ModelError(f"{source}: {_family(config.model_type)}")
    return config


def continue_text(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float = 0.0,
    chat: bool = False,
) -> str:  # fmt: skip
    """What a model adds to a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text, or a user's turn.
        max_new_tokens: at the most.
        temperature: 0 takes the most probable token.
        chat: frame the prompt by the tokenizer's chat template, or the released one.

    Raises:
        ConfigError: there is nothing to continue.
    """
    import torch

    if chat:  # as the template has it, and as it was tuned
        from deepseekmoe.chats import encode_question

        ids = encode_question([{"role": "user", "content": prompt}], tokenizer)
    else:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        begin = tokenizer.bos_token_id
        if begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
    if not ids:
        raise ConfigError("an empty prompt, and a tokenizer that has no token to begin with")
    given = torch.tensor([ids], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": bool(temperature)}
    if temperature:
        sampling["temperature"] = temperature
    found = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
        pad_token_id=pad, **sampling,
    )  # fmt: skip
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def check_folder(folder: Path) -> DeepseekMoeConfig:
    """Compare a folder's tensors with its configuration; only headers are read.

    Returns:
        The configuration.

    Raises:
        ModelError: what does not fit, by name.
    """
    config = read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no weights (*.safetensors); download them too")
    check_tensors(_headers(files), config, folder)
    return config


def read_config(folder: Path) -> DeepseekMoeConfig:
    """The configuration in a folder.

    Raises:
        ModelError: there is none, or it is of another family.
    """
    register()
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no config.json that can be read ({error})") from None
    kind = raw.get("model_type")
    if kind != "deepseek":
        raise ModelError(f"{folder}: {_family(str(kind))}")
    if raw.get("kv_lora_rank"):
        raise ModelError(
            f"{folder}: config.json has kv_lora_rank (latent attention): this is a DeepSeek-V2 or V3 "
            "under another model_type; load it with transformers' own class"
        )
    return DeepseekMoeConfig.from_pretrained(folder)


def check_tensors(
    headers: Iterable[tuple[str, tuple[int, ...], str]], config: DeepseekMoeConfig, where: Any
) -> None:
    """Refuse a checkpoint whose tensors are not those of its configuration.

    Args:
        headers: name, shape and file of each tensor.
        config: of the model.
        where: the folder, for messages.

    Raises:
        ModelError: the first tensor that is missing, there twice, foreign or of another shape.
    """
    wanted, seen = tensors(config), {}
    for name, shape, file in headers:
        if name in seen:
            raise ModelError(f"{where}: tensor {name} stands in {seen[name]} and in {file}")
        seen[name] = file
        if name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and config.tie_word_embeddings
        ):
            continue
        if name not in wanted:
            hint = ""
            if ".kv_a_proj" in name or ".kv_b_proj" in name:
                hint = " (latent attention: a DeepSeek-V2 or V3)"
            raise ModelError(
                f"{where}: {file} has tensor {name}, which is none of this model{hint}"
            )
        if shape != wanted[name]:
            raise ModelError(
                f"{where}: tensor {name} is {list(shape)}, config.json makes it {list(wanted[name])}"
            )
    missing = [name for name in wanted if name not in seen]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{where}: tensor {missing[0]} is missing{more}")


def check_tokenizer(tokenizer: Any, vocabulary: int, where: Any) -> None:
    """Refuse a tokenizer whose tokens the embedding does not hold.

    Raises:
        ModelError: it knows more tokens than the model.
    """
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, model.embed_tokens.weight has "
            f"{vocabulary} rows; resize the model's embeddings or take its own tokenizer"
        )


def _headers(files: list[Path]) -> Iterable[tuple[str, tuple[int, ...], str]]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    yield name, tuple(opened.get_slice(name).get_shape()), file.name
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read ({error})") from None


def _family(kind: str) -> str:
    known = FOREIGN.get(kind, "another architecture")
    return f"model_type {kind!r} is {known}; this package loads model_type 'deepseek'"
