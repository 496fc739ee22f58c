"""Rewards of texts: values and derivatives against formulas, embeddings remembered and checked, gates, embedders."""

import copy

import numpy as np
import pytest
import torch
from po_bilevel import MissingDependencyError
from po_bilevel.language.embedders import EmbeddingCache, NgramEmbedder, SentenceEncoder
from po_bilevel.language.rewards import Gate, TextEmbeddingReward, TextReward, gated

U = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.7]], dtype=torch.float64)
STARTS = {"isotropic": torch.tensor(0.4).double(), "diagonal": U.diagonal().clone(), "full": U}
CASES = [("mahalanobis", kind) for kind in STARTS] + [("cosine", "diagonal"), ("cosine", "full")]


def letters(texts):
    """How often a, b and c are in a text, and a little more."""
    return torch.tensor([[t.count(c) + 0.1 * len(t) for c in "abc"] for t in texts], dtype=torch.float64)


def embeddings(*lead):
    return torch.randn(*lead, 3, dtype=torch.float64)


@pytest.mark.parametrize(("metric", "kind"), CASES)
def test_values_against_the_formula(metric, kind):
    reward = TextEmbeddingReward(letters, metric=metric, kind=kind, U=STARTS[kind])
    answer, target = embeddings(4, 2), embeddings(2)
    found = reward(answer, target)
    assert found.shape == (4, 2)
    matrix = STARTS[kind] if kind == "full" else STARTS[kind] * torch.eye(3).double()
    for g in range(4):
        for b in range(2):
            e, y = answer[g, b], target[b]
            expected = -(e - y) @ matrix @ (e - y)
            if metric == "cosine":
                expected = e @ matrix @ y / ((e @ matrix @ e) * (y @ matrix @ y)).sqrt()
            torch.testing.assert_close(found[g, b].detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reward.shown(), STARTS[kind], rtol=1e-10, atol=1e-10)
    assert not reward.shown().requires_grad
    assert reward.precision().requires_grad


@pytest.mark.parametrize(("metric", "kind"), CASES)
def test_the_derivative_in_the_parameters(metric, kind):
    reward = TextEmbeddingReward(letters, metric=metric, kind=kind, U=STARTS[kind])
    answer, target = embeddings(3, 2), embeddings(2)
    answer[0, 0] = 0.0  # an answer without text

    def value(raw):
        return torch.func.functional_call(reward, {"matrix.raw": raw}, (answer, target))

    raw = reward.matrix.raw.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, raw)
    assert torch.autograd.gradgradcheck(value, raw)
    reward(answer, target).sum().backward()
    step = torch.randn_like(raw)
    with torch.no_grad():
        difference = (value(raw + 1e-6 * step) - value(raw - 1e-6 * step)).sum() / 2e-6
    # Central differences are off by the square of the step, and by rounding over the step: 1e-16 / 1e-6.
    torch.testing.assert_close((reward.matrix.raw.grad * step).sum(), difference, rtol=1e-7, atol=1e-8)


def test_the_plain_cosine_has_nothing_to_learn():
    reward = TextEmbeddingReward(letters, metric="cosine")
    assert not list(reward.parameters())
    assert reward.shown() is None
    with pytest.raises(ValueError, match="TextEmbeddingReward: precision: the plain cosine has none"):
        reward.precision()
    a, b = embeddings(5), embeddings(5)
    torch.testing.assert_close(reward(a, b), torch.cosine_similarity(a, b, dim=-1))
    assert float(reward(torch.zeros(3), torch.ones(3))) == 0.0
    assert reward.double().features(["a"]).dtype == torch.float64


def test_features_are_constants_that_no_parameter_of_the_embedder_enters():
    embedder = torch.nn.Sequential(torch.nn.Linear(3, 2))
    reward = TextEmbeddingReward(lambda texts: embedder(letters(texts).float()))
    features = reward.features(["ab", "c"])
    assert not features.requires_grad

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = embedder

        def forward(self, texts):
            with torch.inference_mode():
                return self.head(letters(texts).float())

    reward = TextEmbeddingReward(Module())
    assert [name for name, _ in reward.named_parameters()] == ["matrix.raw"]
    assert list(reward.state_dict()) == ["matrix.raw"]
    # A tensor of inference mode could not be saved for the backward pass.
    reward(reward.features(["ab"]), reward.features(["c"])).sum().backward()
    assert torch.equal(copy.deepcopy(reward).features(["ab", "c"]), reward.features(["ab", "c"]))


