"""Put a DeepSeekMoE layer into a network of your own and keep its load even.

python layer.py
"""

import torch
from deepseekmoe import DeepseekMoeConfig, DeepseekMoeLayer, max_violation


def main(steps: int = 60) -> float:
    """Train one layer on a toy task, print its load, and return how uneven it is."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig.preset("tiny", n_routed_experts=15, num_experts_per_tok=3)
    layer = DeepseekMoeLayer(config)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    target = torch.randn(64, 64) / 8
    load = torch.zeros(15, dtype=torch.long)
    loss = torch.zeros(())
    for step in range(steps):
        x = torch.randn(8, 16, 64)
        out = layer(x)
        loss = (out.hidden - x @ target).square().mean() + 0.01 * out.losses[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps // 2:
            load += out.counts
    uneven = float(max_violation(load))
    print(f"loss {loss.item():.3f}, MaxVio {uneven:.2f}, load {load.tolist()}")  # noqa: T201
    return uneven


if __name__ == "__main__":
    main()
