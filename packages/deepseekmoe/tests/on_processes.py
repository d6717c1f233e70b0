"""Runs the checks of test_parallel.py on one, two and four real processes; results go into a folder.

    python on_processes.py FOLDER

Everything is imported once; processes are forked from here, and find each other over loopback.
"""

import contextlib
import importlib.util
import io
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.cli import app
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.corpus import Document, Tokens, train_tokenizer
from deepseekmoe.esft import Selection
from deepseekmoe.evaluate import evaluate_lm
from deepseekmoe.hub import register
from deepseekmoe.layer import DeepseekMoeLayer
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from deepseekmoe.optimize import optimize
from deepseekmoe.parallel import (
    clip_gradients,
    local,
    processes,
    spread,
    sum_gradients,
    whole_model,
    whole_state,
    without_weights,
)
from octavo.cli import run
from octavo.errors import OctavoError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, rank, world_size
from torch.distributed.device_mesh import init_device_mesh

assert transformers.models.llama.modeling_llama
CPU = torch.device("cpu")
RUNTIME = Runtime(device="cpu")
HALF = Runtime(device="cpu", dtype="bfloat16")
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "n_devices": 4,
    "aux_loss_alpha": 0.1, "device_loss_alpha": 0.1, "z_loss_alpha": 0.01,
}  # fmt: skip
EXPERTS = "mlp.experts"
PEFT = importlib.util.find_spec("peft") is not None


def make(**changes: Any) -> Any:
    """A model; the last of several processes has it without weights, until it is spread."""
    config = DeepseekMoeConfig(**(SIZES | changes))
    if 0 < rank() == world_size() - 1:
        return without_weights(config)
    torch.manual_seed(rank())
    model: Any = DeepseekMoeForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return model


def options(**changes: Any) -> OptimizeConfig:
    return OptimizeConfig(steps=4, warmup_steps=2, log_every=1, **changes)


