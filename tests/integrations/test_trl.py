"""Our GRPO trainer against TRL's own, on the CPU."""

import copy
import itertools
import warnings
from typing import NamedTuple

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", exc_type=ImportError)
    pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    import transformers
    from po_bilevel import language
    from po_bilevel.errors import MissingDependencyError
    from po_bilevel.integrations import trl as ours
    from po_bilevel.language.huggingface import HuggingFaceModel, HuggingFaceTokenizer

    from .models import WORDS, dataset, saved_model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 6


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # which is faster at these sizes


def reward_of_letters(completions, **columns):
    return [float(text.count("c") - 0.5 * text.count("d")) for text in completions]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("llama"))


def trainer_of(cls, folder, *, model=None, callbacks=None, reward_funcs=reward_of_letters, **options):
    defaults = {
        "output_dir": f"{folder}/out", "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 3, "seed": 3,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": LENGTH, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 1e-2,
        "optim": "sgd", "lr_scheduler_type": "constant", "scale_rewards": "none",
    }  # fmt: skip
    return cls(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder) if model is None else model,
        reward_funcs=reward_funcs, args=trl.GRPOConfig(**{**defaults, **options}), train_dataset=dataset(),
        processing_class=tokenizer(), callbacks=callbacks,
    )  # fmt: skip


def batch(trainer, seed, *, old=True):
    """What the trainer hands to its loss: prompts padded on the left, completions on the right, one without a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(WORDS), (4, 4 + LENGTH), generator=generator)
    present = torch.ones_like(ids)
    present[0, :2] = present[1, 7:] = present[3, 4:] = 0
    with torch.no_grad():
        log_prob, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, present, LENGTH)

    def near():
        return log_prob + 0.4 * torch.randn(log_prob.shape, generator=generator)

    found = {
        "prompt_ids": ids[:, :4], "prompt_mask": present[:, :4], "completion_ids": ids[:, 4:],
        "completion_mask": present[:, 4:], "advantages": torch.randn(4, generator=generator),
        "ref_per_token_logps": near(), "num_items_in_batch": torch.tensor(37),
    }  # fmt: skip
    return {**found, "old_per_token_logps": near()} if old else found


def loss_and_gradients(trainer, inputs, training=True):
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train(training)
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    gradients = torch.autograd.grad(loss, [x for x in trainer.model.parameters() if x.requires_grad])
    return loss.detach(), gradients, {name: x[-1] for name, x in trainer._metrics["train"].items()}


def agree(mine, theirs, inputs, training=True):
    found, expected = (loss_and_gradients(trainer, inputs, training) for trainer in (mine, theirs))
    # float32: sums of some hundred terms in another order, and the largest gradient is about 1.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for x, y in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert any(x.abs().max() > 1e-3 for x in found[1])
    assert found[2].keys() == expected[2].keys()
    assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-6, nan_ok=True)


CASES = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "sapo", "vespo")),
    *({"loss_type": name, "importance_sampling_level": "sequence"} for name in ("grpo", "luspo", "dapo", "sapo")),
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "cispo", "epsilon_high": 1.2, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "delta": 1.5},
    {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28, "use_bias_correction_kl": True},
    {"loss_type": "grpo", "temperature": 0.7, "entropy_coef": 0.1},
    {"loss_type": "bnpo", "top_entropy_quantile": 0.6, "entropy_coef": 0.1},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_are_those_of_trl(where, options, beta):
    mine, theirs = (
        trainer_of(cls, where, beta=beta, gradient_accumulation_steps=4, **options)
        for cls in (ours.GRPOTrainer, trl.GRPOTrainer)
    )
    for seed, old in itertools.product(range(2), (True, False)):
        agree(mine, theirs, batch(theirs, seed, old=old))
    agree(mine, theirs, batch(theirs, 3), training=False)


def test_a_correction_for_vllm(where):
    mine, theirs = (trainer_of(cls, where, loss_type="grpo") for cls in (ours.GRPOTrainer, trl.GRPOTrainer))
    mine.use_vllm = theirs.use_vllm = True
    agree(mine, theirs, {**batch(theirs, 0), "importance_sampling_ratio": torch.rand(4, LENGTH)})
    agree(mine, theirs, {**batch(theirs, 0), "importance_sampling_ratio": torch.rand(4, 1)})


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_heads(tmp_path, kind):
    options = (
        {"final_logit_softcapping": 2.0}
        if kind == "gemma2"
        else {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    )
    folder = saved_model(tmp_path, kind, **options)
    mine, theirs = (trainer_of(cls, folder, temperature=0.8, beta=0.1) for cls in (ours.GRPOTrainer, trl.GRPOTrainer))
    agree(mine, theirs, batch(theirs, 0))


def test_all_masked_is_zero(where):
    mine = trainer_of(ours.GRPOTrainer, where)
    inputs = batch(mine, 0)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradients, _ = loss_and_gradients(mine, inputs)
    assert loss == 0
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": 0.1},
    ],
    ids=["dapo", "twice", "accumulated"],
)
def test_three_steps_end_where_trl_does(where, options):
    ends, logs = [], []
    for cls in (ours.GRPOTrainer, trl.GRPOTrainer):
        trainer = trainer_of(cls, where, **options)
        start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        ends.append(trainer.model.state_dict())
        logs.append(trainer.state.log_history[:3])
    assert any((ends[0][name] - x).abs().max() > 1e-4 for name, x in start.items())
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"step_time"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_an_adapter_of_peft(where):
    """Its reference is a second adapter, which starts as the first one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainers = []
    for cls in (ours.GRPOTrainer, trl.GRPOTrainer):
        torch.manual_seed(1)  # of the adapter
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(where), config)
        trainers.append(trainer_of(cls, where, model=model, beta=0.1, loss_type="grpo"))
    agree(*trainers, batch(trainers[1], 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_type", {"loss_type": "dpo"}),
        ("importance_sampling_level", {"loss_type": "vespo", "importance_sampling_level": "sequence"}),
        ("vespo_k_pos", {"loss_type": "vespo", "vespo_k_pos": 1.0}),
        ("delta", {"delta": 1.1}),
        ("delta", {"delta": 2.0, "loss_type": "sapo"}),
        ("epsilon_high", {"loss_type": "cispo"}),
        ("use_adaptive_entropy", {"use_adaptive_entropy": True, "entropy_coef": 0.1}),
        ("cast_lm_head_to_fp32", {"cast_lm_head_to_fp32": True}),
        ("use_liger_kernel", {"use_liger_kernel": True}),
    ],
)
def test_options_without_a_counterpart_are_refused(where, name, options):
    with pytest.raises(ValueError, match=f"GRPOTrainer: {name}: "):
        trainer_of(ours.GRPOTrainer, where, **options)


