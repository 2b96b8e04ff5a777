"""Prompts worded as no caption of the training words them, to see whether words or sentences were learnt.

Two ways, which never mix. "sentences" tells a fact in the words that captions use, but in a sentence that they never
form ("the hair is red"). "words" uses a word for it that captions never use ("raven hair"), of which the model knows
no more than what ``facegen.world.wordings.synonyms`` lends it. Nothing that trains may read this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from facegen.world.facts import Fact

WAYS = ("sentences", "words")
_Phrases = Mapping[tuple[str, str], tuple[str, ...]]

_FACE = "the face of the person is {}"
_SENTENCES: _Phrases = {
    **{("hair_color", color): (f"the hair is {color}", f"hair that is {color}")
       for color in ("black", "brown", "blond", "red", "gray", "white", "blue", "pink")},
    ("hair_style", "bald"): ("the head of the person is bald",),
    ("hair_style", "short"): ("hair that is short",),
    ("hair_style", "bob"): ("the hair is in a bob",),
    ("hair_style", "long straight"): ("hair that is long and straight",),
    ("hair_style", "long wavy"): ("hair that is long and wavy",),
    ("hair_style", "curly"): ("hair that is curly",),
    ("hair_style", "afro"): ("the hair is an afro",),
    ("hair_style", "bun"): ("the hair is in a bun",),
    ("hair_style", "ponytail"): ("the hair is in a ponytail",),
    ("glasses", "round"): ("glasses that are round",),
    ("glasses", "square"): ("glasses that are square",),
    ("glasses", "sunglasses"): ("eyes behind dark glasses",),
    ("hat", "beanie"): ("a beanie on the head",),
    ("hat", "cap"): ("a cap on the head",),
    ("beard", "yes"): ("the person has a full beard",),
    ("moustache", "yes"): ("the person has a moustache",),
    ("earrings", "yes"): ("earrings in the ears",),
    ("lipstick", "yes"): ("lipstick on the lips",),
    ("skin", "light"): ("the skin is pale",),
    ("skin", "dark"): ("the skin is dark",),
    ("expression", "smiling"): (_FACE.format("smiling"),),
    ("expression", "laughing"): (_FACE.format("laughing"),),
    ("expression", "sad"): (_FACE.format("sad"),),
    ("expression", "angry"): (_FACE.format("angry"),),
    ("expression", "surprised"): (_FACE.format("surprised"),),
    ("expression", "disgusted"): (_FACE.format("disgusted"),),
    ("eyes", "closed"): ("the eyes are closed",),
    ("mouth", "open"): ("the mouth is open",),
    ("looking", "left"): ("the head is turned to the left",),
    ("looking", "right"): ("the head is turned to the right",),
    **{("clothes", kind): (f"the person is in a {kind}",) for kind in ("t-shirt", "shirt", "turtleneck", "hoodie")},
    ("clothes", "suit"): ("the person is in a suit",),
    ("background", "stripes"): ("stripes in the background",),
    ("background", "bokeh"): ("blurry lights behind the person",),
    ("light", "left"): ("the light is from the left",),
    ("light", "right"): ("the light is from the right",),
    ("light_color", "warm"): ("the light is warm",),
    ("light_color", "cool"): ("the light is cool",),
}  # fmt: skip
_WORDS: _Phrases = {  # every one with a word of facegen.world.wordings.RESERVED
    ("hair_color", "black"): ("raven hair",),
    ("hair_color", "red"): ("copper hair",),
    ("hair_style", "curly"): ("frizzy hair",),
    ("hair_style", "bun"): ("a topknot",),
    ("glasses", "round"): ("circular spectacles",),
    ("glasses", "square"): ("squared spectacles",),
    ("hat", "beanie"): ("wearing a woolly hat",),
    ("beard", "yes"): ("bearded",),
    ("moustache", "yes"): ("moustached",),
    ("stubble", "yes"): ("unshaven",),
    ("eye_makeup", "yes"): ("mascara",),
    ("skin", "light"): ("a light complexion",),
    ("skin", "dark"): ("a dark complexion",),
    ("expression", "smiling"): ("beaming",),
    ("expression", "sad"): ("gloomy",),
    ("expression", "angry"): ("irritated",),
    ("expression", "surprised"): ("startled",),
    ("expression", "disgusted"): ("repulsed",),
    ("expression", "worried"): ("nervous",),
    ("expression", "kissing"): ("pursed lips",),
    ("eyes", "closed"): ("asleep",),
    ("looking", "left"): ("glancing left",),
    ("looking", "right"): ("glancing right",),
    ("tilt", "down"): ("head lowered",),
    ("clothes", "turtleneck"): ("wearing a pullover",),
    ("clothes", "suit"): ("wearing a blazer",),
    ("light", "left"): ("sidelit from the left",),
    ("light", "right"): ("sidelit from the right",),
    ("light_color", "warm"): ("candlelight",),
}  # fmt: skip
PHRASES: Mapping[str, _Phrases] = {"sentences": _SENTENCES, "words": _WORDS}
_BEGINNINGS: Mapping[str, str] = {"sentences": "a picture of a person", "words": "a person"}


def phrased(
    facts: Sequence[Fact], way: str, count: int, generator: torch.Generator
) -> tuple[str, tuple[Fact, ...]] | None:
    """A prompt that tells ``count`` of the facts, and which; None where fewer of them have a phrase of that way."""
    known = [fact for fact in facts if (fact.kind, fact.value) in PHRASES[way]]
    if len(known) < count:
        return None
    order = torch.randperm(len(known), generator=generator)[:count].tolist()
    told = tuple(known[place] for place in order)
    phrases = []
    for fact in told:
        options = PHRASES[way][fact.kind, fact.value]
        phrases.append(options[int(torch.randint(len(options), (1,), generator=generator))])
    return ", ".join([_BEGINNINGS[way], *phrases]), told
