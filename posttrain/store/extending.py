"""Extends a run to more steps."""

from __future__ import annotations

from posttrain import config
from posttrain.store.run import Event, Run
from posttrain.types import ConfigError


def extend(store: Run, steps: int) -> None:
    """Raises `train.steps` of a run to `steps`, and notes it; a run that ended early may also get fewer than planned.

    Raises ConfigError if `steps` is no more than it has trained, or planned unless it ended early.
    """
    header, summary = store.header, store.summary() or {}
    train = config.as_dict(config.stored(header["algorithm"], header["recipe"]))["train"]
    planned, trained, ended = train["steps"], store.last_step() or 0, summary.get("ended", "")
    if steps == planned and not ended:
        return
    if steps <= (trained if ended else max(planned, trained)):
        why = f"ended after {trained} steps" if ended else f"has trained {trained} steps"
        raise ConfigError(
            f"train.steps={steps} does not extend {store.folder}, which plans {planned or 'whole passes'} and {why}. "
            f"{ended} Give more.".replace("  ", " ")
        )
    train |= {"steps": steps} | ({"epochs": 1} if "epochs" in train else {})
    recipe = {**header["recipe"], "train": train}
    store.extend({**header, "recipe": recipe, "extended_at": trained})
    note = f"train.steps was {planned or 'not set'}, is {steps}."
    if ended:
        note += f" The run had ended after step {trained}, and what ended it is counted anew. {ended}"
    store.note(trained, Event("info", "extended", note))
