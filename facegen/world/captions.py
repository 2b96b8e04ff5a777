"""Captions: what a person might write about a picture of the face world, never more than is true of it.

``caption(scenes, generator)`` gives one sentence a picture, of varied order, wording and length. Facts, their truth and
their reading from a prompt live in ``facts`` and ``words`` and can be had from here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from facegen.world.dice import Dice
from facegen.world.facts import (
    FACTS,
    LOOSE,
    UNKNOWN,
    UNSEEN,
    Fact,
    accepted,
    describe,
    fact_holds,
    labels,
    probability,
    seen_facts,
)
from facegen.world.parameters import Scenes
from facegen.world.sampling import named_generator
from facegen.world.wordings import RESERVED, told_freely
from facegen.world.words import known_words, parse_prompt

__all__ = [
    "FACTS",
    "LOOSE",
    "UNKNOWN",
    "Fact",
    "accepted",
    "caption",
    "captions_for",
    "describe",
    "fact_holds",
    "labels",
    "parse_prompt",
    "probability",
    "say",
    "seen_facts",
    "vocabulary",
]

# -- wording; {c} is a colour and a space, or nothing ---------------------------------------------------------------

_BEGINNINGS = (
    "photo of", "portrait of", "a photo of", "a portrait of", "picture of", "headshot of", "close up portrait of", "",
)  # fmt: skip
_NOUNS: Mapping[str, tuple[str, ...]] = {
    "woman": ("woman", "woman", "woman", "lady"),
    "man": ("man", "man", "man", "guy", "gentleman"),
    "": ("person", "person", "adult"),
}
_AGES: Mapping[str, tuple[str, ...]] = {
    "young": ("young", "young", "youthful"),
    "middle-aged": ("middle-aged", "middle-aged", "mature"),
    "old": ("old", "elderly", "senior"),
}
_COLORS: Mapping[str, tuple[str, ...]] = {"gray": ("gray", "grey"), "blond": ("blond", "blonde")}
_HAIR: Mapping[str, tuple[str, ...]] = {
    "buzz cut": ("a {c}buzz cut",),
    "short": ("short {c}hair",),
    "side part": ("a {c}side part", "short {c}hair", "{c}hair with a side part"),
    "quiff": ("a {c}quiff", "short {c}hair", "a {c}pompadour"),
    "bob": ("a {c}bob", "a {c}bob cut", "{c}hair in a bob"),
    "bangs": ("{c}bangs", "{c}hair with bangs", "a {c}fringe"),
    "long straight": ("long straight {c}hair", "long {c}hair", "long, straight {c}hair"),
    "long wavy": ("long wavy {c}hair", "long {c}hair", "wavy {c}hair", "long, wavy {c}hair"),
    "curly": ("curly {c}hair", "{c}curls", "curly {c}hair"),
    "afro": ("a {c}afro", "a {c}afro hairstyle"),
    "bun": ("{c}hair in a bun", "a {c}bun", "a {c}hair bun"),
    "ponytail": ("a {c}ponytail", "{c}hair in a ponytail", "long {c}hair"),
}
_GLASSES: Mapping[str, tuple[str, ...]] = {
    "round": ("round glasses", "glasses", "round eyeglasses"),
    "square": ("square glasses", "glasses", "rectangular glasses"),
    "sunglasses": ("sunglasses", "dark glasses", "sunglasses"),
}
_HATS: Mapping[str, tuple[str, ...]] = {
    "beanie": ("a {c}beanie", "a {c}knit hat", "a {c}hat"),
    "cap": ("a {c}cap", "a {c}baseball cap", "a {c}hat"),
}
_CLOTHES: Mapping[str, tuple[str, ...]] = {
    "t-shirt": ("a {c}t-shirt", "a {c}tee"),
    "shirt": ("a {c}shirt", "a {c}button-up shirt"),
    "turtleneck": ("a {c}turtleneck", "a {c}turtleneck sweater"),
    "hoodie": ("a {c}hoodie", "a {c}hooded sweatshirt"),
    "suit": ("a {c}suit", "a {c}suit and tie", "a {c}jacket"),
}
_BACKGROUNDS: Mapping[str, tuple[str, ...]] = {
    "plain": ("plain {c}background", "{c}background", "simple {c}background"),
    "gradient": ("{c}gradient background", "{c}background"),
    "bokeh": ("blurry {c}background", "{c}bokeh background", "{c}bokeh lights"),
    "stripes": ("striped {c}background", "{c}striped background", "{c}stripes background"),
}
# Features one has ("with …"), by fact.
_HAVING: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("beard", "yes"): ("a beard", "a full beard", "a beard"),
    ("goatee", "yes"): ("a goatee", "a chin beard", "a goatee"),
    ("moustache", "yes"): ("a moustache", "a mustache"),
    ("stubble", "yes"): ("stubble", "a five o'clock shadow", "stubble"),
    ("freckles", "yes"): ("freckles",),
    ("earrings", "yes"): ("earrings",),
    ("lipstick", "yes"): ("lipstick",),
    ("eye_makeup", "yes"): ("eye makeup", "eyeshadow", "eyeliner"),
    ("skin", "light"): ("light skin", "pale skin", "fair skin"),
    ("skin", "medium"): ("tanned skin", "olive skin"),
    ("skin", "dark"): ("dark skin", "dark skin", "black skin"),
    ("eye_color", "brown"): ("brown eyes", "dark eyes"),
    ("eye_color", "hazel"): ("hazel eyes",),
    ("eye_color", "green"): ("green eyes",),
    ("eye_color", "blue"): ("blue eyes",),
    ("eye_color", "gray"): ("gray eyes", "grey eyes"),
    ("eyes", "closed"): ("eyes closed", "closed eyes"),
    ("mouth", "open"): ("an open mouth", "mouth open"),
    ("mouth", "closed"): ("a closed mouth",),
    ("glasses", "none"): ("no glasses",),
    ("hat", "none"): ("no hat",),
    ("beard", "no"): ("no beard",),
    ("moustache", "no"): ("no moustache",),
}
# Words for what a face does, after a comma or before the noun.
_DOING: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("expression", "neutral"): ("neutral expression", "serious", "calm", "neutral face"),
    ("expression", "smiling"): ("smiling", "smiling", "happy", "grinning", "cheerful"),
    ("expression", "laughing"): ("laughing", "laughing", "smiling", "happy"),
    ("expression", "sad"): ("sad", "unhappy", "frowning"),
    ("expression", "angry"): ("angry", "furious", "scowling"),
    ("expression", "surprised"): ("surprised", "shocked", "astonished"),
    ("expression", "disgusted"): ("disgusted", "grimacing"),
    ("expression", "worried"): ("worried", "scared", "afraid", "anxious"),
    ("expression", "kissing"): ("kissing", "pouting", "blowing a kiss", "puckered lips"),
    ("expression", "puffed cheeks"): ("puffing cheeks", "puffed cheeks", "puffing out the cheeks"),
    ("eyes", "winking"): ("winking", "one eye closed"),
    ("looking", "left"): ("looking left", "looking to the left", "turned to the left", "facing left"),
    ("looking", "right"): ("looking right", "looking to the right", "turned to the right", "facing right"),
    ("looking", "ahead"): ("looking at the camera", "facing the camera", "front view"),
    ("tilt", "up"): ("looking up",),
    ("tilt", "down"): ("looking down",),
    ("light", "left"): ("lit from the left", "light from the left"),
    ("light", "right"): ("lit from the right", "light from the right"),
    ("light", "front"): ("lit from the front",),
    ("light_color", "warm"): ("warm light", "golden light", "warm lighting"),
    ("light_color", "cool"): ("cool light", "cold light", "cool lighting"),
}
_ADJECTIVES = frozenset({
    "smiling", "happy", "grinning", "cheerful", "laughing", "sad", "unhappy", "angry", "furious", "surprised",
    "shocked", "disgusted", "worried", "scared", "anxious", "serious", "calm", "winking",
})  # fmt: skip

# How often a fact that is true is worth a mention, against the others that are true of the picture; 1 if not here.
_WORTH: Mapping[str, float] = {
    "hair": 4.0, "expression": 3.0, "glasses": 2.5, "hat": 2.5, "clothes": 1.8, "background": 1.8, "beard": 2.0,
    "goatee": 2.0, "moustache": 1.6, "stubble": 1.5, "eyes": 2.5, "looking": 1.2, "tilt": 1.2, "light": 0.5,
    "skin": 0.5, "eye_color": 0.6, "freckles": 0.8, "earrings": 1.2, "lipstick": 1.2,
    "eye_makeup": 1.0, "mouth": 0.35,
}  # fmt: skip
_DULL: Mapping[tuple[str, str], float] = {
    ("glasses", "none"): 0.12, ("hat", "none"): 0.08, ("beard", "no"): 0.06, ("moustache", "no"): 0.03,
    ("light", "front"): 0.12, ("looking", "ahead"): 0.5, ("expression", "neutral"): 1.4, ("mouth", "closed"): 0.08,
}  # fmt: skip
_COUNTS = (6.0, 14.0, 20.0, 22.0, 18.0, 12.0, 8.0)  # how often 0, 1, … 6 facts are told


# -- captions -------------------------------------------------------------------------------------------------------


def caption(
    scenes: Scenes,
    generator: torch.Generator,
    *,
    subject: str | None = None,
    free: float = 0.0,
    told: Sequence[str | None] | None = None,
) -> list[str]:
    """One caption per picture, of no to six facts beside the person's age and gender.

    ``subject`` replaces the words for the person: "id person" gives "photo of a id person with red hair, smiling",
    in which age and gender, which the identity brings along, go unmentioned. ``free``: share of the pictures (0 to 1)
    that are told in the many ways in which people type prompts (``wordings``). ``told``: for each picture a kind of
    fact that goes into its caption wherever the picture settles it ("hair" for its style and colour), or None.
    """
    facts = _true_values(scenes)
    rolls = torch.rand(len(scenes), Dice.SIDES, generator=generator, device=generator.device).tolist()
    kinds = told or [None] * len(facts)
    return [_caption(own, Dice(roll), subject, free, kind) for own, roll, kind in zip(facts, rolls, kinds, strict=True)]


def captions_for(
    seed: int, people: Sequence[int], pictures: Sequence[int], scenes: Scenes, *, subject: str | None = None
) -> list[str]:
    """Captions of the pictures that ``scenes_for(seed, people, pictures)`` drew: each depends on its name alone."""
    found = []
    for own, person, picture in zip(_true_values(scenes), people, pictures, strict=True):
        roll = torch.rand(Dice.SIDES, generator=named_generator(seed, "caption", person, picture))
        found.append(_caption(own, Dice(roll.tolist()), subject))
    return found


def say(fact: Fact) -> str:
    """A fact in a few words: "red hair", "round glasses", "no beard", "not smiling"."""
    kind, value = fact.kind, fact.value
    if not fact.wanted:
        return f"not {say(Fact(kind, value))}"
    for table in (_HAVING, _DOING):
        if (kind, value) in table:
            return _bare(table[kind, value][0])
    tables = {"hair_style": _HAIR, "glasses": _GLASSES, "hat": _HATS, "clothes": _CLOTHES, "background": _BACKGROUNDS}
    if value in tables.get(kind, {}):
        return _bare(tables[kind][value][0].format(c=""))
    if kind.endswith("_color"):
        return f"{value} {kind.removesuffix('_color')}"
    if kind in ("gender", "age") or value in ("bald", "happy", "glasses", "hat"):
        return value
    return f"no {kind.replace('_', ' ')}" if value in ("no", "none") else f"{value} {kind.split('_')[0]}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold or ``parse_prompt`` understands, sorted; marks and "id" included."""
    return tuple(sorted({*usual_words(), *_split(" ".join(known_words()))}))


