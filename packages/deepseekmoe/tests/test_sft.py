"""Fine-tuning on chats: all weights, and its interruptions."""

import json
from typing import Any

import pytest
import torch
from deepseekmoe import hub
from deepseekmoe.config import SftConfig
from deepseekmoe.esft import Selection
from deepseekmoe.sft import finetune
from octavo.rundir import RunDir

FAST = (
    "--batch-size", "2", "--learning-rate", "1e-2", "--log-every", "5", "--weight-decay", "0",
    "--device", "cpu", "--quiet",
)  # fmt: skip


def run_sft(command, model, chats, out, *more, length=64):
    code, printed, err = command(
        "sft", model, "--data", chats, "--out", out, "--length", length, *FAST, *more
    )
    assert code == 0, err
    return printed


def test_tuning_learns_the_answers_and_saves_the_released_layout(command, trained, chats, tmp_path):
    out = tmp_path / "run"
    printed = run_sft(command, trained / "model", chats, out, "--epochs", "6")
    assert "60" in printed
    losses = [line["lm_loss"] for line in RunDir(out).metrics()]
    assert losses[-1] < 0.7 * losses[0]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["chats"] == 60
    assert summary["filled %"] > 80
    assert summary["steps"] == -(-6 * summary["windows"] // 2)
    hub.check_folder(out / "model")
    model, tokenizer = hub.load(out / "model")
    assert tokenizer is not None
    assert tokenizer.chat_template == hub.CHAT_TEMPLATE
    before, _ = hub.load(trained / "model")
    assert summary["weights trained"] == sum(weight.numel() for weight in before.parameters())
    assert all(
        not one.equal(two)
        for (name, one), two in zip(before.named_parameters(), model.parameters(), strict=True)
        if "proj" in name
    )


def test_a_reply_is_all_that_is_learned(trained, tmp_path):
    """Another question changes the gradient; another label of it cannot, there is none."""
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"prompt": "the a cat", "response": "dog"}) + "\n")
    config = SftConfig(data=str(file), out=tmp_path / "run", epochs=1, length=32, batch_size=1)
    found = finetune(str(trained / "model"), config, RunDir.open(config.out, {}))
    labels = found.packed.rows([0])["labels"]
    assert found.tokenizer.decode(labels[labels != -100]) == f" dog{found.tokenizer.eos_token}"


def test_the_models_own_balance_loss_stays_on(trained, chats, tmp_path, monkeypatch):
    import deepseekmoe.sft as sft

    seen: list[Any] = []
    monkeypatch.setattr(
        sft, "optimize", lambda model, *_, **__: seen.append(model) or model.train()
    )
    config = SftConfig(data=str(chats), out=tmp_path / "run", length=64)
    found = finetune(str(trained / "model"), config, RunDir.open(config.out, {}))
    rows = found.packed.rows([0])
    out = found.model.train()(**rows)
    assert found.model.config.aux_loss_alpha > 0
    assert out.loss > out.lm_loss


@pytest.mark.parametrize("experts", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(
    command, trained, chats, tmp_path, monkeypatch, experts
):
    from deepseekmoe import checkpoints
    from deepseekmoe import optimize as training

    more = ["--epochs", "2", "--save-every", "3"]
    if experts:
        Selection({0: [1, 4], 1: [0]}).save(tmp_path / "experts.json")
        more += ["--experts", tmp_path / "experts.json"]
    run_sft(command, trained / "model", chats, tmp_path / "whole", *more)
    real = checkpoints.save_checkpoint

    def stop(folder, step, *rest):
        real(folder, step, *rest)
        raise KeyboardInterrupt

    words = ["sft", trained / "model", "--data", chats, "--out", tmp_path / "cut", "--length", "64"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", stop)
        assert command(*words, *FAST, *more)[0] == 130
    assert command(*words, *FAST, *more)[0] == 0
    file = "model/model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "cut" / "checkpoints" / "sft").exists()


@pytest.mark.parametrize("kind", ["all", "experts", "lora"])
def test_a_tuning_that_was_killed_once_it_was_saved_does_not_tune_again(
    command, trained, chats, tmp_path, monkeypatch, kind
):
    import deepseekmoe.sft as sft

    if kind == "lora":
        pytest.importorskip("peft", reason="the extra [lora] is not installed")
    Selection({0: [1, 4], 1: [0]}).save(tmp_path / "experts.json")
    more = {"all": {}, "experts": {"experts": tmp_path / "experts.json"}, "lora": {"lora_rank": 2}}
    config = SftConfig(
        data=str(chats), out=tmp_path / "run", length=64, epochs=1, learning_rate=0.1, **more[kind]
    )
    with RunDir.open(config.out, {}) as run:
        first = finetune(str(trained / "model"), config, run)
        monkeypatch.setattr(sft, "optimize", None)
        again = finetune(str(trained / "model"), config, run)
    assert (again.trained, again.steps) == (first.trained, first.steps)
    before, _ = hub.load(trained / "model")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one, two, plain = (tuned(input_ids=ids).logits for tuned in
                           (first.model, again.model, before))  # fmt: skip
    assert torch.allclose(one, two, atol=1e-6)
    assert not torch.allclose(one, plain, atol=1e-3)


def test_precision_of_the_checkpoint_is_kept_and_weights_are_tuned_in_float32(
    command, trained, chats, tmp_path
):
    half = tmp_path / "half"
    assert command("convert", trained / "model", "--out", half, "--dtype", "bfloat16")[0] == 0
    run_sft(command, half, chats, tmp_path / "run", "--epochs", "1")
    assert hub.load(tmp_path / "run" / "model", dtype="auto")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "0"], "--epochs 0.0: must be above 0"),
        (["--lora-rank", "-1"], "--lora-rank -1: must be 0 or more"),
        (["--length", "1"], "--length 1: must be 2 or more"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--length", "4"], "no reply begins within 4 tokens"),
        (["--experts", "nowhere.json"], "nowhere.json: is no selection of experts"),
        (
            ["--experts", "nowhere.json", "--lora-rank", "2"],
            "train an adapter or experts, not both",
        ),
    ],
)
def test_bad_options_are_told_in_one_line(command, trained, chats, tmp_path, options, words):
    code, out, err = command(
        "sft", trained / "model", "--data", chats, "--out", tmp_path / "run", "--quiet", *options
    )
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.realdata
def test_tuning_on_the_esft_intent_task(command, trained, data_folder, tmp_path):
    import gzip

    with gzip.open(data_folder / "sft" / "esft_train_intent.jsonl.gz", "rt") as file:
        rows = [next(file) for _ in range(40)]
    (tmp_path / "intent.jsonl").write_text("".join(rows))
    run_sft(
        command, trained / "model", tmp_path / "intent.jsonl", tmp_path / "run", "--epochs", "3",
        length=512,
    )  # fmt: skip
    losses = [line["lm_loss"] for line in RunDir(tmp_path / "run").metrics()]
    assert losses[-1] < losses[0]
