"""Scores of steps by one pass a solution, against one pass a step with logits of the whole vocabulary.

python packages/mathshepherd/benchmarks/bench_scoring.py

A Llama of 4 x 128 with random weights and a vocabulary of 32,000, solutions of 10 steps, one thread;
medians of interleaved runs in CPU seconds. The rival is written anew after a description of RLHFlow's
script: each step is scored by a pass of its own over the question and all steps so far, one row at a
time, and the two verdicts are picked from all logits of the last place. The bar is K, the number of
steps. A third way reads all tags in one pass too, and has the whole vocabulary's logits of a batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from bench_rollouts import RESULTS, medians
from mathshepherd import shop
from mathshepherd.generate import encode
from mathshepherd.reward_model import Reading, StepRewardModel, pad, token_batches
from mathshepherd.shop import FORMAT, Shop
from octavo.rundir import environment, write_json
from transformers import LlamaConfig, LlamaForCausalLM


def make_case(
    layers: int, width: int, vocabulary: int, steps: int, count: int
) -> tuple[StepRewardModel, list[str], list[tuple[str, ...]]]:
    """A reward model, and questions with solutions of so many steps."""
    world = shop.make_world(Shop(events=(steps, steps), highest=60), 0, count, 0, 0, 0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 32), initializer_range=0.1,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    reward = StepRewardModel(
        LlamaForCausalLM(config), shop.make_tokenizer(world.shop), Reading(form=FORMAT)
    ).eval()
    solutions = [shop.solve(world.shop, world.tales[one.id]) for one in world.pool]
    return reward, [one.question for one in world.pool], solutions


def pass_a_step(
    reward: StepRewardModel, questions: Sequence[str], solutions: Sequence[tuple[str, ...]]
) -> list[np.ndarray]:
    """K passes a solution, one row each, and the logits of the last place."""
    verdicts = [reward.words.good, reward.words.bad]
    found = []
    with torch.inference_mode():
        for question, steps in zip(questions, solutions, strict=True):
            scores = []
            for n in range(1, len(steps) + 1):
                ids = torch.tensor([encode(reward.tokenizer, FORMAT.prefix(question, steps[:n]))])
                logits = reward.model(input_ids=ids).logits[:, -1, verdicts]
                scores.append(logits.float().softmax(-1)[0, 0].item())
            found.append(np.array(scores))
    return found


def all_logits(
    reward: StepRewardModel, questions: Sequence[str], solutions: Sequence[tuple[str, ...]],
    batch_tokens: int,
) -> list[np.ndarray]:  # fmt: skip
    """One pass a solution in batches as large, with the whole vocabulary's logits at every token."""
    pairs = zip(questions, solutions, strict=True)
    rows = [encode(reward.tokenizer, FORMAT.prefix(question, steps)) for question, steps in pairs]
    found = [np.empty(0)] * len(rows)
    with torch.inference_mode():
        for batch in token_batches([len(row) for row in rows], batch_tokens):
            ids, mask = pad([rows[n] for n in batch])
            logits = reward.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            both = logits[..., [reward.words.good, reward.words.bad]].float().softmax(-1)[..., 0]
            for n, scores, tags in zip(batch, both, ids == reward.words.tag, strict=True):
                found[n] = scores[tags].numpy()
    return found


def measure(
    layers: int = 4, width: int = 128, vocabulary: int = 32_000, steps: int = 10, count: int = 24,
    batch_tokens: int = 2048, tries: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each way, their ratios, and the logits that are never made; scores must be equal."""
    reward, questions, solutions = make_case(layers, width, vocabulary, steps, count)

    def ours() -> list[np.ndarray]:
        return reward.step_scores(questions, solutions, batch_tokens=batch_tokens)

    found = ours()
    assert reward.exact
    assert {len(one) for one in found} == {steps}
    for others in (
        pass_a_step(reward, questions, solutions),
        all_logits(reward, questions, solutions, batch_tokens),
    ):
        assert max(np.abs(a - b).max() for a, b in zip(found, others, strict=True)) < 1e-5
    seconds = medians(
        {"one pass": ours, "a pass a step": lambda: pass_a_step(reward, questions, solutions),
         "one pass, all logits": lambda: all_logits(reward, questions, solutions, batch_tokens)}, tries,
    )  # fmt: skip
    lengths = [
        len(encode(reward.tokenizer, FORMAT.prefix(question, some)))
        for question, some in zip(questions, solutions, strict=True)
    ]
    widest = max(len(batch) * lengths[batch[0]] for batch in token_batches(lengths, batch_tokens))
    ratios = [
        {"what": "a pass a step / one pass", "ratio": seconds["a pass a step"] / seconds["one pass"],
         "bar": f"{steps} or more (K)"},
        {"what": "one pass with all logits / one pass",
         "ratio": seconds["one pass, all logits"] / seconds["one pass"], "bar": "no bar"},
    ]  # fmt: skip
    memory = {
        "tokens of the largest batch": widest,
        "MiB of its logits over the vocabulary": widest * vocabulary * 4 / 2**20,
        "MiB of the two logits at its tags": (
            max(map(len, token_batches(lengths, batch_tokens))) * steps * 2 * 4 / 2**20
        ),
    }
    return {"ratios": ratios, "seconds": seconds, "memory": memory}


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(RESULTS / "scoring.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