class Learner:
    class Outcome(NamedTuple):
        residual: torch.Tensor
        products: int
        path: str

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1
        return self.Outcome(torch.tensor(0.5 * self.steps), 7, "exact")


def test_the_callback_learns_and_logs(where):
    learner = Learner()
    callback = ours.RewardCallback(learner, every=2)
    trainer = trainer_of(ours.GRPOTrainer, where, callbacks=[callback], max_steps=6, logging_steps=4)
    trainer.train()
    assert learner.steps == 3
    logged = [each for each in trainer.state.log_history if "reward_learning/residual" in each]
    assert [each["reward_learning/residual"] for each in logged] == [0.75, 1.5]  # (0.5 + 1) / 2, and the rest
    assert logged[0]["reward_learning/products"] == 7


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_reward_that_is_learned_from_text(where, gradient_checkpointing):
    model = transformers.AutoModelForCausalLM.from_pretrained(where)
    pairs = language.Pairs.of((row["prompt"], row["target"]) for row in dataset())
    reward = language.TextEmbeddingReward(language.NgramEmbedder(8, ngrams=(1, 1)))
    before = reward.precision().detach().clone()
    learner = language.RewardLearner(
        language.TokenPolicy(HuggingFaceModel(model), tokenizer().eos_token_id), HuggingFaceTokenizer(tokenizer()),
        reward, inner=pairs, outer=pairs, coefficient=0.5, sampling=language.Sampling(4, LENGTH),
        outer_optimizer=torch.optim.SGD(reward.parameters(), lr=0.1),
    )  # fmt: skip
    trainer = trainer_of(
        ours.GRPOTrainer, where, model=model, callbacks=[ours.RewardCallback(learner)], beta=0.5,
        use_bias_correction_kl=True, reward_funcs=ours.reward_function(reward), loss_type="dr_grpo",
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    trainer.train()
    assert (reward.precision() - before).abs().max() > 1e-3
    for logged in trainer.state.log_history[:3]:
        assert 0 < logged["reward_learning/outer_loss"] < 100
        assert logged["reward_learning/gradient_norm"] > 0
        assert logged["rewards/text_reward/mean"] < 0


@pytest.mark.parametrize("options", [{"scale_rewards": "group"}, {"multi_objective_aggregation": "normalize_then_sum"}])
def test_standardised_advantages_are_refused(where, options):
    callback = ours.RewardCallback(Learner())
    with pytest.raises(ValueError, match=f"RewardCallback: {next(iter(options))}: .*scale"):
        trainer_of(trl.GRPOTrainer, where, callbacks=[callback], **options)
    trainer = trainer_of(ours.GRPOTrainer, where, **options)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=f"RewardCallback: {next(iter(options))}: "):
        trainer.train()


def test_a_callback_without_a_learner_is_refused():
    with pytest.raises(TypeError, match=r"learner: expected an object with step\(\), got int"):
        ours.RewardCallback(3)
    with pytest.raises(ValueError, match="every: expected an integer of at least 1, got 0"):
        ours.RewardCallback(Learner(), every=0)


class Lengths(torch.nn.Module):
    """-(u (|answer| - |target|))², of the lengths of texts."""

    gates = ()

    def __init__(self):
        super().__init__()
        self.u = torch.nn.Parameter(torch.tensor(1.0))

    def features(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])

    def forward(self, answer, target):
        return -(self.u * (answer - target)).square().sum(-1)


def test_a_reward_of_texts(where):
    reward = Lengths()
    function = ours.reward_function(reward)
    assert function.__name__ == "text_reward"
    assert function(prompts=["p", "p"], completions=["abc", "a"], target=["a", "a"]) == [-4.0, 0.0]
    chat = [[{"role": "assistant", "content": "ab"}]]
    assert function(prompts=chat, completions=chat, target=["a"]) == [-1.0]
    with torch.no_grad():
        reward.u.fill_(2.0)
    assert function(prompts=["p"], completions=["ab"], target=["a"]) == [-4.0]
    with pytest.raises(ValueError, match="expected a column 'target' of the data set, got 'answer'"):
        function(prompts=["p"], completions=["ab"], answer=["a"])
    trainer = trainer_of(ours.GRPOTrainer, where, reward_funcs=function, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/text_reward/mean"] < 0


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.15.2")
    with pytest.raises(MissingDependencyError, match=r"trl 1\.15\.2 is installed, but trl>=1\.16,<2\.0 .*\[trl\]"):
        ours.optional.require_version("trl", "trl", least=(1, 16), below=(2, 0))
