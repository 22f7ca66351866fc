"""Row layouts of other tools, converted to this package's columns.

`standard` converts the layouts of `DIRECT` whenever a file is read, because they can be read in one way only. Those of
`NAMED` need a decision, such as how to show choices, so `posttrain data convert` converts them, by name. Both are dicts
of name → (test, conversion); a conversion raises DataError for a row that it cannot read.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.data.json_rows import decode
from posttrain.types import DataError, Json, JsonView

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}
"""`from` of a ShareGPT turn → role; `function_call` is an assistant's call."""
MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "conversations", "conversation")
"""Columns that may hold a list of messages."""
TEXT_PARTS = ("text", "input_text", "output_text")
ASKED = ("text", "prompt", "question", "problem", "instruction")
REPLIES = ("completion", "output", "answer", "solution", "target", "chosen", "label")
Convert = Callable[[Json], Json]


def standard(values: JsonView) -> tuple[Json, list[str]]:
    """The row in this package's columns, and the names of the layouts that were converted (none for most rows).

    Raises DataError, without the row's place, for a row that is in a known layout but cannot be read.
    """
    row, names = dict(values), list[str]()
    for name in MESSAGE_COLUMNS:
        if isinstance(row.get(name), str | list):
            row[name] = _messages(row[name], name)
    for name, (is_one, convert) in DIRECT.items():
        if is_one(row):
            row = convert(row)
            names.append(name)
    for name in MESSAGE_COLUMNS:
        if isinstance(row.get(name), list):
            row[name] = [_without_parts(entry, name) for entry in row[name]]
    if _is_context(row) and row.get("response") is not None and not any(row.get(n) is not None for n in REPLIES):
        raise DataError(f"the model would not see the column 'context' or 'passage'.{converter_for(row)}")
    return row, names


def converter_for(values: JsonView) -> str:
    """A sentence that names the converter for a row in a layout of `NAMED`, or nothing."""
    name = next((name for name, (is_one, _) in NAMED.items() if is_one(values)), None)
    return f" Or convert the file: posttrain data convert FILE --to FILE --format {name}." if name else ""


def _messages(value: Any, column: str) -> Any:
    """A list that was stored as JSON text; any other text or list as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found: Any = decode(value)
    except ValueError:
        if value.lstrip()[2:].lstrip()[:1] == "'" and ("'role'" in value or "'from'" in value):
            raise DataError(
                f"column {column!r} holds a Python list as text. Write the messages as a JSON list."
            ) from None
        return value
    return found if isinstance(found, list) and all(_is_turn(entry) for entry in found) else value


def _is_turn(entry: Any) -> bool:
    return isinstance(entry, Mapping) and ("role" in entry or {"from", "value"} <= entry.keys())


def _without_parts(entry: Any, column: str) -> Any:
    """A message whose content is text, joined from its text parts. Raises DataError for images and the like."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), list):
        return entry
    parts: list[Any] = entry["content"]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise DataError(f"a message in {column!r} has a part of type {kind!r}; only text can be trained on.")
    return {**entry, "content": "".join(part["text"] for part in parts)}


# --- read directly --------------------------------------------------------------------------------------------------


def _is_sharegpt(row: JsonView) -> bool:
    if any(row.get(name) is not None for name in ASKED):
        return False  # the row is read by that column
    names = ("conversations", "conversation")
    return _spoken(row.get("messages")) or ("messages" not in row and any(_turns(row.get(name)) for name in names))


def _turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_turn(entry) for entry in value)


def _spoken(value: Any) -> bool:
    return _turns(value) and any("from" in entry for entry in value)


def _sharegpt(row: Json) -> Json:
    """`conversations` of `from` and `value` → `messages`, or `prompt` if the row has chosen and rejected replies."""
    column = next(name for name in ("messages", "conversations", "conversation") if _turns(row.get(name)))
    out = {name: value for name, value in row.items() if name != column}
    compared = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    target = "prompt" if compared else "messages"
    out[target] = [_turn(entry, column) for entry in row[column]]
    for name in compared:
        entries = row[name] if isinstance(row[name], list) else [row[name]]
        out[name] = [_turn(e, name) for e in entries] if all(map(_is_turn, entries)) else row[name]
    if "kto_tag" in out and "label" not in out:
        out["label"] = out.pop("kto_tag")
    return out


