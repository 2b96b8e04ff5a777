"""Free wordings: a picture told as people type prompts, in tags, synonyms and short sentences.

Captions proper have one grammar and few words for a thing. Whoever types "ginger locks, specs, grinning, 8k" uses
neither, and a text encoder that learnt from captions alone knows nothing of the world outside them. Here every phrase
that ``words.parse_prompt`` understands is used for what it means, but for the RESERVED words, by which it can be tried
what becomes of a word that no caption ever held.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cache

from facegen.world.dice import Dice
from facegen.world.facts import FACTS, LOOSE, Fact, accepted
from facegen.world.words import ALONE, COLOR_WORDS, EYE_COLOR_WORDS, HAIR_COLOR_WORDS, NOUNS

# Left out of all captions.
RESERVED = frozenset({
    "raven", "copper", "frizzy", "topknot", "circular", "squared", "woolly", "bearded", "moustached", "unshaven",
    "mascara", "complexion", "beaming", "repulsed", "startled", "gloomy", "irritated", "nervous", "pursed", "asleep",
    "glancing", "lowered", "blazer", "pullover", "candlelight", "sidelit",
})  # fmt: skip

_STARTS = (
    "",
    "",
    "",
    "portrait",
    "photo",
    "face",
    "a face",
    "a person",
    "photo of a person",
    "someone",
    "selfie",
    "headshot",
)
_EXTRAS = (
    "high quality", "best quality", "professional photo", "realistic", "detailed", "sharp focus", "hd", "cinematic",
    "studio lighting", "natural light", "beautiful", "masterpiece", "close up", "professional portrait",
    "photorealistic", "simple", "film", "nice", "very detailed", "in focus", "photography",
)  # fmt: skip
_JOINTS = (", ", ", ", ", ", ",", " ", " and ", " with ", "; ", ". ", " & ")
_SHE: Mapping[str, tuple[str, str, str]] = {"woman": ("she", "her", "woman"), "man": ("he", "his", "man")}
_THEY = ("the person", "their", "person")
_FEATURES = ("beard", "goatee", "moustache", "stubble", "freckles")
_WORN = ("glasses", "hat", "clothes", "earrings", "lipstick")
_TEXTURES: Mapping[str, tuple[str, ...]] = {
    "buzz cut": ("short", "cropped"), "short": ("short", "cropped"), "side part": ("short",),
    "quiff": ("short", "spiky"), "bob": ("shoulder length",),
    "long straight": ("long straight", "long", "straight long"),
    "long wavy": ("long wavy", "wavy", "long"), "curly": ("curly",), "ponytail": ("long",),
}  # fmt: skip
_SHAPES = {"round": ("round",), "square": ("square", "rectangular")}
_PATTERNS = {
    "plain": ("plain", "solid", "simple"), "gradient": ("gradient", "graded"), "bokeh": ("blurred", "blurry", "bokeh"),
    "stripes": ("striped", "stripy"),
}  # fmt: skip


def told_freely(facts: Mapping[str, str], kinds: Sequence[str], dice: Dice, subject: str | None) -> str:
    """The facts of these kinds as tags in any order or as short sentences; "hair" stands for its style and colour.

    facts: the value of each kind that a picture settles. ``subject`` is named at the beginning, as in ``caption``.
    """
    named = ["gender"] if subject is None and facts.get("gender") and dice.chance(0.6) else []
    named += ["age"] if subject is None and facts.get("age") and dice.chance(0.3) else []
    if dice.chance(0.35):
        return _sentences(facts, kinds, dice, subject)
    tags = [tag for kind in (*named, *kinds) for tag in [_tag(kind, facts, dice)] if tag]
    if dice.chance(0.25):
        tags.append(dice.pick(_EXTRAS))
    tags = dice.shuffled(tags)
    joint = dice.pick(_JOINTS)
    if subject is not None:
        return ", ".join([f"photo of a {subject}", joint.join(tags)]) if tags else f"photo of a {subject}"
    start = dice.pick(_STARTS)
    return joint.join([start, *tags] if start else tags) or "a person"


def synonyms(taught: Container[str]) -> dict[str, str]:
    """For each word that is not among the ``taught`` a taught one of the same meaning: "raven" is "black".

    A text encoder that never saw the one may begin with what it learnt of the other.
    """
    found: dict[str, str] = {"circular": "round", "squared": "square", "frizzy": "curly"}
    for options in (*_all_phrases().values(), *(line.split(", ") for line in NOUNS)):
        single = [phrase for phrase in options if phrase.isalpha()]
        usual = next((phrase for phrase in single if phrase in taught), None)
        found |= dict.fromkeys(single, usual) if usual else {}
    for table in (COLOR_WORDS, HAIR_COLOR_WORDS):
        found |= {word: usual for word, usual in table.items() if usual in taught}
    return {word: usual for word, usual in found.items() if word not in taught}


def _known(phrase: str) -> bool:
    return not RESERVED & set(phrase.split())


@cache
def _all_phrases() -> dict[Fact, tuple[str, ...]]:
    """Phrases that say one fact and nothing else."""
    found: dict[Fact, list[str]] = {}
    lines = [*ALONE.items(), *((line, noun.facts) for line, noun in NOUNS.items())]
    for line, facts in lines:
        if len(facts) == 1 and facts[0].wanted:
            found.setdefault(facts[0], []).extend(line.split(", "))
    return {fact: tuple(phrases) for fact, phrases in found.items()}


@cache
def _phrases() -> dict[Fact, tuple[str, ...]]:
    """For each value of each kind the phrases that are true of it and may be taught."""
    found: dict[Fact, list[str]] = {}
    for kind, values in FACTS.items():
        for value in values:
            meant = [value, *(loose for loose in LOOSE.get(kind, {}) if value in accepted(Fact(kind, loose)))]
            options = [phrase for one in meant for phrase in _all_phrases().get(Fact(kind, one), ()) if _known(phrase)]
            if options:
                found[Fact(kind, value)] = options
    return {fact: tuple(options) for fact, options in found.items()}


@cache
def _nouns(gathers: str, value: str = "") -> tuple[str, ...]:
    """The nouns that gather words of a kind and say this value themselves, or nothing."""
    found = []
    for line, noun in NOUNS.items():
        if noun.gathers == gathers and value in ({fact.value for fact in noun.facts} or {""}):
            found += [phrase for phrase in line.split(", ") if _known(phrase) and not phrase.endswith("ed")]
    return tuple(found)


@cache
def _colors(kind: str, value: str) -> tuple[str, ...]:
    table = {"hair_color": HAIR_COLOR_WORDS, "eye_color": EYE_COLOR_WORDS}.get(kind, COLOR_WORDS)
    fits = {value, *(loose for loose in LOOSE.get(kind, {}) if value in accepted(Fact(kind, loose)))} - {"dyed"}
    return tuple(word for word, means in table.items() if means in fits and word not in RESERVED)


def _color(kind: str, facts: Mapping[str, str], dice: Dice, probability: float = 0.7) -> str:
    if not dice.chance(probability) or kind not in facts:
        return ""
    options = _colors(kind, facts[kind])
    # The colour's own name is what most people say.
    return options[0] if dice.chance(0.4) else dice.pick(options)


def _tag(kind: str, facts: Mapping[str, str], dice: Dice) -> str:
    """A fact in a few words without an article, empty where there are none for it."""
    value = facts.get(kind, "")
    if kind == "hair":
        return _hair(facts, dice)
    if kind == "glasses" and value in _SHAPES:
        return _spaced(dice.pick(_SHAPES[value]) if dice.chance(0.5) else "", dice.pick(_nouns("glasses")))
    if kind in ("hat", "clothes") and value != "none":
        color = _color(f"{kind}_color", facts, dice)
        loose = ("hat",) if kind == "hat" else ()
        noun = dice.pick((*_nouns(kind, value), *loose))
        return _spaced("wearing" if dice.chance(0.3) else "", color, noun)
    if kind == "background":
        noun = dice.pick(_nouns("background"))
        if dice.chance(0.2) and (value == "bokeh" or value == "gradient"):
            return _spaced(_color("background_color", facts, dice), dice.pick(_nouns("background", value) or (noun,)))
        return _spaced(
            dice.pick(_PATTERNS[value]) if dice.chance(0.6) else "", _color("background_color", facts, dice, 1.0), noun
        )
    if kind == "eye_color":
        color = _color(kind, facts, dice, 1.0)
        return f"{color} eyes" if dice.chance(0.8) else f"{color} eyed"
    if value in ("no", "none"):
        return f"no {kind.replace('_', ' ')}"
    options = _phrases().get(Fact(kind, value), ()) if value else ()
    return dice.pick(options) if options else ""


def _hair(facts: Mapping[str, str], dice: Dice) -> str:
    style, generic = facts.get("hair_style"), _nouns("hair")
    if style == "bald":
        return dice.pick(_phrases()[Fact("hair_style", "bald")])
    color = _color("hair_color", facts, dice, 1.0 if style is None else 0.8)
    if style is None or (color and dice.chance(0.3)):
        if dice.chance(0.15):
            return f"{color} haired"
        return _spaced(color, dice.pick(generic) if dice.chance(0.4) else "hair") if color else ""
    own = _nouns("hair", style)
    if own and dice.chance(0.6):
        return _spaced(color, dice.pick(own))
    if style in _TEXTURES:
        texture = dice.pick(_TEXTURES[style])
        words = [texture, color] if dice.chance(0.7) else [color, texture]
        return _spaced(*words, dice.pick(generic) if dice.chance(0.3) else "hair")
    return _spaced(color, dice.pick(own)) if own else _spaced(color, "hair") if color else ""


def _spaced(*words: str) -> str:
    return " ".join(word for word in words if word)


def _sentences(facts: Mapping[str, str], kinds: Sequence[str], dice: Dice, subject: str | None) -> str:
    """ "this is a man. he has ginger hair and wears specs, grinning"."""
    told = facts.get("gender", "") if subject is None and dice.chance(0.8) else ""
    who, whose, noun = _SHE.get(told, _THEY)
    clauses, loose = [], []
    for kind in kinds:
        tag = _tag(kind, facts, dice)
        if not tag:
            continue
        if kind == "hair" and tag.endswith(" hair") and dice.chance(0.5):
            clauses.append(f"{whose} hair is {tag.removesuffix(' hair').replace(' ', ' and ')}")
        elif kind == "eye_color" and tag.endswith(" eyes") and dice.chance(0.6):
            clauses.append(f"{whose} eyes are {tag.removesuffix(' eyes')}")
        elif (kind == "hair" and not tag.endswith(("bald", "haired", "hairless"))) or (
            kind in (*_FEATURES, "eye_color") and facts.get(kind) != "no" and not tag.endswith("ed")
        ):
            clauses.append(f"{who} has {tag}")
        elif kind in _WORN and facts.get(kind) not in ("no", "none") and not tag.startswith("wearing"):
            clauses.append(f"{who} wears {tag}")
        else:
            loose.append(tag)
    clauses = dice.shuffled(clauses)
    start = f"photo of a {subject}" if subject is not None else dice.pick(
        (f"a {noun}", f"this is a {noun}", f"a photo of a {noun}", f"there is a {noun}", f"one {noun}")
    )  # fmt: skip
    joint = ". " if dice.chance(0.5) else ", "
    return joint.join([start, *clauses, *loose])