def test_texts_are_embedded_once():
    calls = []

    def embedder(texts):
        calls.append(list(texts))
        return letters(texts)

    reward = TextEmbeddingReward(embedder, 3, cache_size=3)
    torch.testing.assert_close(reward.features(["a", "b", "a"]), letters(["a", "b", "a"]).float())
    reward.features(["b", "c"])
    assert calls == [["a", "b"], ["c"]]
    reward.features(["a"])
    torch.testing.assert_close(reward.features(["d", "a", "b", "c"]), letters(["d", "a", "b", "c"]).float())
    assert calls[2:] == [["d"]]
    assert reward.features([]).shape == (0, 3)
    calls.clear()
    reward.features(["d", "b"])
    assert calls == [["d"]]


@pytest.mark.parametrize("size", [0, 2])
def test_the_cache_forgets_what_was_asked_for_longest_ago(size):
    calls = []

    def embedder(texts):
        calls.extend(texts)
        return letters(texts)

    cache = EmbeddingCache(embedder, size)
    for texts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        assert torch.equal(cache(texts), letters(texts))
        assert len(cache) <= size
    assert calls == {0: ["a", "b", "a", "c", "a", "b"], 2: ["a", "b", "c", "b"]}[size]
    # A row that is kept does not keep the batch that it came with.
    assert all(row.untyped_storage().nbytes() == 24 for row in cache._rows.values())
    with pytest.raises(ValueError, match="EmbeddingCache: size: expected at least 0, got -1"):
        EmbeddingCache(embedder, -1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_are_embeddings_too_and_u_takes_their_dtype(dtype):
    array = letters(["a", "bc"]).numpy().astype(dtype)
    array.setflags(write=False)
    reward = TextEmbeddingReward(lambda texts: array[: len(texts)][::-1])
    expected = torch.float64 if dtype == np.float64 else torch.float32
    assert reward.precision().dtype == reward.features(["x", "y"]).dtype == expected
    assert reward.dim == 3
    torch.testing.assert_close(reward.features(["x", "y"]), torch.tensor(array[::-1].copy()).to(expected))


def nan_for(word):
    return lambda texts: letters(texts).masked_fill(torch.tensor([[t == word] for t in texts]), float("nan"))


def changing(texts):
    return torch.ones(len(texts), 2 if "long" in texts else 3)


@pytest.mark.parametrize(
    ("embedder", "error", "message"),
    [
        (lambda texts: letters(texts)[1:], ValueError, r"embedder: expected shape \(2, n\), got \(1, 3\)"),
        (lambda texts: letters(texts)[0], ValueError, r"embedder: expected shape \(2, n\), got \(3,\)"),
        (changing, ValueError, r"embedder: expected shape \(2, 3\), got \(2, 2\)"),
        (
            lambda texts: letters(texts).long(),
            TypeError,
            "embedder: expected a floating tensor or array, got torch.int64",
        ),
        (
            lambda texts: letters(texts).long().numpy(),
            TypeError,
            "embedder: expected a floating tensor or array, got int64",
        ),
        (lambda texts: letters(texts).tolist(), TypeError, "embedder: expected a floating tensor or array, got list"),
        (nan_for("long"), ValueError, "embedder: expected finite numbers, got others for the text 'long'"),
    ],
)
def test_refused_embeddings(embedder, error, message):
    with pytest.raises(error, match=f"TextEmbeddingReward: {message}"):
        TextEmbeddingReward(embedder, 3).features(["short", "long"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"U": torch.ones(4)}, ValueError, r"U: expected shape \(\) or \(3,\) for kind='diagonal', got \(4,\)"),
        ({"U": torch.eye(4), "kind": "full"}, ValueError, r"U: expected shape .*got \(4, 4\)"),
        ({"U": torch.eye(3), "dim": 4, "kind": "full"}, ValueError, r"U: expected shape .*got \(3, 3\)"),
        ({"U": -1.0}, ValueError, "U: expected finite values above"),
        ({"U": float("nan")}, ValueError, "U: expected finite values"),
        ({"U": "one"}, TypeError, "U: expected a tensor, a number or None, got str"),
        ({"kind": "round"}, ValueError, "kind: expected one of 'isotropic', .*got 'round'"),
        ({"metric": "l1"}, ValueError, "metric: expected 'mahalanobis' or 'cosine', got 'l1'"),
        ({"metric": "cosine", "kind": "isotropic", "U": 1.0}, ValueError, "kind: .* scale of U cancels"),
        ({"dim": 0}, ValueError, "dim: expected an integer of at least 1, got 0"),
        ({"dim": -1, "metric": "cosine"}, ValueError, "dim: expected an integer of at least 1, got -1"),
        ({"gates": [len]}, TypeError, "gates: expected a sequence of Gate, got <built-in"),
        (
            {"embedder": lambda texts: letters(texts * 2)},
            ValueError,
            r"embedder: expected shape \(1, n\), got \(2, 3\)",
        ),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=f"TextEmbeddingReward: {message}"):
        TextEmbeddingReward(**{"embedder": letters} | options)