def taught_words() -> frozenset[str]:
    """The words of all captions, free wordings among them."""
    return frozenset(vocabulary()) - RESERVED


def usual_words() -> frozenset[str]:
    """The words and marks of captions that are not worded freely."""
    wordings: list[str] = [*_BEGINNINGS, "a an and with wearing in on against id person the o s", ", - '"]
    for table in (_NOUNS, _AGES, _COLORS, _HAIR, _GLASSES, _HATS, _CLOTHES, _BACKGROUNDS, _HAVING, _DOING):
        wordings += [phrase.replace("{c}", "") for phrases in table.values() for phrase in phrases]
    wordings += [value for values in FACTS.values() for value in values]
    return frozenset(_split(" ".join(wordings)))


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|[^\w\s]", text.lower())


def _true_values(scenes: Scenes) -> list[dict[str, str]]:
    """For each picture, the value of every kind that it settles."""
    columns = {kind: label.tolist() for kind, label in labels(scenes).items()}
    return [
        {kind: FACTS[kind][column[row]] for kind, column in columns.items() if column[row] != UNKNOWN}
        for row in range(len(scenes))
    ]


def _caption(
    facts: Mapping[str, str], dice: Dice, subject: str | None, free: float = 0.0, certain: str | None = None
) -> str:
    if free and dice.chance(free):
        return told_freely(facts, _chosen(facts, dice, certain), dice, subject)
    told = _chosen(facts, dice, certain)
    having: list[str] = []
    wearing: list[str] = []
    doing: list[str] = []
    before: list[str] = []
    for kind in told:
        if kind == "hair":
            _tell_hair(facts, dice, before if subject is None else having, having)
        elif kind in ("glasses", "hat", "earrings", "lipstick", "clothes"):
            worn = kind == "clothes" or (dice.chance(0.5) and facts[kind] not in ("none", "no"))
            (wearing if worn else having).append(_worn(kind, facts, dice))
        elif kind == "background":
            color = _colored(facts, "background_color", dice, 0.8)
            doing.append(dice.pick(_BACKGROUNDS[facts[kind]]).format(c=color))
        elif (kind, facts[kind]) in _HAVING:
            having.append(dice.pick(_HAVING[kind, facts[kind]]))
        else:
            phrase = dice.pick(_DOING[kind, facts[kind]])
            early = subject is None and phrase in _ADJECTIVES and dice.chance(0.4)
            (before if early else doing).append(phrase)
    # What is not there comes by itself: "a woman with red hair, no glasses".
    doing += [phrase for phrase in having if phrase.startswith("no ")]
    having = [phrase for phrase in having if not phrase.startswith("no ")]
    who = _who(facts, dice, before, subject)
    beginning = dice.pick(_BEGINNINGS) if subject is None else "photo of"
    whole = f"{beginning} {who}{_tail(having, wearing, doing, dice)}".strip()
    return re.sub(r"\ba (?!id\b)(?=[aeiou])", "an ", whole)


