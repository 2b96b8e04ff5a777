"""The tokenizer of the embedded model: CLIP's kind, with a vocabulary of its own.

Every byte is a token, as in CLIP, so that nothing a person types is unknown; and every word of the captions, and some
two hundred more that belong into a prompt about a face, is one token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from facegen.world.captions import vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_LENGTH = 40  # the longest caption has 35 tokens; a short text leaves fewer empty places to look at

# What else people write when they ask for a picture of a face.
_MORE_WORDS = """
above adult angle anime art artistic at attractive baby bad beautiful behind best between big black blurred body both
bright business by camera cartoon casual cheek cheeks child cinematic city clear close color colorful colour confident
contrast cool couple curious cute day deep deformed depth detail detailed digital distorted dramatic drawing ear ears
elegant evening expression eye eyebrow eyebrows face faces family fashion field film fine flowers focus for forest
formal frame from front full funny garden gold half hand hands handsome hd head headphones helmet her high highlights
him his holding home id identity illustration image indoors into it jewelry kid kind large leather lens light lighting
like little look low make man mask masterpiece me medium mood moody natural nature near neck necklace neon new nice
night nose of oil on outdoors outside painted painting park pencil people perfect photo photograph photographer
photographic photography photorealistic piercing pose posing pretty professional profile proud quality rain real
realistic render retro rich room scarf scene selfie shadow shadows sharp shiny shot shoulder shoulders side simple
sketch skin sky sleepy slightly small smart snow soft standing strong studio style stylish subject subtle summer sun
sunlight sunset sweet tattoo teeth texture that them thick thin this tie tired to tongue tree two ugly uniform very
view vintage vivid watercolor wide wild window winter worst wrinkles year years
"""
_MARKS = (",", ".", "-", "'", '"', "(", ")", ":", ";", "!", "?", "&", "+", "/", "'s", "'t")


def build_tokenizer(folder: Path | str) -> CLIPTokenizer:
    """Write tokenizer.json and tokenizer_config.json into ``folder`` and load the tokenizer from there."""
    from transformers import CLIPTokenizer

    tokens, merges = tokens_and_merges(words())
    place = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=place, merges=cast(Any, merges), model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    config = Path(folder) / "tokenizer_config.json"
    # Only what a reader needs, so that the file is the same from any version of the library.
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    config.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return loaded


def words() -> tuple[str, ...]:
    """Every word that is one token, sorted."""
    return tuple(sorted({*vocabulary(), *_MORE_WORDS.split(), *_MARKS}))


def tokens_and_merges(words: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level vocabulary in which each of the words is one token, and the merges that lead there.

    Byte pair encoding (Sennrich et al. 2016) learnt on the words until each is whole, so that words share their parts.
    """
    symbols = sorted(_byte_symbols())
    split = {word: [*word[:-1], word[-1] + WORD_END] for word in sorted(words)}
    assert all(set(word) <= set(symbols) for word in split), "words are spelt in ASCII"
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merged(parts, best) for word, parts in split.items()}
    joined = dict.fromkeys("".join(pair) for pair in merges)  # two ways to one token make one entry
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *joined]
    return [*dict.fromkeys(tokens), START, END], merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for the bytes (GPT-2's ``bytes_to_unicode``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + place) for place in range(len(hidden))]