def test_refused_texts_and_features():
    reward = TextEmbeddingReward(letters)
    for texts in ("abc", ["a", 3], [None]):
        with pytest.raises(TypeError, match="TextEmbeddingReward: texts: expected a sequence of strings, got"):
            reward.features(texts)
    with pytest.raises(ValueError, match=r"TextEmbeddingReward: target: expected shape \(..., 3\), got \(2, 1\)"):
        reward(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(TypeError, match="abstract"):
        TextReward()


def test_gates_mask_and_multiply():
    gates = (
        Gate(lambda prompt, answer: prompt in answer),
        Gate(lambda prompt, answer: np.bool_(len(answer) < 6)),
        Gate(lambda prompt, answer: 0.5 if answer.endswith("!") else 1, mode="multiply"),
        Gate(lambda prompt, answer: "b" not in answer, mode="multiply"),
        Gate(lambda prompt, answer: np.float32(0.25) ** answer.count("c"), mode="multiply"),
    )
    reward = TextEmbeddingReward(letters, gates=gates)
    found = reward.gate(["a", "a", "b", "a", "a"], ["a!", "c", "ab", "aaaaaaa", "ac!"])
    assert found.keep.tolist() == [True, False, True, False, True]
    assert found.factor.tolist() == [0.5, 0.25, 0.0, 1.0, 0.125]
    assert found.factor.dtype == torch.get_default_dtype()
    assert "letters, dim=3, metric='mahalanobis', gates=['mask <lambda>', 'mask <lambda>', 'multiply" in repr(reward)
    free = TextEmbeddingReward(letters).gate(["a", "b"], ["c", "d"])
    assert free.keep.tolist() == [True, True]
    assert free.factor.tolist() == [1.0, 1.0]
    assert free.keep.dtype == torch.bool


@pytest.mark.parametrize(
    ("given", "error"),
    [(1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("yes", TypeError), (None, TypeError)],
)
def test_what_a_gate_gives_is_a_bool_or_a_number_in_the_unit_interval(given, error):
    def has_form(prompt, answer):
        return given

    for mode in ("mask", "multiply"):
        with pytest.raises(error, match=r"Gate: has_form: expected a bool or a number in \[0, 1\], got"):
            TextEmbeddingReward(letters, gates=[Gate(has_form, mode)]).gate(["a"], ["b"])
    with pytest.raises(ValueError, match="Gate: mode: expected 'mask' or 'multiply', got 'add'"):
        Gate(has_form, "add")
    with pytest.raises(TypeError, match=r"Gate: function: expected one of \(prompt, answer\), got 'a.b'"):
        Gate("a.b")
    with pytest.raises(ValueError, match="TextEmbeddingReward: prompts: expected one for each of 1 answers, got 2"):
        TextEmbeddingReward(letters).gate(["a", "b"], ["b"])


def test_gated_rewards_stay_above_the_worst_of_their_group():
    rewards = torch.tensor([[-1.0, -5.0], [-4.0, -2.0], [-2.0, -3.0]], dtype=torch.float64)
    factor = torch.tensor([[0.5, 0.3], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        gated(rewards, factor), torch.tensor([[-2.5, -5.0], [-4.0, -2.0], [-2.0, -5.0]]).double()
    )
    assert torch.equal(gated(rewards / 3.0, torch.ones(3, 2)), rewards / 3.0)
    # The derivative along a shift of a group is one whatever the gates: through the least reward, too.
    inputs = rewards.requires_grad_()
    gradient = torch.autograd.grad(gated(inputs, factor).sum(), inputs)[0]
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 2.0], [2.5 - 1.0, 1.0], [1.0, 0.0]]).double())
    torch.testing.assert_close(gradient.sum(dim=0), torch.full((2,), 3.0).double())
    assert torch.autograd.gradcheck(gated, (inputs, factor.clamp(0.1, 0.9).requires_grad_()))
    keep = torch.tensor([[True, True], [False, True], [True, False]])
    # By hand: −4 of the first column and the last of the second are not there.
    left = gated(rewards, torch.full((3, 2), 0.5), keep)
    for column in range(2):
        there = keep[:, column]
        least = rewards[there, column].min()
        torch.testing.assert_close(left[there, column], least + 0.5 * (rewards[there, column] - least))
    for shape in ((3,), (2, 3), (3, 1)):
        with pytest.raises(ValueError, match=r"gated: rewards, factor: expected shape \(G, B\) of both"):
            gated(rewards, torch.ones(shape))


