"""Files of texts and of pairs, and the tokens that texts are made of."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from po_bilevel import UsageError
from po_bilevel.language import BytePairTokenizer, Pairs, read_pairs, read_text
from po_bilevel.language.texts import END, answer_tokens, prompt_tokens

WORDS = ["The policy is trained.", "The reward is learned from data: naïve, 東京, 🙂.", "policy reward data"]


def line(prompt="p", answer="a", **more):
    return json.dumps({"prompt": prompt, "answer": answer} | more)


def written(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_pairs_keep_the_order_and_all_answers():
    pairs = Pairs.of([("b", "1"), ("a", "2"), ("b", "3"), ("b", "1")])
    assert pairs == Pairs(("b", "a"), (("1", "3", "1"), ("2",)))
    assert pairs.number == 4
    assert pairs.each() == [("b", "1"), ("b", "3"), ("b", "1"), ("a", "2")]
    assert Pairs.of(pairs.each()) == pairs
    with pytest.raises(ValueError, match="Pairs: expected at least one pair, got none"):
        Pairs.of([])
    with pytest.raises(ValueError, match="Pairs: pair 1: expected an answer, got an empty one"):
        Pairs.of([("a", "b"), ("c", "")])


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_pairs(bom, end, tmp_path):
    """Empty lines, other keys, any unicode, escaped or not, and a separator of lines that is none in JSON."""
    lines = [
        line("1+1=", "2"), "", json.dumps({"answer": "Zürich\u2028東京", "prompt": "é"}, ensure_ascii=False), "  ",
        line("1+1=", "two\nlines", source=3), line("", "an answer to nothing"),
    ]  # fmt: skip
    for last in ("", end):
        path = written(tmp_path, bom + (end.join(lines) + last).encode())
        assert read_pairs(path) == Pairs(
            ("1+1=", "é", ""), (("2", "two\nlines"), ("Zürich\u2028東京",), ("an answer to nothing",))
        )


def test_a_text_is_read_as_it_is_but_for_a_mark_of_its_bytes_order(tmp_path):
    text = "one\r\ntwo\n\n\ttwo and a half\u2028🙂 "
    for bom in (b"", b"\xef\xbb\xbf"):
        assert read_text(written(tmp_path, bom + text.encode())) == text


def test_huge_lines(tmp_path):
    long = "x" * 3_000_000
    assert read_pairs(written(tmp_path, line(answer=long))).answers == ((long,),)
    with pytest.raises(UsageError, match="line 2: expected JSON") as caught:
        read_pairs(written(tmp_path, line() + "\n" + long))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a text, got an empty file"),
        (b" \n\r\n\t", "expected a text, got an empty file"),
        (b"\xef\xbb\xbf", "expected a text, got an empty file"),
        (f"{line()}\n\n{line()[:-1]}", r"pairs\.jsonl, line 3: expected JSON, got"),
        (f"\ufeff{line()}\nnonsense", r"line 2: expected JSON, got 'nonsense'"),
        (f"{line()}\n[1]", r'line 2: expected \{"prompt": text, "answer": text\}, got \'\[1\]\''),
        (f"{line()}\nnull", "line 2: expected .*got 'null'"),
        (f"{line()}\n" + json.dumps({"prompt": "p"}), "line 2: expected .*got"),
        (f"{line()}\n" + line(answer=3), "line 2: expected .*got"),
        (f"{line()}\n" + line(prompt=["p"]), "line 2: expected .*got"),
        (f"{line()}\n" + line(answer=""), "line 2: expected an answer, got an empty one"),
        (f"{line()}\n" + "[" * 100_000, "line 2: expected JSON, got"),
        (f"{line()}\n" + '{"prompt": ' + "1" * 5000 + "}", "line 2: expected JSON, got"),
        (f"{line()}\n" + line(answer="\ud800"), "line 2: expected text, got .*surrogate"),
        (f"{line()}\n" + line(prompt="\udfff!"), "line 2: expected text, got .*surrogate"),
        (line().encode() + b"\n\n" + line().encode()[:-3] + b"\xff", "expected UTF-8 text, got byte 0xff in line 3"),
        (b"\xef\xbb\xbf\n\xe9", "expected UTF-8 text, got byte 0xe9 in line 2"),
        (line().encode("utf-16"), "expected UTF-8 text, got byte 0xff in line 1"),
    ],
)
def test_files_that_are_refused_name_the_line(content, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_pairs(written(tmp_path, content))


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        for read in (read_text, read_pairs):
            with pytest.raises(UsageError, match=f"{path}: expected a file of text, got "):
                read(path)


@pytest.fixture(scope="module")
def tokenizer():
    return BytePairTokenizer.train(WORDS, 280)


def test_the_vocabulary(tokenizer):
    assert tokenizer.vocabulary == 280
    assert 0 <= tokenizer.end < 280
    assert len(tokenizer.encode("policy")) < 6  # a pair of its own
    for vocabulary in (0, 256):
        with pytest.raises(ValueError, match=f"vocabulary: expected at least 257 tokens, got {vocabulary}"):
            BytePairTokenizer.train(WORDS, vocabulary)
    assert BytePairTokenizer.train([], 257).vocabulary == 257


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end not in ids
    assert all(0 <= token < tokenizer.vocabulary for token in ids)
    assert tokenizer.decode([*ids, tokenizer.end]) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 279)))
def test_any_tokens_are_a_text(tokenizer, ids):
    """As a policy may sample them, also such as are no whole characters."""
    assert isinstance(tokenizer.decode(ids), str)


def test_an_end_that_a_text_spells(tokenizer):
    """It ends nothing: it is left out, and no token of a text is the end."""
    for before, after in itertools.product(("", "The "), ("", " policy")):
        ids = tokenizer.encode(f"{before}{END}{after}")
        assert tokenizer.end not in ids
        assert tokenizer.decode(ids) == before + after
    assert tokenizer.decode(tokenizer.encode(END[:-1])) == END[:-1]


def test_tokens_of_prompts_and_answers(tokenizer):
    """An empty prompt is an end, so that there is something to go on from; an answer has one after it."""
    prompts = prompt_tokens(tokenizer, ["The policy", "", END])
    assert prompts.lists() == [tokenizer.encode("The policy"), [tokenizer.end], [tokenizer.end]]
    assert bool(prompts.mask[:, -1].all())
    answers = answer_tokens(tokenizer, ["data", "The reward is learned"])
    assert [tokenizer.decode(ids) for ids in answers.lists()] == ["data", "The reward is learned"]
    assert all(ids[-1] == tokenizer.end for ids in answers.lists())
    assert bool(answers.mask[:, 0].all())