def _chosen(facts: Mapping[str, str], dice: Dice, certain: str | None = None) -> list[str]:
    """The kinds to tell, in random order, ``certain`` among them; "hair" stands for its style and colour."""
    told = {kind for kind in facts if (kind, facts[kind]) in _HAVING or (kind, facts[kind]) in _DOING}
    told |= {"clothes", "background"}
    told |= {kind for kind in ("glasses", "hat") if facts[kind] != "none"}
    if "hair_style" in facts or "hair_color" in facts:
        told.add("hair")
    kinds = sorted(told - UNSEEN)  # sets have no order of their own
    if facts.get("gender") != "man":
        kinds = [kind for kind in kinds if facts.get(kind) != "no"]
    chosen: list[str] = []
    for _ in range(min(dice.weighted(_COUNTS), len(kinds))):
        worth = [_DULL.get((kind, facts.get(kind, "")), _WORTH.get(kind, 1.0)) for kind in kinds]
        chosen.append(kinds.pop(dice.weighted(worth)))
    if certain in kinds:
        chosen.insert(dice.weighted([1.0] * (len(chosen) + 1)), certain)
    return chosen


def _tell_hair(facts: Mapping[str, str], dice: Dice, before: list[str], having: list[str]) -> None:
    style, color = facts.get("hair_style"), _colored(facts, "hair_color", dice, 0.85)
    if style == "bald":
        # "photo of a id person with a bald head": no room before that subject
        if before is having:
            having.append("a bald head")
        else:
            before.append("bald")
    elif style is None or (color and dice.chance(0.3)):
        if color and before is not having and dice.chance(0.25):
            before.append(f"{color.strip()}-haired")
        else:
            having.append(f"{color or _colored(facts, 'hair_color', dice, 1.0)}hair")
    else:
        having.append(dice.pick(_HAIR[style]).format(c=color))


