"""The commands that make a model of another: tune it, choose its experts, upcycle or convert it."""

from pathlib import Path
from typing import Any, Literal

from octavo.cli import Flat
from octavo.console import Outcome
from octavo.runtime import Runtime

from deepseekmoe.analyses import alone
from deepseekmoe.config import SftConfig


def sft(
    model: str,
    config: Flat[SftConfig],
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Tune a model on chats: all weights, a LoRA adapter, or the experts that the task uses.

    Under torchrun it runs on several processes. The balance losses stay on with the alphas of the
    model's own configuration.

    Args:
        model: Folder or hub id, in the layout of deepseek-moe-16b-base.
    """
    from octavo.rundir import RunDir, options_of
    from octavo.runtime import is_main

    from deepseekmoe.card import save_card
    from deepseekmoe.parallel import main_first, processes
    from deepseekmoe.sft import finetune

    runtime.start()
    options = options_of({"model": model}, config, runtime)
    with (
        processes(runtime),
        main_first(lambda: RunDir.open(config.out, options, config.overwrite)) as opened,
    ):
        tuned = finetune(model, config, opened, runtime)
        packed, lines = tuned.packed, opened.metrics()
        row = {
            "chats": len(packed.chats),
            "cut": packed.cut,
            "left out": packed.silent,
            "windows": len(packed),
            "filled %": 100 * packed.fill,
            "steps": tuned.steps,
            "weights trained": tuned.trained,
            "loss of replies": lines[-1]["lm_loss"],
        }
        opened.write_json("summary.json", row)
        if is_main() and not config.lora_rank:
            made = f"Tuned from `{model}` on the chats of `{config.data}`, {tuned.steps} updates."
            save_card(config.out / "model", tuned.model.config, made, [row])
    if not config.lora_rank:
        return Outcome({"Tuned": [row]}, note=f"The model: {config.out / 'model'}")
    adapter = config.out / "adapter"
    return Outcome(
        {"Tuned": [row]}, note=f"Next: deepseekmoe convert {model} --adapter {adapter} --out MERGED"
    )


def esft_select(
    model: str | None = None,
    *,
    data: str | None = None,
    trace: Path | None = None,
    out: Path,
    split: str | None = None,
    score: Literal["token", "gate"] = "token",
    p: float = 0.2,
    sample: int = 131072,
    length: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Choose the experts that a task uses, for `sft --experts` (ESFT).

    Args:
        model: Folder or hub id.
        data: The task's chats, as `sft` takes them.
        trace: File of `deepseekmoe trace`, instead of a model and chats.
        out: File of the selection, JSON as ESFT's authors write it.
        split: Split of a hub id, or of a folder of splits.
        score: An expert's relevance: token (share of the slots) or gate (share of the gates' sum).
        p: Relevance that a layer's experts must reach together, from above 0 to 1; 0.2 suits token
            and 0.1 gate, as in ESFT.
        sample: Tokens to look at, of chats drawn at random.
        length: Tokens of a window; by default what the model was made for, 4096 at the most.
        batch_size: Windows at a time.
        overwrite: Replace the file.
    """
    from octavo.errors import ConfigError
    from octavo.rundir import refuse_existing

    from deepseekmoe.analyze import Trace
    from deepseekmoe.esft import select_experts
    from deepseekmoe.sft import select_for_task

    refuse_existing(out, overwrite)
    alone()
    runtime.start()
    if trace is not None and not (model or data):
        traced = Trace.load(trace)
        selection, experts = select_experts(traced, score, p), traced.counts.shape[-1]
    elif model and data and trace is None:
        selection, experts = select_for_task(
            model, data, split, score, p, sample, length, batch_size, runtime
        )
    else:
        raise ConfigError("give either MODEL and --data, or --trace FILE")
    selection.save(out)
    rows = [
        {"layer": layer, "trained": f"{len(chosen)}/{experts}",
         "experts": ", ".join(map(str, chosen))}
        for layer, chosen in selection.experts.items()
    ]  # fmt: skip
    return Outcome(
        {"Experts to train": rows},
        note=f"Next: deepseekmoe sft {model or 'MODEL'} --data {data or 'CHATS'} --experts {out}",
    )


def upcycle(
    dense: str,
    *,
    out: Path,
    routed_experts: int = 64,
    shared_experts: int = 2,
    active_experts: int = 6,
    granularity: int = 1,
    dense_layers: int = 0,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Make experts of a dense LLaMA's feed-forward networks; the result begins where it ended.

    Args:
        dense: Folder or hub id of a LLaMA, or of a model of this package without routed experts.
        out: Folder of the new model.
        routed_experts: Routed experts of a layer.
        shared_experts: Shared experts of a layer.
        active_experts: Routed experts a token.
        granularity: Pieces that a feed-forward network is cut into; with 1 experts are copies.
        dense_layers: First layers that stay as they are.
        overwrite: Replace the folder.
    """
    from deepseekmoe.accounting import cost_row
    from deepseekmoe.hub import refuse_folder, save
    from deepseekmoe.upcycle import load_dense
    from deepseekmoe.upcycle import upcycle as upcycled

    refuse_folder(out, overwrite)
    alone()
    runtime.start()
    loaded, tokenizer = load_dense(dense)
    model = upcycled(
        loaded, routed=routed_experts, shared=shared_experts, active=active_experts,
        granularity=granularity, dense_layers=dense_layers, seed=runtime.seed,
    )  # fmt: skip
    save(out, model, tokenizer)
    return Outcome({"What it is made of and costs": [{"model": str(out)} | cost_row(model.config)]})


def convert(
    model: str,
    *,
    out: Path,
    adapter: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "50GB",
    overwrite: bool = False,
) -> Outcome:
    """Write a model anew: with an adapter merged into it, in another precision, in smaller files.

    Args:
        model: Folder or hub id.
        out: Folder of the result, in the layout of deepseek-moe-16b-base.
        adapter: Folder of a LoRA adapter to merge.
        dtype: Precision of the weights; by default as they are.
        max_shard_size: Of a file of weights, like 5GB.
        overwrite: Replace the folder.
    """
    import re

    import torch
    from octavo.errors import ConfigError

    from deepseekmoe.accounting import cost_row
    from deepseekmoe.hub import load, refuse_folder, save
    from deepseekmoe.lora import merge_adapter

    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise ConfigError(f"--max-shard-size {max_shard_size}: must be like 5GB")
    refuse_folder(out, overwrite)
    alone()
    loaded, tokenizer = load(model, dtype="auto")
    result: Any = merge_adapter(loaded, adapter) if adapter else loaded
    if dtype:
        result.to(getattr(torch, dtype))
    save(out, result, tokenizer, max_shard_size)
    return Outcome(
        {"Written": [{"model": str(out), "dtype": str(result.dtype)} | cost_row(result.config)]}
    )
