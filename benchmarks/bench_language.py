"""One GRPO update of a small decoder, by TRL and by our trainer, which is TRL's but for the head and the loss.

Skipped where TRL is not installed: run it in the environment of `make test-integrations`.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import po_kernels as pk
from benchmarks.harness import check, compare, peak_extra_bytes, versions

VOCABULARY, WIDTH, LAYERS = 8192, 128, 4
GROUP, COMPLETIONS, PROMPT, LENGTH = 8, 32, 16, 64


@pytest.fixture
def one_thread():
    """Where neighbours share the cores, two threads measure when they get both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainers() -> list[Any]:
    """Ours and TRL's, of the same model."""
    import transformers
    import trl
    from po_bilevel.integrations import trl as ours

    from tests.integrations import models

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=4, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    found = []
    for cls in (ours.GRPOTrainer, trl.GRPOTrainer):
        args = trl.GRPOConfig(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=COMPLETIONS,
            num_generations=GROUP, max_completion_length=LENGTH, gradient_checkpointing=False, loss_type="grpo",
        )  # fmt: skip
        trainer = cls(
            model=copy.deepcopy(model), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=models.dataset(), processing_class=models.tokenizer(),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        found.append(trainer)
    return found


def update(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss = trainer._compute_loss(trainer.model, inputs)
    return (loss.detach(), *torch.autograd.grad(loss, list(trainer.model.parameters())))


def head(log_prob_of: Callable[[], Tensor], advantages: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """From hidden states to the gradient in them and in the head."""
    return torch.autograd.grad(pk.policy_loss(log_prob_of().view(COMPLETIONS, LENGTH), advantages), inputs)


@pytest.mark.filterwarnings("ignore")
def bench_grpo_update(benchmark, one_thread):
    """Loss and gradients of all parameters; and of it the head and the loss, whose peak memory is beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
        from trl.kernels import ChunkedLogProbFunction

        ours, theirs = trainers()
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (COMPLETIONS, PROMPT + LENGTH))
    there = torch.ones_like(ids)
    advantages = torch.randn(COMPLETIONS)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": there[:, :PROMPT], "completion_ids": ids[:, PROMPT:],
        "completion_mask": there[:, PROMPT:], "advantages": advantages, "num_items_in_batch": there.sum(),
    }  # fmt: skip
    run, other = partial(update, ours, inputs), partial(update, theirs, inputs)
    check(run(), other(), "GRPO update")

    taken = ids[:, PROMPT:].reshape(-1)
    tensors = [torch.randn(len(taken), WIDTH, requires_grad=True), ours.model.lm_head.weight]
    run_head = partial(
        head, lambda: pk.linear_token_log_prob(*tensors, taken, entropy=True).log_prob, advantages, tensors
    )
    fields = ("log_probs", "entropy")
    other_head = partial(
        head, lambda: ChunkedLogProbFunction.apply(*tensors, None, taken, 1.0, 32768, None, 1.0, fields)[0],
        advantages, tensors,
    )  # fmt: skip
    eager_head = partial(
        head, lambda: (tensors[0] @ tensors[1].mT).log_softmax(-1).gather(1, taken[:, None])[:, 0], advantages, tensors
    )
    check(run_head(), eager_head(), "head")
    peaks = {"update": (run, other), "head": (run_head, other_head)}
    info = {
        f"{who}{what}_peak_extra_mb": peak_extra_bytes(each)
        for what, pair in peaks.items()
        for who, each in zip(("", "trl_"), pair, strict=True)
    }
    benchmark.extra_info.update(
        versions(), shape=f"GRPO update, {COMPLETIONS} x {LENGTH} tokens of {VOCABULARY}, one thread",
        trl=compare(run, other)._asdict(), trl_head=compare(run_head, other_head)._asdict(),
        eager_head=compare(run_head, eager_head)._asdict(),
        **{name: None if size is None else size / 2**20 for name, size in info.items()},
    )  # fmt: skip
    benchmark.pedantic(run, rounds=3)