def test_ngrams_are_the_same_in_every_process_and_beside_any_text():
    texts = ["reward", "rewards of text", "", "policy gradient", "Σ⁻¹"]
    found = NgramEmbedder(16)(texts)
    assert found.shape == (5, 16)
    assert found.dtype == torch.float32
    for row, text in zip(found, texts, strict=True):
        assert torch.equal(NgramEmbedder(16)([text])[0], row)
    # Found in another process.
    expected = [[0.08894965, 0.04701725, 0.12844156], [0.17108251, 0.18718296]]
    torch.testing.assert_close(found[0, :3], torch.tensor(expected[0]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[4, -2:], torch.tensor(expected[1]), rtol=1e-6, atol=0.0)
    assert not torch.equal(NgramEmbedder(16, seed=1)(texts), found)
    assert not found[2].any()
    assert NgramEmbedder(16)([]).shape == (0, 16)
    # Lengths of one but for 1/√n: five standard deviations √(2/n) of a χ² over n.
    wide = NgramEmbedder(400)([texts[0], texts[1], texts[3]])
    assert ((wide.square().sum(dim=1) - 1.0).abs() < 5.0 * (2.0 / 400) ** 0.5).all()
    assert wide[0] @ wide[1] > 0.3 > wide[0] @ wide[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 0}, "dim: expected 1 to"), ({"ngrams": (3, 2)}, "ngrams: .*in order"), ({"ngrams": (0, 2)}, "ngrams")],
)
def test_refused_ngrams(options, message):
    with pytest.raises(ValueError, match=f"NgramEmbedder: {message}"):
        NgramEmbedder(**options)


@pytest.fixture
def encoder():
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "policy", "reward", "learns"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=5,
    )  # fmt: skip
    return SentenceEncoder(transformers.BertModel(config), tokenizer, batch_size=2)


def test_sentences_are_the_mean_of_their_tokens(encoder):
    texts = ["a policy learns a reward", "reward", "a policy learns a reward a policy", "policy learns", "a"]
    found = encoder(texts)
    assert found.shape == (5, 8)
    assert not found.requires_grad
    for row, text in zip(found, texts, strict=True):
        # Alone nothing is padded; five words fit the context.
        tokens = encoder.tokenizer(text.split()[:5], is_split_into_words=True, return_tensors="pt")
        mean = encoder.model.eval()(**tokens).last_hidden_state[0].mean(dim=0)
        # Float32 through two layers, in batches of other shapes.
        torch.testing.assert_close(row, (mean / mean.norm()).detach(), rtol=1e-5, atol=1e-6)
    encoder.model.train()
    assert torch.equal(encoder(texts), found)
    assert encoder([]).shape == (0, 8)
    reward = TextEmbeddingReward(encoder, metric="cosine", kind="full", U=1.0)
    assert reward(*[reward.features(["a"])] * 2).item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="SentenceEncoder: batch_size: expected at least 1, got 0"):
        SentenceEncoder(encoder.model, encoder.tokenizer, batch_size=0)


def test_an_encoder_is_loaded_from_a_folder_or_a_package(encoder, tmp_path, monkeypatch):
    package = tmp_path / "an_encoder_for_this_test"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    encoder.model.save_pretrained(package / "model")
    encoder.tokenizer.save_pretrained(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in (package / "model", str(package / "model"), package.name):
        torch.testing.assert_close(SentenceEncoder.load(source)(["a policy"]), encoder(["a policy"]))


def test_an_encoder_of_a_package_that_is_not_installed_names_it():
    with pytest.raises(MissingDependencyError, match="got 'no_such_package': pip install no-such-package"):
        SentenceEncoder.load("no_such_package")


@pytest.mark.parametrize("source", ["no/such/folder", "json", "sys", "."])
def test_an_encoder_that_is_not_there_is_refused(source):
    with pytest.raises(ValueError, match=r"SentenceEncoder.load: path_or_package: expected a folder with config.json"):
        SentenceEncoder.load(source)
