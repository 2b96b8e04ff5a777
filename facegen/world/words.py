"""The words for facts, and ``parse_prompt``: which facts a free prompt asks for.

Two kinds of phrases are known. A phrase says something by itself ("smiling", "redhead", "lit from the left"). A noun
gathers the words before it ("long wavy red hair", "big round glasses", "a blue striped background"), and a colour after
it ("hair dyed blue"). The longest phrase wins; whatever is not known is passed over. "no", "without" and "not" turn a
fact into its opposite. Left and right are the picture's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from facegen.world.facts import FACTS, Fact
from facegen.world.parameters import CLOTHES, COLORS

_Words = tuple[str, ...]

# -- what stands alone: one line per fact or facts ------------------------------------------------------------------

_PEOPLE: Mapping[str, tuple[Fact, ...]] = {
    "woman, women, lady, ladies, female, feminine, she, mother, sister, actress, queen": (Fact("gender", "woman"),),
    "man, men, guy, gentleman, male, masculine, he, father, brother, actor, king, dude": (Fact("gender", "man"),),
    "girl, girls": (Fact("gender", "woman"), Fact("age", "young")),
    "boy, boys": (Fact("gender", "man"), Fact("age", "young")),
    "grandmother, grandma, granny": (Fact("gender", "woman"), Fact("age", "old")),
    "grandfather, grandpa, granddad": (Fact("gender", "man"), Fact("age", "old")),
    "person, people, someone, somebody, human, adult": (),
}

ALONE: Mapping[str, tuple[Fact, ...]] = {
    **_PEOPLE,
    "young, youthful, teen, teenage, teenager, in their twenties, in her twenties, in his twenties, twenty something":
        (Fact("age", "young"),),
    "middle aged, mature, in their forties, in her forties, in his forties, in their fifties, in her fifties, "
    "in his fifties": (Fact("age", "middle-aged"),),
    "old, elderly, senior, aged, older, in their seventies, in her seventies, in his seventies, retired":
        (Fact("age", "old"),),
    "light skin, light skinned, pale skin, fair skin, fair skinned, pale skinned, light complexion, fair complexion":
        (Fact("skin", "light"),),
    "tan skin, tanned, tanned skin, olive skin, medium skin, brown skin": (Fact("skin", "medium"),),
    "dark skin, dark skinned, black skin, dark complexion, deep skin": (Fact("skin", "dark"),),
    "freckles, freckled, freckle, freckly": (Fact("freckles", "yes"),),
    "bald, bald head, shaved head, hairless, baldness": (Fact("hair_style", "bald"),),
    "redhead, redheaded": (Fact("hair_color", "red"),),
    "brunette": (Fact("hair_color", "brown"),),
    "blondie": (Fact("hair_color", "blond"),),
    "clean shaven, no facial hair, without facial hair, freshly shaved": tuple(
        Fact(kind, "no") for kind in ("beard", "goatee", "moustache", "stubble")
    ),
    "unshaven, five o clock shadow, 5 o clock shadow, stubble, stubbly, stubble beard, stubbly beard, scruff":
        (Fact("stubble", "yes"),),
    "makeup, make up": (Fact("eye_makeup", "yes"),),
    "eye makeup, eye shadow, eyeshadow, eyeliner, eye liner, mascara, smoky eyes": (Fact("eye_makeup", "yes"),),
    "no makeup, no make up, without makeup, without make up": (Fact("eye_makeup", "no"), Fact("lipstick", "no")),
    "neutral, neutral expression, neutral face, serious, serious expression, serious face, expressionless, calm, "
    "straight face, deadpan, blank expression": (Fact("expression", "neutral"),),
    "smiling, smile, smiles, smiley, happy, happily, happiness, cheerful, joyful, joy, grin, grins, grinning, beaming, "
    "friendly, pleased": (Fact("expression", "happy"),),
    "laughing, laugh, laughs, laughter, laughing out loud, bursting with laughter, cracking up, open mouthed smile":
        (Fact("expression", "laughing"),),
    "sad, sadly, sadness, unhappy, sorrowful, sorrow, gloomy, melancholic, melancholy, depressed, crying, frowning, "
    "frown, frowns, tearful, upset": (Fact("expression", "sad"),),
    "angry, angrily, anger, mad, furious, annoyed, rage, scowling, scowl, glaring, grumpy, irritated":
        (Fact("expression", "angry"),),
    "shouting, screaming, yelling, shouting angrily": (Fact("expression", "angry"), Fact("mouth", "open")),
    "surprised, surprise, shocked, shock, astonished, amazed, startled, gasping, stunned":
        (Fact("expression", "surprised"),),
    "disgusted, disgust, grossed out, grimacing, repulsed, nose wrinkled, wrinkled nose, wrinkling the nose":
        (Fact("expression", "disgusted"),),
    "worried, worry, afraid, scared, fear, fearful, anxious, nervous, frightened, terrified, concerned":
        (Fact("expression", "worried"),),
    "kissing, kiss, kisses, blowing a kiss, kissing face, puckered lips, puckering, pouting, pout, duck face, "
    "pursed lips":
        (Fact("expression", "kissing"),),
    "puffed cheeks, puffing cheeks, cheeks puffed, puffed up cheeks, puffing out the cheeks, puffing out cheeks, "
    "puffing the cheeks, cheeks puffed out, blown up cheeks": (Fact("expression", "puffed cheeks"),),
    "winking, wink, winks, one eye closed": (Fact("eyes", "winking"),),
    "eyes closed, closed eyes, eyes shut, shut eyes, with closed eyes, sleeping, asleep, both eyes closed":
        (Fact("eyes", "closed"),),
    "eyes open, open eyes": (Fact("eyes", "open"),),
    "open mouth, mouth open, mouth wide open, open mouthed, wide open mouth": (Fact("mouth", "open"),),
    "closed mouth, mouth closed, mouth shut, lips closed, closed lips": (Fact("mouth", "closed"),),
    "looking left, looking to the left, looking to his left, looking to her left, turned left, turned to the left, "
    "facing left, facing the left, head turned left, head turned to the left, glancing left":
        (Fact("looking", "left"),),
    "looking right, looking to the right, looking to his right, looking to her right, turned right, "
    "turned to the right, facing right, facing the right, head turned right, head turned to the right, glancing right":
        (Fact("looking", "right"),),
    "looking at the camera, looking into the camera, looking at camera, looking straight ahead, looking ahead, "
    "looking at the viewer, looking at viewer, facing the camera, facing forward, looking forward, front view, "
    "frontal view, frontal": (Fact("looking", "ahead"),),
    "looking up, looking upward, looking upwards, facing up, head up, head raised, chin up": (Fact("tilt", "up"),),
    "looking down, looking downward, looking downwards, facing down, head down, head lowered, chin down":
        (Fact("tilt", "down"),),
    "lit from the left, light from the left, lighting from the left, left light, left lighting, light on the left, "
    "lit from left, light from left, sidelit from the left": (Fact("light", "left"),),
    "lit from the right, light from the right, lighting from the right, right light, right lighting, "
    "light on the right, lit from right, light from right, sidelit from the right": (Fact("light", "right"),),
    "lit from the front, light from the front, front light, frontal light, front lighting": (Fact("light", "front"),),
    "warm light, warm lighting, golden light, golden hour, warm sunlight, candlelight, warm tones, warm glow":
        (Fact("light_color", "warm"),),
    "cool light, cool lighting, cold light, cold lighting, blue light, bluish light, moonlight, cool tones":
        (Fact("light_color", "cool"),),
}  # fmt: skip

# -- colours and other words before a noun --------------------------------------------------------------------------

COLOR_WORDS: Mapping[str, str] = {
    **{name: name for name in COLORS},
    "grey": "gray", "silver": "gray", "crimson": "red", "scarlet": "red", "burgundy": "red", "maroon": "red",
    "golden": "yellow", "turquoise": "teal", "cyan": "teal", "violet": "purple", "lavender": "purple", "navy": "blue",
    "beige": "brown", "magenta": "pink", "rose": "pink", "charcoal": "gray", "ivory": "white", "olive": "green",
}  # fmt: skip
HAIR_COLOR_WORDS: Mapping[str, str] = {
    "black": "black", "raven": "black", "brown": "brown", "brunette": "brown", "chestnut": "brown", "blond": "blond",
    "blonde": "blond", "golden": "blond", "yellow": "blond", "red": "red", "ginger": "red", "auburn": "red",
    "copper": "red", "orange": "red", "gray": "gray", "grey": "gray", "graying": "gray", "greying": "gray",
    "silver": "gray", "white": "white", "blue": "blue", "pink": "pink", "dark": "dark", "dyed": "dyed",
}  # fmt: skip
EYE_COLOR_WORDS: Mapping[str, str] = {
    "brown": "brown", "dark": "brown", "hazel": "hazel", "amber": "hazel", "green": "green", "blue": "blue",
    "gray": "gray", "grey": "gray",
}  # fmt: skip
_TEXTURES = ("long", "short", "curly", "wavy", "straight", "frizzy", "spiky", "shaved", "cropped", "shoulder", "length")
_SHAPES: Mapping[str, str] = {
    "round": "round", "circular": "round", "square": "square", "rectangular": "square", "squared": "square",
    "dark": "sunglasses",
}  # fmt: skip
_PATTERNS: Mapping[str, str] = {
    "plain": "plain", "solid": "plain", "simple": "plain", "gradient": "gradient", "graded": "gradient",
    "blurred": "bokeh", "blurry": "bokeh", "bokeh": "bokeh", "striped": "stripes", "stripy": "stripes",
}  # fmt: skip

# -- nouns: what they say, and what the words before them mean --------------------------------------------------------


@dataclass(frozen=True)
class _Noun:
    """``facts`` are said by the noun itself; ``gathers`` names what the words before it are about."""

    gathers: str
    facts: tuple[Fact, ...] = ()


def _style(name: str) -> _Noun:
    return _Noun("hair", (Fact("hair_style", name),))


NOUNS: Mapping[str, _Noun] = {
    "hair, haired, hairs, locks, hairdo, hairstyle, haircut": _Noun("hair"),
    "buzz cut, buzzcut, buzz cuts, crew cut, buzzed hair": _style("buzz cut"),
    "side part, side parting, side parted hair, side swept hair": _style("side part"),
    "quiff, pompadour, swept up hair": _style("quiff"),
    "bob, bob cut, bob hair, bobbed hair": _style("bob"),
    "bangs, fringe": _style("bangs"),
    "curls": _style("curly"),
    "waves": _style("long wavy"),
    "afro, afro hair": _style("afro"),
    "bun, hair bun, top knot, topknot": _style("bun"),
    "ponytail, pony tail, ponytails": _style("ponytail"),
    "hair tied back, hair tied up, tied back hair, tied up hair": _style("tied"),
    "beard, beards, bearded, full beard": _Noun("face hair", (Fact("beard", "yes"),)),
    "goatee, goatees, chin beard": _Noun("face hair", (Fact("goatee", "yes"),)),
    "moustache, mustache, moustaches, mustaches, moustached": _Noun("face hair", (Fact("moustache", "yes"),)),
    "glasses, eyeglasses, eyeglass, spectacles, specs, eyewear, spectacled": _Noun("glasses"),
    "sunglasses, shades, sunglass": _Noun("", (Fact("glasses", "sunglasses"),)),
    "hat, hats, headwear": _Noun("hat", (Fact("hat", "hat"),)),
    "beanie, beanies, knit hat, knitted hat, woolly hat, wool hat": _Noun("hat", (Fact("hat", "beanie"),)),
    "cap, caps, baseball cap, baseball hat": _Noun("hat", (Fact("hat", "cap"),)),
    "earrings, earring, ear rings": _Noun("", (Fact("earrings", "yes"),)),
    "lipstick, lip stick, lip gloss, painted lips": _Noun("", (Fact("lipstick", "yes"),)),
    "eyes, eyed": _Noun("eyes"),
    "t shirt, t shirts, tshirt, tee, tee shirt": _Noun("clothes", (Fact("clothes", "t-shirt"),)),
    "shirt, shirts, dress shirt, blouse, button up, button up shirt": _Noun("clothes", (Fact("clothes", "shirt"),)),
    "turtleneck, turtlenecks, turtle neck, turtleneck sweater, roll neck, sweater, pullover":
        _Noun("clothes", (Fact("clothes", "turtleneck"),)),
    "hoodie, hoodies, hooded sweatshirt, sweatshirt": _Noun("clothes", (Fact("clothes", "hoodie"),)),
    "suit, suits, suit and tie, jacket, blazer, tuxedo": _Noun("clothes", (Fact("clothes", "suit"),)),
    "clothes, clothing, top, outfit, dress": _Noun("clothes"),
    "background, backgrounds, backdrop, wall": _Noun("background"),
    "stripes, background with stripes": _Noun("background", (Fact("background", "stripes"),)),
    "bokeh, bokeh lights, blurry lights, blurred lights": _Noun("background", (Fact("background", "bokeh"),)),
    "gradient": _Noun("background", (Fact("background", "gradient"),)),
    "lips": _Noun("lips"),
}  # fmt: skip

NEGATIONS = ("no", "not", "without", "never", "lacking", "isn", "doesn", "aren", "non")
_SHADES: Mapping[str, str] = {"black": "dark", "dark": "dark", "white": "light", "pale": "light", "tan": "medium"}
_LINKS = ("is", "are", "dyed", "colored", "coloured", "in", "of", "a", "an", "the", "bright", "light", "dark")
_ENDS = (",", ".", ";", "and", "with", "wearing", "on", "against")  # no noun comes after these
_DESCRIBED: Mapping[str, frozenset[str]] = {  # what may be said of a noun behind it, where that is more than a colour
    "hair": frozenset({*HAIR_COLOR_WORDS, *_TEXTURES}) - {"dyed"}, "eyes": frozenset(EYE_COLOR_WORDS),
}  # fmt: skip
_BREAKS = (",", ".", ";", ":", "(", ")", "|", "with", "but", "while")
_WEARING = ("wearing", "wears", "dressed", "wear")


def _spell(phrases: str) -> Iterator[_Words]:
    return (tuple(phrase.split()) for phrase in phrases.split(", "))


_ALONE: Mapping[_Words, tuple[Fact, ...]] = {words: facts for line, facts in ALONE.items() for words in _spell(line)}
_NOUNS: Mapping[_Words, _Noun] = {words: noun for line, noun in NOUNS.items() for words in _spell(line)}
_PERSONS = frozenset(words[0] for line in _PEOPLE for words in _spell(line))
_MODIFIERS = frozenset((*COLOR_WORDS, *HAIR_COLOR_WORDS, *EYE_COLOR_WORDS, *_TEXTURES, *_SHAPES, *_PATTERNS, *_SHADES))
_LONGEST = max(map(len, (*_ALONE, *_NOUNS)))
_HALVES: Mapping[str, tuple[str, str]] = {  # one word for the lack of something
    "beardless": ("no", "beard"), "hatless": ("no", "hat"), "smileless": ("no", "smile"),
}  # fmt: skip


def parse_prompt(prompt: str) -> tuple[Fact, ...]:
    """The facts that a prompt asks for, each once, in the order of their mention; of two that clash, the later."""
    return _Reader(_tokens(prompt)).read()


def known_words() -> frozenset[str]:
    """Every word that ``parse_prompt`` understands."""
    words = {word for words in (*_ALONE, *_NOUNS) for word in words}
    return frozenset(words | _MODIFIERS | set(NEGATIONS) | set(_LINKS) | set(_HALVES) | set(_WEARING))


def _tokens(prompt: str) -> list[str]:
    """Lower-case words and marks; a hyphen is a space, brackets and weights of other programs are dropped."""
    text = re.sub(r"\b(\d+)[- ]years?[- ]old\b", lambda found: f" {_age_word(int(found[1]))} ", prompt.lower())
    text = re.sub(r":\s*\d+(\.\d+)?", " ", text)  # (red hair:1.3)
    words = re.findall(r"[^\W\d_]+|\d+|[,.;:()|]", text.replace("-", " ").replace("'", " ").replace("’", " "))
    return [half for word in words for half in _HALVES.get(word, (word,))]


def _age_word(years: int) -> str:
    return "young" if years < 36 else "middle aged" if years < 59 else "old"


@dataclass
class _Reader:
    """Walks along the words once, from left to right."""

    words: Sequence[str]
    at: int = 0
    pending: list[str] = field(default_factory=list)  # modifiers whose noun has not come yet
    negated: bool = False
    carried: bool = False  # the negation began at an earlier noun
    wearing: bool = False
    facts: dict[str, list[Fact]] = field(default_factory=dict)

    def read(self) -> tuple[Fact, ...]:
        while self.at < len(self.words):
            self._step()
        self._leftover()
        return tuple(fact for facts in self.facts.values() for fact in facts)

    def _step(self) -> None:
        word = self.words[self.at]
        noun, alone = self._longest(_NOUNS), self._longest(_ALONE)
        if alone and len(alone) >= len(noun):
            self._say_alone(alone)
        elif noun:
            self.at += len(noun)
            self._say_noun(_NOUNS[noun])
        else:
            self.at += 1
            if word in NEGATIONS:
                self._leftover()
                self.negated, self.carried = True, False
            elif word in _MODIFIERS:
                self.pending.append(word)
            elif word in _WEARING or (word == "in" and not self.pending):
                self.wearing = True
            elif word in _BREAKS:
                self._break(word)
            elif word == "and" and self.wearing and self._next() in ("a", "an"):
                self._leftover()  # "wearing orange and a hat"
            elif word == "and" and self.negated and "without" not in self.words:
                self.negated = False

    def _next(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def _longest(self, table: Mapping[_Words, object]) -> _Words:
        for length in range(min(_LONGEST, len(self.words) - self.at), 0, -1):
            words = tuple(self.words[self.at : self.at + length])
            if words in table:
                return words
        return ()

    def _say_alone(self, words: _Words) -> None:
        self.at += len(words)
        if words[0] in _PERSONS:
            # "a black woman", "the pale blonde man": colours before a person are skin and hair.
            for word in self.pending:
                if word in _SHADES:
                    self._add(Fact("skin", _SHADES[word]))
                elif word in HAIR_COLOR_WORDS:
                    self._add(Fact("hair_color", HAIR_COLOR_WORDS[word]))
            self.pending.clear()
        elif self.wearing and self.pending:
            self._leftover()  # "in red, laughing"
        if words == ("old",) and self._gathered_ahead() in ("hat", "clothes", "background"):
            return
        facts = _ALONE[words]
        if self.negated and "no" not in words and "without" not in words:
            facts = tuple(_opposite(fact) for fact in facts)
        for fact in facts:
            self._add(fact)
        if facts:
            self._after()

    def _gathered_ahead(self) -> str:
        noun = self._longest(_NOUNS)
        return _NOUNS[noun].gathers if noun else ""

    def _say_noun(self, noun: _Noun) -> None:
        said = [*noun.facts, *_gathered(noun.gathers, [*self.pending, *self._behind(noun.gathers)])]
        if noun.gathers == "glasses" and not any(fact.kind == "glasses" for fact in said):
            said.append(Fact("glasses", "glasses"))
        if noun.gathers == "lips" and not said:
            self.pending.clear()
            return
        if self.negated:
            # "without glasses and red hair" wants red hair: what cannot be absent is not meant.
            opposite = _opposite(said[0]) if said else None
            if opposite and (opposite.wanted or not self.carried):
                said = [opposite]
        for fact in said:
            self._add(fact)
        self.pending.clear()
        self._after()

    def _after(self) -> None:
        """What "no" began goes on over "or" and, after "without", over "and"."""
        following = self._next()
        self.carried = self.negated and following in ("or", "nor", "and")
        self.negated = self.carried
        if following != "and":
            self.wearing = False

    def _behind(self, about: str) -> list[str]:
        """What follows its noun: "hair dyed blue", "hair is long and wavy"; nothing that has a noun of its own."""
        known = _DESCRIBED.get(about, COLOR_WORDS)
        place = self.at
        while place < len(self.words) and self.words[place] in _LINKS and self.words[place] not in known:
            place += 1
        if place == self.at or not about:
            return []
        found: list[str] = []
        sure, end = 0, self.at
        while place < len(self.words) and self.words[place] in known:
            found.append(self.words[place])
            place += 1
            after = self.words[place] if place < len(self.words) else ","
            if after in _ENDS:
                sure, end = len(found), place
            if after == "and":
                place += 1
        self.at = end
        return found[:sure]

    def _break(self, word: str) -> None:
        # "long, red hair" goes on; "wearing red, smiling" does not.
        if word == "," and self.pending and not self.wearing and self._next() in _MODIFIERS:
            return
        self._leftover()
        self.negated = False
        self.wearing = False

    def _leftover(self) -> None:
        """Modifiers whose noun never came: "dressed in red", "blonde, smiling"."""
        if self.wearing:
            colors = [COLOR_WORDS[word] for word in self.pending if word in COLOR_WORDS]
            if colors:
                self._add(Fact("clothes_color", colors[-1]))
        else:
            for word in self.pending:
                if word in ("blond", "blonde", "ginger", "brunette"):
                    self._add(Fact("hair_color", HAIR_COLOR_WORDS[word]))
        self.pending.clear()

    def _add(self, fact: Fact) -> None:
        others = self.facts.get(fact.kind, [])
        if fact in others:
            return
        # Several things that one picture is not can stand together; of what it is, the last word counts.
        self.facts[fact.kind] = [*others, fact] if not fact.wanted and not any(o.wanted for o in others) else [fact]


def _opposite(fact: Fact) -> Fact:
    values = FACTS[fact.kind]
    for absent in ("no", "none"):
        if absent in values:
            return Fact(fact.kind, absent)
    return Fact(fact.kind, fact.value, wanted=not fact.wanted)


def _gathered(about: str, words: Sequence[str]) -> list[Fact]:
    """What the words before a noun say, the nearest colour counting."""
    if about == "hair":
        colors = [Fact("hair_color", HAIR_COLOR_WORDS[word]) for word in words if word in HAIR_COLOR_WORDS]
        return [*_hair_style(set(words)), *colors[-1:]]
    if about == "glasses":
        return [Fact("glasses", _SHAPES[word]) for word in words if word in _SHAPES][-1:]
    if about == "eyes":
        return [Fact("eye_color", EYE_COLOR_WORDS[word]) for word in words if word in EYE_COLOR_WORDS][-1:]
    if about == "lips":
        return [Fact("lipstick", "yes") for word in words if word in ("red", "pink", "purple")][:1]
    if about not in ("hat", "clothes", "background"):
        return []
    colors = [Fact(f"{about}_color", COLOR_WORDS[word]) for word in words if word in COLOR_WORDS][-1:]
    if about == "background":
        return [*[Fact("background", _PATTERNS[word]) for word in words if word in _PATTERNS][-1:], *colors]
    return colors


def _hair_style(words: set[str]) -> list[Fact]:
    if words & {"curly", "frizzy"}:
        return [Fact("hair_style", "curly")]
    if "wavy" in words:
        return [Fact("hair_style", "long wavy")]
    if "long" in words:
        return [Fact("hair_style", "long straight" if "straight" in words else "any long")]
    if "spiky" in words:
        return [Fact("hair_style", "quiff")]
    if "shoulder" in words:
        return [Fact("hair_style", "bob")]
    if words & {"short", "cropped"}:
        return [Fact("hair_style", "any short")]
    return []


assert set(CLOTHES) <= {fact.value for noun in NOUNS.values() for fact in noun.facts}
