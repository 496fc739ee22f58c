"""A reward learned by two processes that talk by gloo, and the same by one.

pip install . && python examples/ddp.py
torchrun --nproc-per-node 2 examples/ddp.py   # the two processes alone
"""

import os
import tempfile

import torch
from po_bilevel import Batch, BilevelTrainer, LinearGaussian, MahalanobisReward, PolicyGradient
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

STEPS = 20


def learn(wrap, steps):
    """The diagonal of U, which is learned; each process has all rows here, and takes its share of them."""
    torch.manual_seed(0)
    x = torch.randn(300, 3)
    y = x @ torch.randn(3, 2) + torch.tensor([0.3, 1.0]) * torch.randn(300, 2)
    policy, reward = LinearGaussian(3, 2), MahalanobisReward(2, "diagonal")
    trainer = BilevelTrainer(
        wrap(policy), reward, inner_data=Batch(x[:200], y[:200]), outer_data=Batch(x[200:], y[200:]),
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03), inner_steps=200,
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.2),
        inner_loss=PolicyGradient(entropy_coef=0.5, estimator="analytic"), progress=False,
    )  # fmt: skip
    trainer.fit(steps)
    return reward.precision().detach()


def work(rank, folder, steps):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(learn(DistributedDataParallel, steps), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def compare(steps=STEPS):
    """The reward of one process, and those of each of two."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, steps), nprocs=2)
        both = [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]
    return learn(lambda policy: policy, steps), both


if __name__ == "__main__":
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        learned = learn(DistributedDataParallel, STEPS)
        print(f"process {distributed.get_rank()} of {distributed.get_world_size()}: {learned.tolist()}")
        distributed.destroy_process_group()
    else:
        alone, (first, second) = compare()
        print("one process:  ", alone.tolist())
        print("each of two:  ", first.tolist(), second.tolist())
        assert torch.equal(first, second)
        assert torch.allclose(first, alone, rtol=1e-4)
        print("The same in each, and to rounding that of one process.")
