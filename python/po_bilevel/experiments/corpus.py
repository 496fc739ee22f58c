"""The texts of `po-bilevel text`: what a decoder reads first, and prompts with their answers in three parts."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..language import Pairs, read_pairs, read_text

# Of pairs that are made of a text: the words of a prompt and of an answer, how often a prompt has to be there, and how
# many of its answers are kept.
PROMPT_WORDS, ANSWER_WORDS, LEAST, MOST = 2, 3, 6, 24
# Paragraphs that are kept aside, at most.
KEPT = 64
# Of a prompt's answers: how many of twelve are in the outer and in the test part.
OUTER, TEST = 3, 3


class Corpus(NamedTuple):
    """Texts and pairs of one seed.

    Attributes:
        first: paragraphs to be read first.
        kept: paragraphs of the same text that are not, to see what was forgotten.
        form: pairs of other prompts than the rest, from which a decoder learns what an answer looks like.
        inner, outer, test: pairs.
    """

    first: tuple[str, ...]
    kept: tuple[str, ...]
    form: Pairs
    inner: Pairs
    outer: Pairs
    test: Pairs


def load(text: Path | None, pairs: Path | None, max_prompts: int | None, seed: int) -> Corpus:
    """Reads a text and pairs, those of the standard library's documentation if there are none.

    Without a file of pairs they are made of half of the paragraphs, which are not among those read first. Of more
    prompts than max_prompts a random choice is kept.

    Raises:
        UsageError: a file that cannot be used, or too short a text.
    """
    if text is None:
        from pydoc_data.topics import topics

        found = "\n\n".join(topics.values())
    else:
        found = read_text(text)
    paragraphs = prose(found)
    if len(paragraphs) < 20:
        raise UsageError(f"--text: expected at least 20 paragraphs of prose, got {len(paragraphs)}")
    random.Random(seed).shuffle(paragraphs)
    aside = min(len(paragraphs) // 10, KEPT)
    kept, paragraphs = paragraphs[:aside], paragraphs[aside:]
    if pairs is not None:
        every = read_pairs(pairs)
    else:
        every, paragraphs = continuations(paragraphs[::2]), paragraphs[1::2]
    if max_prompts is not None and max_prompts < len(every.prompts):
        chosen = sorted(random.Random(seed).sample(range(len(every.prompts)), max_prompts))
        every = Pairs(tuple(every.prompts[row] for row in chosen), tuple(every.answers[row] for row in chosen))
    return Corpus(tuple(paragraphs), tuple(kept), *split(every, seed))


def prose(text: str) -> list[str]:
    """Paragraphs that are sentences, each once, their white space made single: no tables, code or grammars."""
    found = dict.fromkeys(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in found if re.match(r"[A-Z][^|+*=>]{40}", part)]


def continuations(paragraphs: Sequence[str]) -> Pairs:
    """Words that are often there, and the words after them: prompts with many answers.

    Raises:
        UsageError: no words are there often enough.
    """
    after: dict[str, list[str]] = {}
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?:])\s+", paragraph):
            words = sentence.split()
            for start in range(len(words) - PROMPT_WORDS - ANSWER_WORDS + 1):
                middle = start + PROMPT_WORDS
                answer = " " + " ".join(words[middle : middle + ANSWER_WORDS])
                after.setdefault(" ".join(words[start:middle]), []).append(answer)
    found = {prompt: answers[:MOST] for prompt, answers in after.items() if len(answers) >= LEAST}
    if len(found) < 4:
        raise UsageError(
            f"--text: expected words that are there {LEAST} times, to make at least 4 prompts, got {len(found)}; give "
            "--pairs"
        )
    return Pairs.of((prompt, answer) for prompt, answers in found.items() for answer in answers)


def split(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs, Pairs, Pairs]:
    """The parts form, inner, outer and test: every fourth prompt is of the first; of the others' answers, where there
    are three, each of the rest has some, else each has some of the prompts.

    Raises:
        UsageError: too few pairs for so many parts.
    """
    draw = random.Random(seed)
    form: list[tuple[str, str]] = []
    parts: tuple[list[tuple[str, str]], ...] = ([], [], [])
    lonely = 0
    for number, prompt in enumerate(draw.sample(range(len(pairs.prompts)), len(pairs.prompts))):
        answers = list(pairs.answers[prompt])
        draw.shuffle(answers)
        if number % 4 == 0:
            form.extend((pairs.prompts[prompt], answer) for answer in answers)
            continue
        if len(answers) < 3:
            # Every fourth such prompt is of the outer part, every fourth of the test part.
            parts[(0, 1, 0, 2)[lonely % 4]].extend((pairs.prompts[prompt], answer) for answer in answers)
            lonely += 1
            continue
        outer, test = (max(1, len(answers) * share // 12) for share in (OUTER, TEST))
        for place, answer in enumerate(answers):
            part = 1 if place < outer else 2 if place < outer + test else 0
            parts[part].append((pairs.prompts[prompt], answer))
    if not all(parts):
        raise UsageError(f"--pairs: expected pairs for four parts, got {pairs.number}")
    first, second, third, fourth = map(Pairs.of, (form, *parts))
    return first, second, third, fourth
