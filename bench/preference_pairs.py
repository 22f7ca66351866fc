"""Samples the pairs for the lab's preference explorer: two different abacus completions for each task.

    python -m bench.preference_pairs

writes posttrain/lab/explore/preference-pairs.json in about half a minute. Nothing in the file is written by hand.
"""

from __future__ import annotations

import json
import random
from typing import Any

from bench.environment import ROOT
from posttrain.data.answers import final_part
from posttrain.pipelines.labeler import Preferences, paired, passes

FILE = ROOT / "posttrain" / "lab" / "explore" / "preference-pairs.json"
TASKS = {"requests": 80, "safety": 60, "instructions": 40}


def made(seed: int = 0) -> dict[str, Any]:
    """The file's content: how the pairs were made, and the pairs, shuffled so that the tasks mix."""
    pairs: list[dict[str, Any]] = []
    for tasks, count in TASKS.items():
        for pair in paired(Preferences(tasks=tasks, count=count, samples=6, max_tokens=96, seed=seed)):
            texts = [pair.first, pair.second]
            if all(final_part(text) == text.strip() for text in texts):  # completions without a thought
                verdicts = [passes(pair.task, text) for text in texts]
                pairs.append({"prompt": pair.task.prompt, "answers": texts, "passes": verdicts})
    pairs = list({pair["prompt"]: pair for pair in pairs}.values())
    random.Random(seed).shuffle(pairs)
    return {"model": "abacus", "temperature": 1.0, "seed": seed, "tasks": TASKS, "pairs": pairs}


def main() -> None:
    """Writes preference-pairs.json."""
    content = made()
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"Wrote {len(content['pairs'])} pairs to {FILE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
