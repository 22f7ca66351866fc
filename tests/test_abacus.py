"""The shipped model, its problems and its corpus."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data.tasks.abacus import GENERATORS, held_out, problems
from posttrain.models.abacus import PATH, build
from posttrain.models.abacus.corpus import documents, render, work

FACTS = json.loads((PATH / "build.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201 - the library's tokenizer types are not ours to name
    return AutoTokenizer.from_pretrained(PATH)


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_problems_are_distinct_repeatable_and_split(kind: str) -> None:
    train, test = problems(kind, 12, 5, "train"), problems(kind, 12, 5, "test")
    assert train == problems(kind, 12, 5, "train")
    assert len({problem.id for problem in train}) == 12
    assert not any(held_out(problem) for problem in train)
    assert all(held_out(problem) for problem in test)
    assert all(problem.meta["kind"] == problem.kind and problem.meta["skill"] == problem.skill for problem in test)


def test_rewordings_share_a_split() -> None:
    splits: dict[str, set[bool]] = {}
    for kind in GENERATORS:
        rng = random.Random(0)
        for _ in range(500):
            problem = GENERATORS[kind](rng)
            splits.setdefault(problem.id.partition("#")[0], set()).add(held_out(problem))
    assert all(len(split) == 1 for split in splits.values())


@pytest.mark.parametrize(
    ("kind", "count", "split", "message"),
    [
        ("riddles", 1, "train", "expected one of"),
        ("sums", 1, "dev", "expected 'train' or 'test'"),
        ("list", 100, "test", "Ask for fewer"),
    ],
)
def test_impossible_requests_say_why(kind: str, count: int, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems(kind, count, 0, split)  # pyright: ignore[reportArgumentType]


def test_corpus_is_repeatable_and_holds_no_held_out_problem() -> None:
    texts = list(documents(3, 300_000))
    assert texts == list(documents(3, 300_000))
    corpus = "".join(texts)
    for kind in GENERATORS:
        for problem in problems(kind, 12, 1, "test"):
            assert problem.prompt not in corpus
            question = problem.prompt.removeprefix("What is ").removesuffix("?")
            assert f">{question}:" not in corpus


def test_work_without_noise_is_right() -> None:
    for problem in problems("arithmetic", 200, 0, "train"):
        steps, total = work(problem, 0.0, random.Random(0))
        assert total == int(problem.answer)
        assert steps.endswith(f"={total}")


def test_shipped_files_are_those_that_were_built() -> None:
    weights = PATH / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == FACTS["model_sha256"]
    assert hashlib.sha256((PATH / "tokenizer.json").read_bytes()).hexdigest() == FACTS["tokenizer_sha256"]
    corpus = "".join(documents(FACTS["seed"], build.CHARACTERS))
    assert hashlib.sha256(corpus.encode()).hexdigest() == FACTS["corpus_sha256"]


def test_special_tokens(tokenizer) -> None:  # noqa: ANN001
    names = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(8))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("<bos><user>hi<eos><think>1</think>2")["input_ids"]
    assert ids.count(1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<think>1</think>2"


@pytest.mark.parametrize("text", ["naïve 漢字 🙂", "12345", " a  b\n\tc ", "it's, well; (fine)!", "\x00\x7f"])
def test_any_text_survives_and_digits_stand_alone(tokenizer, text: str) -> None:  # noqa: ANN001
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(
        len(token) == 1 for token in tokenizer.convert_ids_to_tokens(ids) if any(c in "0123456789" for c in token)
    )


def test_chat_template_is_the_corpus_format_and_grows_by_prefixes(tokenizer) -> None:  # noqa: ANN001
    pairs = [("system", "Be brief. "), ("user", " What is 2*3?"), ("assistant", "6"), ("user", "Why?\n")]
    messages = [{"role": role, "content": content} for role, content in pairs]

    def text(part: Sequence[dict[str, str]], generate: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=generate)

    assert text(messages) == render(pairs)
    for k in range(1, len(messages)):
        assert text(messages[: k + 1]).startswith(text(messages[:k]))
    assert text(messages[:3]).startswith(text(messages[:2], generate=True) + "6")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text(messages, generate=True))["input_ids"]
    assert ids.count(1) == 1 and ids[-1] == 4
    with pytest.raises(Exception, match="abacus knows the roles"):
        text([{"role": "tool", "content": "x"}])


def test_model_answers_in_its_own_format(tokenizer) -> None:  # noqa: ANN001
    model: Any = AutoModelForCausalLM.from_pretrained(PATH)
    assert sum(p.numel() for p in model.parameters()) == FACTS["parameters"] <= 3_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Opening the thought for it, greedily: its arithmetic is meant to be there from the start.
    right = 0
    for problem in problems("sums", 16, 2, "test"):
        prompt = render([("user", problem.prompt)]) + "<assistant><think>"
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**batch, do_sample=False, temperature=None, max_new_tokens=60)
        right += tokenizer.decode(out[0]).endswith(f"</think>{problem.answer}<eos>")
    assert right >= 12


def test_build_writes_a_loadable_model_and_is_repeatable(tmp_path) -> None:  # noqa: ANN001
    threads = torch.get_num_threads()
    try:
        first = build.build(tmp_path / "a", 1, lambda _: None, characters=30_000, seed=1)
        second = build.build(tmp_path / "b", 1, lambda _: None, characters=30_000, seed=1)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == build.TEMPLATE
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")