def _colored(facts: Mapping[str, str], kind: str, dice: Dice, probability: float) -> str:
    """The colour and a space, or nothing when it goes unsaid or is not seen."""
    if not dice.chance(probability) or kind not in facts:
        return ""
    return dice.pick(_COLORS.get(facts[kind], (facts[kind],))) + " "


def _worn(kind: str, facts: Mapping[str, str], dice: Dice) -> str:
    if (kind, facts[kind]) in _HAVING:
        return dice.pick(_HAVING[kind, facts[kind]])
    if kind == "glasses":
        return dice.pick(_GLASSES[facts[kind]])
    table = _HATS if kind == "hat" else _CLOTHES
    if kind == "clothes" and dice.chance(0.12):
        return dice.pick(_COLORS.get(facts["clothes_color"], (facts["clothes_color"],)))
    return dice.pick(table[facts[kind]]).format(c=_colored(facts, f"{kind}_color", dice, 0.8))


def _who(facts: Mapping[str, str], dice: Dice, before: Sequence[str], subject: str | None) -> str:
    if subject is not None:
        return f"a {subject}"  # not "an id person": the prompt these weights were trained with
    gender = facts.get("gender", "") if dice.chance(0.85) else ""
    age = [dice.pick(_AGES[facts["age"]])] if "age" in facts and dice.chance(0.4) else []
    return " ".join(["a", *dice.shuffled([*age, *before]), dice.pick(_NOUNS[gender])])


def _tail(having: list[str], wearing: list[str], doing: list[str], dice: Dice) -> str:
    """Everything after the person: a sentence, or a list as people type it."""
    if dice.chance(0.3):
        loose = dice.shuffled([_bare(phrase) for phrase in (*having, *doing)] + [f"wearing {one}" for one in wearing])
        return "".join(f", {phrase}" for phrase in loose)
    parts = []
    if having:
        parts.append(f" with {_listed(having)}")
    worn = [f"wearing {_listed(wearing)}"] if wearing else []
    rest = [*doing, *worn] if dice.chance(0.5) else [*worn, *doing]
    parts += [f" {one}" if one in worn and place == 0 and not having else f", {one}" for place, one in enumerate(rest)]
    return "".join(parts)


def _bare(phrase: str) -> str:
    return re.sub(r"^an? ", "", phrase)


def _listed(phrases: Sequence[str]) -> str:
    """ "a beard", "a beard and glasses", "red hair, a beard and glasses"."""
    head = ", ".join(phrases[:-1])
    return f"{head} and {phrases[-1]}" if head else phrases[-1]
