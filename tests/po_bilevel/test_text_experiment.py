"""`po-bilevel text`: the exact experiment against its closed form, the corpus, and a quick run of the command."""

import json

import pytest
import torch
from po_bilevel import UsageError
from po_bilevel.cli import main
from po_bilevel.experiments import corpus, enumerable, text
from po_bilevel.language import Pairs


def test_the_learned_reward_of_enumerable_policies_is_the_one_that_made_the_data():
    """FisherCG and MomentMatching, each hypergradient on the way against autograd through log p* itself."""
    rows = enumerable.run(0.1, seeds=3, first_seed=10).rows
    assert {row["method"] for row in rows} == {"pg_learned_fisher", "pg_learned_moments"}
    for row in rows:
        assert row["u_error"] < 1e-6
        assert row["hypergradient_error"] < 1e-8
    assert min(row["cosine"] for row in rows if row["cosine"] is not None) >= 0.98


def test_the_policy_at_its_table_is_the_tilted_reference():
    problem = enumerable.Enumerable(0.1, seed=3)
    reward = enumerable.MahalanobisReward(enumerable.DIM, "diagonal", problem.true)
    # By brute force: exp(r/β) over all strings, divided by its sum.
    each = torch.exp(-((problem.embedding[:, None] - problem.answer) ** 2 * problem.true).sum(-1) / 0.1)
    torch.testing.assert_close(problem.log_prob((problem.theta(reward),)).exp(), each / each.sum(0))


def test_a_text_becomes_prompts_and_answers_that_are_not_read_first():
    found = corpus.load(None, None, None, seed=0)
    again = corpus.load(None, None, None, seed=0)
    assert found == again
    assert found != corpus.load(None, None, None, seed=1)
    assert not set(found.first) & set(found.kept)
    # An answer stands in the text after its prompt, and not among what was read first.
    prompt, answers = found.inner.prompts[0], found.inner.answers[0]
    assert len(prompt.split()) == corpus.PROMPT_WORDS
    assert all(len(answer.split()) == corpus.ANSWER_WORDS for answer in answers)
    assert not set(found.form.prompts) & set(found.inner.prompts)
    assert set(found.test.prompts) == set(found.inner.prompts) == set(found.outer.prompts)
    few = corpus.load(None, None, 12, seed=0)
    assert len(few.form.prompts) + len(few.inner.prompts) == 12


def test_pairs_with_one_answer_are_split_by_prompt():
    pairs = Pairs.of((f"q{i}", f"a{i}") for i in range(16))
    parts = corpus.split(pairs, seed=0)
    assert sorted(prompt for part in parts for prompt in part.prompts) == sorted(pairs.prompts)
    assert [part.number for part in parts] == [4, 6, 3, 3]
    with pytest.raises(UsageError, match="--pairs: expected pairs for four parts, got 2"):
        corpus.split(Pairs.of([("a", "b"), ("c", "d")]), seed=0)


def test_a_short_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One paragraph that is long enough to count as one, and ends.\n")
    with pytest.raises(UsageError, match="--text: expected at least 20 paragraphs of prose, got 1"):
        corpus.load(path, None, None, seed=0)
    path.write_text("\n\n".join("W" + " w".join(f"{i}x{j}" for j in range(12)) for i in range(40)))
    with pytest.raises(UsageError, match="make at least 4 prompts, got 0; give --pairs"):
        corpus.load(path, None, None, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "30"], "--width: expected a multiple of 4, got 30"),
        (["--vocabulary", "100"], "--vocabulary: expected at least 257, got 100"),
        (["--exact"], "--quick: expected none with --exact, got True"),
        (["--group", "1"], "--group: expected at least 2, got 1"),
        (["--text", "/nowhere/text.txt"], "expected a file of text, got No such file"),
        (["--pairs", "{pairs}"], "line 2: expected JSON"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "answer": "b"}\nnot JSON\n')
    options = [option.format(pairs=pairs) for option in options]
    assert main(["text", "--quick", "--no-plot", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_quick_run_keeps_the_options_that_are_given(tmp_path, capsys, monkeypatch):
    def seen(config, seed):
        raise UsageError(f"{config.width}, {config.layers}, {config.seeds}, {seed}")

    monkeypatch.setattr(text, "Task", seen)
    assert main(["text", "--quick", "--width", "16", "--first-seed", "3", "--no-plot", "--out", str(tmp_path)]) == 2
    assert "16, 1, 1, 3" in capsys.readouterr().err


def test_a_pair_that_is_too_long_for_attention_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": "a b" * i**3}) + "\n" for i in range(1, 16)))
    with pytest.raises(UsageError, match=r"--pairs: expected .* less than 1024 tokens, got .* with the prompt 'q15'"):
        text.Task(text.TextConfig(pairs=path, vocabulary=257), 0)


def test_a_quick_run_of_the_command(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"The number {i} is", "answer": f" {word}"} for i in range(12) for word in ("even", "odd", "big")
    ]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    assert main(["text", "--quick", "--pairs", str(pairs), "--out", str(tmp_path / "out")]) == 0
    assert "advantages under the closed-form trace differ" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in document["rows"]] == list(text.TextConfig().methods)
    assert all(row["dataset"] == "pairs.jsonl" for row in document["rows"])
    metrics = {"nll_token", "distance", "exact_match", "nll_first", "kl", "seconds"}
    assert all(metrics <= set(row) for row in document["rows"])
    assert document["config"] | text.QUICK == document["config"]  # what was used
    assert (tmp_path / "out" / "text.png").exists()
    scale = json.loads((tmp_path / "out" / "curves.json").read_text())["scales"][0]
    # ε of the standard deviation is all that the scale is seen by; with loo advantages go with U.
    u = {row["method"]: row["u"] for row in document["rows"]}
    assert scale["standardized"] < 1e-3
    assert scale["loo"] == pytest.approx(u["pg_trace"] / u["pg_identity"], rel=1e-4)