def _turn(entry: JsonView, column: str) -> Json:
    """A ShareGPT turn as a message; keys other than `from` and `value`, such as `weight`, are kept."""
    if "from" not in entry:
        return dict(entry)
    speaker, value = str(entry["from"]).lower(), entry.get("value")
    rest = {name: other for name, other in entry.items() if name not in ("from", "value")}
    if not isinstance(value, str):
        raise DataError(f"a turn in {column!r} has the value {value!r}, expected text.")
    if speaker == "function_call":
        try:
            calls: Any = decode(value)
        except ValueError as error:
            raise DataError(f"a function_call in {column!r} is not JSON: {error}.") from None
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
            raise DataError(f"a function_call in {column!r} has no name and arguments.")
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call} for call in calls],
            **rest,
        }
    if speaker not in SPEAKERS:
        known = ", ".join([*SPEAKERS, "function_call"])
        raise DataError(f"a turn in {column!r} is from {entry['from']!r}, expected one of {known}.")
    return {"role": SPEAKERS[speaker], "content": value, **rest}


def _is_openai_preference(row: JsonView) -> bool:
    return {"preferred_output", "non_preferred_output"} <= row.keys() and isinstance(row.get("input"), Mapping)


def _openai_preference(row: Json) -> Json:
    given: JsonView = row["input"]
    rest = {k: v for k, v in row.items() if k not in ("input", "preferred_output", "non_preferred_output")}
    more = {k: v for k, v in given.items() if k != "messages"}
    if "messages" not in given:
        raise DataError("`input` has no messages.")
    sides = {"prompt": given["messages"], "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {**rest, **more, **sides}


def _is_openai_batch(row: JsonView) -> bool:
    return "custom_id" in row and any(isinstance(row.get(name), Mapping) for name in ("response", "body"))


def _openai_batch(row: Json) -> Json:
    if "body" not in row:
        raise DataError(
            "the row is a result of OpenAI's batch API, which holds a reply without its question. Join it with the "
            "requests by custom_id."
        )
    body: JsonView = row["body"]
    if "messages" not in body:
        raise DataError(f"the batch request has no messages; its body has {', '.join(body)}.")
    rest = {k: v for k, v in row.items() if k not in ("body", "method", "url")}
    settings = {k: v for k, v in body.items() if k not in ("messages", "tools")}
    tools = {"tools": body["tools"]} if body.get("tools") else {}
    return {**rest, "messages": body["messages"], **tools, "request": settings}


def _is_openai_reinforcement(row: JsonView) -> bool:
    asked = _turns(row.get("messages")) and row["messages"][-1].get("role") == "user"
    return asked and row.get("reference_answer") is not None and row.get("answer") is None


def _openai_reinforcement(row: Json) -> Json:
    return {**row, "answer": row["reference_answer"]}


def _is_verl(row: JsonView) -> bool:
    model = row.get("reward_model")
    return isinstance(model, Mapping) and "ground_truth" in model and "prompt" in row


def _verl(row: Json) -> Json:
    """`reward_model.ground_truth` → `answer`; all columns stay, for rewards that ask for them."""
    model: JsonView = row["reward_model"]
    if row.get("answer") not in (None, model["ground_truth"]):
        raise DataError("the row has both an answer and another reward_model.ground_truth. Remove one of them.")
    return {**row, "answer": model["ground_truth"]}


DIRECT: dict[str, tuple[Callable[[JsonView], bool], Convert]] = {
    "sharegpt": (_is_sharegpt, _sharegpt),
    "openai-preference": (_is_openai_preference, _openai_preference),
    "openai-batch": (_is_openai_batch, _openai_batch),
    "openai-reinforcement": (_is_openai_reinforcement, _openai_reinforcement),
    "verl": (_is_verl, _verl),
}
"""Layouts that are converted when a file is read."""


# --- converted on request -------------------------------------------------------------------------------------------


def _choices(row: Json) -> Json:
    """Multiple choice (MMLU, ARC, CommonsenseQA): the choices follow the question, and the answer is a letter."""
    given = row["choices"]
    texts: list[Any] = list(given.get("text") or []) if isinstance(given, Mapping) else list(given)
    labels = (
        list(given.get("label") or []) if isinstance(given, Mapping) else list(string.ascii_uppercase[: len(texts)])
    )
    answer = next((row[n] for n in ("answer", "answerKey", "label") if row.get(n) is not None), None)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(labels):
        answer = labels[answer]
    elif answer in texts and answer not in labels:
        answer = labels[texts.index(answer)]
    if not 2 <= len(texts) == len(labels) or answer not in labels:
        raise DataError(f"the answer {answer!r} is none of the {len(texts)} choices: their letters, texts or indices.")
    question = row.get("question") or row.get("prompt")
    shown = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    rest = {k: v for k, v in row.items() if k not in ("question", "prompt", "answer", "answerKey", "label")}
    return {**rest, "question": f"{question}\n\n{shown}", "answer": answer}


def _is_choices(row: JsonView) -> bool:
    asked = isinstance(row.get("question") or row.get("prompt"), str)
    return asked and isinstance(row.get("choices"), list | Mapping)


def _is_context(row: JsonView) -> bool:
    about = any(isinstance(row.get(name), str) and row[name].strip() for name in ("context", "passage"))
    return about and any(isinstance(row.get(name), str) for name in ("question", "instruction", "prompt"))


def _context(row: Json) -> Json:
    """A text and a question about it (SQuAD, BoolQ, Dolly): the text comes first; the first of `answers` is gold."""
    about = next(name for name in ("context", "passage") if row.get(name))
    asked = next(name for name in ("question", "instruction", "prompt") if row.get(name) is not None)
    out = {k: v for k, v in row.items() if k not in (about, asked, "answers", "response", "answer")}
    out["prompt"] = f"{row[about]}\n\n{row[asked]}"
    answers = row.get("answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if row.get("response") is not None:
        out["completion"] = row["response"]
    elif row.get("answer") is not None:
        found = row["answer"]
        out["answer"] = {True: "yes", False: "no"}[found] if isinstance(found, bool) else found
    elif isinstance(answers, list) and answers:
        out["answer"] = answers[0]
    elif not any(row.get(name) is not None for name in REPLIES):
        raise DataError("the row has no answer, answers or response.")
    return out


def _is_better(row: JsonView) -> bool:
    return {"response_0", "response_1"} <= row.keys() and "better_response_id" in row


def _better(row: Json) -> Json:
    """Two responses and the index of the better one (PKU-SafeRLHF)."""
    better = row["better_response_id"]
    if isinstance(better, bool) or better not in (0, 1):
        raise DataError(f"better_response_id={better!r}, expected 0 or 1.")
    rest = {k: v for k, v in row.items() if k not in ("response_0", "response_1", "better_response_id")}
    return {**rest, "chosen": row[f"response_{better}"], "rejected": row[f"response_{1 - better}"]}


def _is_ranked(row: JsonView) -> bool:
    entries = row.get("completions")
    return (
        isinstance(entries, list)
        and bool(entries)
        and all(isinstance(e, Mapping) and "response" in e and "overall_score" in e for e in entries)
    )


def _ranked(row: Json) -> Json:
    """Several scored completions of one instruction (UltraFeedback): the best against the worst."""
    ordered = sorted(row["completions"], key=lambda entry: float(entry["overall_score"]))
    low, high = ordered[0], ordered[-1]
    if float(low["overall_score"]) == float(high["overall_score"]):
        raise DataError("all completions have the same overall_score, so none is better. Remove the row.")
    scores = {"score_chosen": float(high["overall_score"]), "score_rejected": float(low["overall_score"])}
    rest = {k: v for k, v in row.items() if k not in ("completions", "instruction", "prompt")}
    prompt = row.get("instruction", row.get("prompt"))
    return {**rest, "prompt": prompt, "chosen": high["response"], "rejected": low["response"], **scores}


def _is_turn_pairs(row: JsonView) -> bool:
    entries = row.get("conversation")
    return (
        isinstance(entries, list)
        and bool(entries)
        and all(isinstance(e, Mapping) and {"input", "output"} <= e.keys() for e in entries)
    )


def _turn_pairs(row: Json) -> Json:
    """`conversation` of `input` and `output` (Capybara) → `messages`."""
    messages: list[Json] = []
    for entry in row["conversation"]:
        messages += [{"role": "user", "content": entry["input"]}, {"role": "assistant", "content": entry["output"]}]
    return {**{k: v for k, v in row.items() if k != "conversation"}, "messages": messages}


def _is_input_output(row: JsonView) -> bool:
    return all(isinstance(row.get(name), str) for name in ("input", "output")) and not any(
        row.get(name) is not None for name in ("instruction", "prompt", "question", "messages", "text", "chosen")
    )


def _input_output(row: Json) -> Json:
    rest = {k: v for k, v in row.items() if k not in ("input", "output")}
    return {**rest, "prompt": row["input"], "completion": row["output"]}


NAMED: dict[str, tuple[Callable[[JsonView], bool], Convert]] = {
    "choices": (_is_choices, _choices),
    "context": (_is_context, _context),
    "better-response": (_is_better, _better),
    "scored-completions": (_is_ranked, _ranked),
    "input-output-turns": (_is_turn_pairs, _turn_pairs),
    "input-output": (_is_input_output, _input_output),
}
"""Layouts that only `posttrain data convert --format` converts."""
