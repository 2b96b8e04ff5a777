"""One thing changed by degrees: towards the prompt with a few words more, or towards what weights were taught.

A new slider needs two descriptions and no labels; or it is learnt and lies in a LoRA file (`facegen train slider`). A
model may bring such files for what its words cannot do (skin is the person's own, so an adapter overrules the words).
Strength 1 goes as far as if the words had been written into the prompt, but only where they act most: see
`facegen.models.slid`. Strength 0 is the plain run. The words come behind the prompt, for a text encoder that reads
from left to right leaves all that stands before them as it was; two whole sentences instead differ word by word, and
their difference moves much besides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from facegen.checkpoints import SAFE
from facegen.conditions import LoraCondition, Pair, TextCondition
from facegen.errors import WrongRequest
from facegen.models.slid import PAIRS, WORDS, Slide

# name → (what more of it is called behind a prompt, what less of it is; "": away from more)
SLIDERS: Mapping[str, tuple[str, str]] = {
    "smile": ("smiling", "sad"),
    "surprise": ("surprised", "neutral expression"),
    "anger": ("angry", "neutral expression"),
    "mouth_open": ("with an open mouth", "with a closed mouth"),
    "age": ("old", "young"),
    "masculine": ("a man", "a woman"),
    "skin": ("with dark skin", "with light skin"),
    "beard": ("with a full beard", ""),
    "hair_length": ("with long straight hair", "with short hair"),
    "curls": ("with curly hair", "with long straight hair"),
    "blond": ("with blond hair", "with black hair"),
    "gray_hair": ("with gray hair", "with brown hair"),
    "glasses": ("wearing glasses", ""),
    "make_up": ("with lipstick and eye makeup", ""),
    "turn": ("turned to the right", "turned to the left"),
    "gaze": ("looking to the right", "looking to the left"),
}
APART = "|"
WHOLE = 1.0  # from here on a slider goes as far as its words would, were they in the prompt
Encode = Callable[[str], TextCondition]


def files(sliders: Mapping[str, float], own: Path | None = None) -> dict[str, float]:
    """Those of the sliders that are weights in a file, not words: files by their ending, and names of sliders for which
    a model brings weights of its own, as loras/<name>.safetensors in the folder `own`.
    """
    return {name: strength for name, strength in sliders.items() if Path(name).suffix == SAFE or _brought(name, own)}


def _brought(name: str, own: Path | None) -> bool:
    return own is not None and name in SLIDERS and (own / "loras" / f"{name}{SAFE}").is_file()


def words(name: str) -> tuple[str, str]:
    """What a slider by name, or one given as `more of it|less of it`, puts behind a prompt; raises WrongRequest."""
    if name in SLIDERS:
        return SLIDERS[name]
    more, apart, less = (part.strip() for part in name.partition(APART))
    if not apart or not more or not less:
        raise WrongRequest(
            f"There is no slider '{name}'; there are: {', '.join(SLIDERS)}; or give two descriptions as"
            f" 'more{APART}less', or the {SAFE} file of one that was learnt."
        )
    return more, less


def asked(prompt: str, sliders: Mapping[str, float], own: Path | None = None) -> str:
    """A prompt with what the sliders ask for, too: the words of those that go the whole way by words.

    own: as in `files`; what weights do is often not what the words say (the words of `gaze` turn the head).
    Raises WrongRequest as `words` does.
    """
    told = [
        words(name)[strength < 0]
        for name, strength in sliders.items()
        if abs(strength) >= WHOLE and name not in files(sliders, own)
    ]
    return ", ".join(filter(None, (prompt, *told)))


def by_pairs(path: Path) -> bool:
    """Whether a learnt slider's file says that pictures taught it (`facegen train slider --pairs`)."""
    if path.suffix != SAFE:
        return False
    with safe_open(path, framework="pt") as file:
        return "pairs" in (file.metadata() or {})


def slides(
    encode: Encode,
    prompt: str,
    text: TextCondition,
    sliders: Mapping[str, float],
    learnt: Mapping[str, LoraCondition],
    pairs: Collection[str] = (),
) -> list[Slide]:
    """What the sliders of a run do, for `facegen.models.slid.Slid`; [] where none has a strength.

    encode: the run's own reading of a prompt; text: the last prompt of the run, which an adapter may have written: it
    is moved as the words move `prompt`. learnt: the weights of the sliders that are files, by name;
    pairs: those of them that pictures taught.
    Raises WrongRequest for a slider that does not exist, and for a prompt that leaves no room for its words.
    """
    found, plain = [], None
    for name, strength in sliders.items():
        if name in learnt:
            limits = PAIRS if name in pairs else WORDS
            found += [Slide(replace(learnt[name], scale=strength), limits=limits)] if strength else []
            continue
        more, less = words(name)
        if not strength:
            continue
        told = less if strength < 0 and less else more
        plain = plain or encode(prompt)
        there = encode(f"{prompt}, {told}" if prompt else told)
        if there.embeds.shape != plain.embeds.shape or bool((there.embeds == plain.embeds).all()):
            raise WrongRequest(f"The prompt leaves no room for the words of the slider {name} ('{told}'); shorten it.")
        found.append(Slide(_moved(text, plain, there), strength if told == more else -strength))
    return found


def _moved(text: TextCondition, plain: TextCondition, there: TextCondition) -> TextCondition:
    """A prompt moved as from `plain` to `there`, which it then is where it was `plain`."""
    if text.at is None and text.embeds.shape == plain.embeds.shape and bool((text.embeds == plain.embeds).all()):
        return there
    step = _step(plain.embeds, there.embeds)
    pooled = text.pooled
    if pooled is not None and plain.pooled is not None and there.pooled is not None:
        pooled = pooled + _step(plain.pooled, there.pooled).to(pooled)
    at = text.at
    return replace(
        text,
        embeds=text.embeds + step.to(text.embeds),
        pooled=pooled,
        at=None if at is None else lambda steps: (pair := at(steps)) + step.to(pair),
    )


def _step(plain: Pair, there: Pair) -> Tensor:
    """From one pair to the other in the conditional half, (2, 1, …)."""
    step = there - plain
    step[0] = 0
    return step