def rows(number: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(2, 61, (number, 12), generator=draw)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """A backward pass over this process's rows; gradients of all, put together on rank 0."""
    out = model.train()(input_ids=ids, labels=ids, num_items_in_batch=4 * 11)
    out.loss.backward()
    loss, counts = out.loss.detach(), out.counts
    if world_size() > 1:
        dist.all_reduce(loss)
        dist.all_reduce(counts)
    sum_gradients(model)
    norm = clip_gradients(model, 1.0)
    found = whole_gradients(model)
    return found and found | {"loss": loss, "counts": counts, "norm": torch.tensor(norm)}


def whole_gradients(model: Any) -> dict[str, torch.Tensor] | None:
    """Put together as the weights are."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    return whole_state(model)


def forbidden(model: Any, experts: slice) -> Any:
    """Let a selection bias keep tokens from some experts."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[experts] = -100.0
    return model


def model_gradients(expert_parallel: int) -> dict[str, Any]:
    """Four rows, shared out evenly; then the same where some experts get no token."""
    config = options(expert_parallel=expert_parallel)
    found: dict[str, Any] = {}
    for name in ("all experts", "idle experts"):
        model = make(bias_update_rate=0.1)
        if name == "idle experts":  # of two processes the second has no work, of four the last two
            forbidden(model, slice(4, 8))
        spread(model, config, CPU)
        found[name] = gradients(model, rows().chunk(world_size())[rank()])
    return found


def layer_gradients() -> dict[str, Any]:
    """The layer alone: outputs and all gradients, with tokens on all processes or on one.

    Slots are dropped by the load of a process's own tokens, so that only the last case can have it.
    """
    found: dict[str, Any] = {}
    for name, factor in (("even", None), ("on the last", None), ("dropped on the last", 0.5)):
        torch.manual_seed(0)
        layer: Any = DeepseekMoeLayer(DeepseekMoeConfig(**SIZES, capacity_factor=factor))
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        if world_size() > 1:
            names = ("replicas", "peers")
            mesh = init_device_mesh("cpu", (1, world_size()), mesh_dim_names=names)
            layer.experts.divide(mesh["peers"].get_group(), mesh["replicas"].get_group())
        whole = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
        sizes = [4 // world_size()] * world_size()
        if name.endswith("on the last"):
            sizes = [0] * (world_size() - 1) + [4]
        x = whole.split(sizes)[rank()].clone().requires_grad_()
        hidden = layer(x).hidden
        (hidden**2).sum().backward()
        sum_gradients(layer)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            rough = layer(x).hidden.float()
        parts = {"hidden": hidden.detach(), "x": x.grad, "rough": rough}
        if world_size() > 1:
            all_parts: list[Any] = [None] * world_size()
            dist.all_gather_object(all_parts, parts)
            parts = {key: torch.cat([part[key] for part in all_parts]) for key in parts}
        found[name] = (whole_gradients(layer) or {}) | parts
    return found


def global_scope() -> dict[str, Any]:
    """The loss of statistics over all processes: on one it is that of the whole batch."""
    model = make(aux_loss_scope="global", device_loss_alpha=0.0)
    spread(model, options(), CPU)
    return {"gradients": gradients(model, rows().chunk(world_size())[rank()])}


def batches(step: int, micro: int, process: int) -> dict[str, torch.Tensor]:
    """Four micro-batches a step on one process are one a step on four."""
    slot = step * 4 + micro * world_size() + process
    ids = torch.randint(2, 61, (2, 12), generator=torch.Generator().manual_seed(slot))
    return {"input_ids": ids, "labels": ids}


def trained(
    folder: Path,
    batch: Any = batches,
    model: Any = None,
    runtime: Runtime = RUNTIME,
    **changes: Any,
) -> Any:
    """Metrics and weights of a short training."""
    config = options(accumulate=4 // world_size(), max_gradient_norm=0.3, **changes)
    place = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = optimize(make() if model is None else model, batch, config, place, runtime)
    state = whole_state(model)
    tokens = Tokens(rows(9).flatten().numpy().astype("uint32"), *_one_document(9 * 12))
    found = {"dev": evaluate_lm(model, tokens, 12, 2)["loss"]}
    whole = whole_model(model)
    if state is None:
        return None
    assert whole(input_ids=rows()).logits.shape == (4, 12, 61)
    return found | {"state": state, "metrics": place.metrics()}


def _one_document(size: int) -> tuple[Any, list[str], Any]:
    import numpy as np

    return np.array([0]), ["all"], np.array([size])


def killed(step: int, micro: int, process: int) -> dict[str, torch.Tensor]:
    if step == 3:
        os._exit(9)
    return batches(step, micro, process)


def held(model: Any) -> tuple[int, int]:
    """How many weights of experts and how many others this process holds."""
    experts = sum(local(w).numel() for n, w in model.named_parameters() if EXPERTS in n)
    rest = sum(local(w).numel() for n, w in model.named_parameters() if EXPERTS not in n)
    return experts, rest


def refused(work: Any) -> str:
    try:
        work()
    except OctavoError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def command(folder: Path, *words: str) -> dict[str, Any]:
    """What a command prints on stderr, and its exit code, on every process."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = run(app, [*words, "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "err": err.getvalue()}


# --- what each number of processes does ---------------------------------------------------------


def one(folder: Path) -> Any:
    found = {"model": model_gradients(1), "layer": layer_gradients(), "global": global_scope()}
    found["train"] = trained(folder / "one")
    model = make(bias_update_rate=0.1, attention_dropout=0.1)
    found["bias, dropout"] = trained(folder / "one-bias", model=model)
    found["tied"] = trained(folder / "one-tied", model=make(tie_word_embeddings=True))
    found["half"] = trained(folder / "one-half", runtime=HALF)
    return found


def two(folder: Path) -> Any:
    with processes(RUNTIME):
        found: dict[str, Any] = {"model": model_gradients(2), "layer": layer_gradients()}
        found |= {"global": global_scope()}
        found["train"] = trained(folder / "two")
        model = make(bias_update_rate=0.1, attention_dropout=0.1)
        found["bias, dropout"] = trained(folder / "two-bias", model=model)
        found["fsdp"] = trained(folder / "two-fsdp", fsdp=True)
        tied = make(tie_word_embeddings=True)
        found["tied"] = trained(folder / "two-tied", model=tied, fsdp=True, save_every=3)
        found["fsdp recomputing"] = trained(
            folder / "two-fsdp-recomputing", fsdp=True, checkpointing=True
        )
        model, dtypes = make(), []
        layer = model.model.layers[1]
        for part in (layer.self_attn.q_proj, layer.mlp.gate, layer.input_layernorm):
            part.register_forward_hook(lambda part, *_: dtypes.append(part.weight.dtype))
        changes = {"fsdp": True, "checkpointing": True}
        found["half"] = trained(folder / "two-half", model=model, runtime=HALF, **changes)
        found["dtypes"] = dtypes[:3]
        found["experts"] = trained(folder / "two-ep", expert_parallel=2)
        found["experts recomputing"] = trained(
            folder / "two-ep-recomputing", expert_parallel=2, checkpointing=True
        )
        small = {"n_routed_experts": 9, "n_devices": 1}
        found["refused"] = {
            "processes": refused(lambda: trained(folder / "no", expert_parallel=3)),
            "below": refused(lambda: trained(folder / "no", expert_parallel=0)),
            "experts": refused(
                lambda: trained(folder / "no", model=make(**small), expert_parallel=2)
            ),
        }
    return found


def four(folder: Path) -> Any:
    with processes(RUNTIME):
        found: dict[str, Any] = {"model": model_gradients(4), "layer": layer_gradients()}
        found["model of two"] = model_gradients(2)
        found["experts"] = trained(folder / "four-ep", expert_parallel=2)
        found["both"] = trained(folder / "four-both", expert_parallel=2, fsdp=True)
        found["half"] = trained(folder / "four-half", runtime=HALF, expert_parallel=2, fsdp=True)
        model = make()
        spread(model, options(expert_parallel=4, fsdp=True), CPU)
        found["held"] = held(model)
        found["whole"] = held(make())
    return found


def dies(folder: Path) -> Any:
    with processes(RUNTIME):
        trained(folder / "four-killed", killed, expert_parallel=2, fsdp=True, save_every=1)


def dies_plain(folder: Path) -> Any:
    with processes(RUNTIME):
        trained(folder / "two-killed", killed, expert_parallel=2, save_every=2)


def resumes(folder: Path) -> Any:
    with processes(RUNTIME):
        return trained(folder / "four-killed", expert_parallel=2, fsdp=True, save_every=1)


def resumes_plain(folder: Path) -> Any:
    with processes(RUNTIME):
        return trained(folder / "two-killed", expert_parallel=2, save_every=2)


def resumes_on_fewer(folder: Path) -> Any:
    return refused(lambda: trained(folder / "two-killed", save_every=2))


def diverges(folder: Path) -> Any:
    model = make()
    model.model.layers[1].mlp.shared_experts.down_proj.weight.data.fill_(torch.inf)
    with processes(RUNTIME):
        return refused(lambda: trained(folder / "broken", model=model, expert_parallel=2))


def tune(folder: Path, name: str, *words: str) -> Any:
    """`sft` on four windows a step, however many processes there are."""
    return command(
        folder, "sft", str(folder / "base"), "--data", str(folder / "chats.jsonl"), "--out",
        str(folder / f"sft-{name}"), "--length", "32", "--batch-size", "1", "--epochs", "2",
        "--accumulate", str(4 // world_size()), "--learning-rate", "1e-2", "--log-every", "1",
        "--quiet", *words,
    )  # fmt: skip


def tunes_alone(folder: Path) -> Any:
    experts = str(folder / "experts.json")
    return [
        tune(folder, "one"),
        tune(folder, "one-experts", "--experts", experts),
        *([tune(folder, "one-lora", "--lora-rank", "2")] if PEFT else []),
    ]


def tunes(folder: Path) -> Any:
    experts = str(folder / "experts.json")
    with processes(RUNTIME):
        return [
            tune(folder, "two"),
            tune(folder, "two-divided", "--fsdp", "--expert-parallel", "2"),
            tune(folder, "two-experts", "--experts", experts),
            *([tune(folder, "two-lora", "--lora-rank", "2")] if PEFT else []),
        ]


def bad_tuning(folder: Path) -> Any:
    return tune(folder, "bad", "--experts", str(folder / "experts.json"), "--fsdp")


def bad_data(folder: Path) -> Any:
    (folder / "empty").mkdir(exist_ok=True)
    words = ("--data", str(folder / "empty"), "--out", str(folder / "bad"))
    return command(folder, "train", *words)


def bad_run(folder: Path) -> Any:
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    words = ("--data", str(folder), "--out", str(folder / "taken"))
    return command(folder, "train", *words)


def bad_experts(folder: Path) -> Any:
    words = ("--data", str(folder), "--out", str(folder / "uneven"), "--expert-parallel", "2")
    return command(folder, "train", *words, "--vocabulary", "300")


def bad_command(folder: Path) -> Any:
    return command(folder, "evaluate", "model", "--data", str(folder))


def leave(code: int) -> None:
    """End at once: to tear all modules down takes seconds. What coverage found is kept."""
    if "coverage" in sys.modules and (found := sys.modules["coverage"].Coverage.current()):
        found.stop()
        found.save()
    sys.stderr.flush()
    os._exit(code)


def start(job: Any, count: int, folder: Path) -> list[int]:
    """Fork so many processes; each writes what it found to `JOB-RANK.pt`. Gives their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            code = 1
            try:
                found = job(folder)
                torch.save(found, folder / f"{job.__name__}-{number}.pt")
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            leave(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def write_inputs(folder: Path) -> None:
    """Texts, a model with its tokenizer, chats that it is tuned on, and a choice of its experts."""
    line = "the cat sees the dog and runs to the tree.\n"
    (folder / "words.txt").write_text(line * 200)
    tokenizer = train_tokenizer([Document("words", line * 20)], 270)
    save_model(folder / "base", make(vocab_size=len(tokenizer)), tokenizer)
    chats = [{"prompt": "the dog " * (1 + number % 2), "response": f"runs {number}"}
             for number in range(16)]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    Selection({0: [1, 6], 1: [2]}).save(folder / "experts.json")


def main(folder: Path) -> None:
    register()
    if PEFT:
        importlib.import_module("peft")
    write_inputs(folder)
    codes = {
        job.__name__: start(job, count, folder)
        for job, count in (
            (one, 1), (two, 2), (four, 4), (dies, 4), (resumes, 4), (dies_plain, 2),
            (resumes_on_fewer, 1), (resumes_plain, 2), (diverges, 2), (bad_data, 2),
            (bad_run, 2), (bad_experts, 2), (bad_command, 2), (tunes_alone, 1), (tunes, 2),
            (bad_tuning, 2),
        )
    }  # fmt: skip
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
