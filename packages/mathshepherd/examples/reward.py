"""Rewards of steps in a reinforcement loop of one's own: scores, tokens' rewards, advantages, a loss.

python reward.py POLICY REWARD_MODEL QUESTIONS.jsonl

A row of QUESTIONS.jsonl: {"question": ...}. One update by the plain policy gradient; put your own here.
"""

import sys

import torch
from mathshepherd.config import Sampling, Shaping
from mathshepherd.generate import continue_tokens, encode, end_tokens, seed_of
from mathshepherd.reward_model import StepRewardModel, pad
from mathshepherd.rewards import gae, step_rewards, whiten
from mathshepherd.sft import open_generator
from octavo.data import iter_rows


def main(policy: str, source: str, rows: str, learning_rate: float = 1e-4) -> float:
    """One iteration; policy and reward model share a tokenizer here. Returns the mean reward."""
    reward = StepRewardModel.load(source)
    form, tag = reward.reading.form, reward.words.tag
    model, tokenizer = open_generator(policy, form)
    questions = [row["question"] for row in iter_rows(rows, {"question": str})]

    # Sample: each prompt four times, every response from a seed of its own.
    prompts = [encode(tokenizer, form.question(question)) for question in questions]
    seeds = [[seed_of(question, n) for n in range(4)] for question in questions]
    sampling = Sampling(temperature=1.0, max_new_tokens=64)
    ends = end_tokens(model, tokenizer)
    made = continue_tokens(model.eval(), prompts, seeds, sampling, ends)
    pairs = [(prompt, one.ids) for prompt, some in zip(prompts, made, strict=True) for one in some]

    # Score: the policy writes the tags itself, so that its own tokens are the reward model's input.
    with torch.inference_mode():
        scored = reward.score_tokens([prompt + response for prompt, response in pairs])
    places = [[n for n, token in enumerate(ids) if token == tag] for _, ids in pairs]
    steps, length = max(1, *map(len, places)), max(len(ids) for _, ids in pairs)
    scores, tags = torch.zeros(len(pairs), steps), torch.full((len(pairs), steps), -1)
    for row, (values, found) in enumerate(zip(scored, places, strict=True)):
        scores[row, : len(found)] = values
        tags[row, : len(found)] = torch.tensor(found)

    # Reward: the default pays for the change of the score; advantages without a critic's values.
    rewards = step_rewards(scores, tags, length, Shaping())
    mask = torch.tensor([[n < len(ids) for n in range(length)] for _, ids in pairs])
    advantages = whiten(gae(rewards, torch.zeros_like(rewards), mask, lam=1.0), mask)

    # Update: log-probabilities of the responses' tokens, weighted by their advantages.
    ids, seen = pad([prompt + response for prompt, response in pairs])
    logs = model(input_ids=ids, attention_mask=seen).logits.float().log_softmax(-1)
    loss = torch.zeros(())
    for row, (prompt, response) in enumerate(pairs):
        here = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        chosen = logs[row, here].gather(1, torch.tensor(response)[:, None]).squeeze(1)
        loss = loss - (chosen * advantages[row, : len(response)]).sum() / mask.sum()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    loss.backward()
    optimizer.step()

    mean = rewards.sum(1).mean().item()
    print(f"{len(pairs)} responses, {sum(map(len, places)) / len(pairs):.1f} steps each")  # noqa: T201
    print(f"mean reward {mean:.3f}, loss {loss.item():.4f}")  # noqa: T201
    for score, token in zip(scored[0].tolist(), places[0], strict=True):
        print(f"    token {token}: score {score:.3f}, reward {rewards[0, token]:+.3f}")  # noqa: T201
    return mean


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
