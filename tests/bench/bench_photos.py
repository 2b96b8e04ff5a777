"""How much of a photographed portrait its drawn avatar carries over, by labels that were written by hand.

    python -m tests.bench.bench_photos --photos ../shared/photos --out photos_mini.json --sheet avatars.png

Three columns: what the describing step reads off the photo; what the judges then find in the avatar (the judge of
attributes, for the length of hair the parsing); and chance, which is what the avatars of the other photos get by the
same labels. The sheet shows the avatars alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from facegen.errors import NoFaceFound
from facegen.evaluation.judges import Judges, load_judges
from facegen.face import describe
from facegen.face.parse import FaceParser
from facegen.files import write_json
from facegen.images import to_tensor
from facegen.pipelines.avatar import AvatarPipeline
from facegen.world.facts import FACTS, Fact, accepted

logger = logging.getLogger("bench_photos")
LABELS = Path(__file__).with_name("photos.json")
KINDS = ("skin", "hair_color", "hair_length", "glasses", "beard", "smile", "looking", "hat")
Answers = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Row:
    """One photo: what was read off it, its avatar, and what the judges find in that; None without a face."""

    name: str
    labels: Mapping[str, Sequence[str]]
    read: Answers | None
    avatar: Image.Image | None
    shown: Answers | None


def labels() -> dict[str, dict[str, list[str]]]:
    """By file name, the accepted values of each kind."""
    photos: dict[str, dict[str, list[str]]] = json.loads(LABELS.read_text("utf-8"))["photos"]
    return photos


def read_off(facts: Sequence[Fact]) -> dict[str, str]:
    """Facts in the words of the labels."""
    values = {fact.kind: fact.value for fact in facts}
    style = values.get("hair_style", "")
    found = {kind: values[kind] for kind in ("skin", "hair_color", "beard", "looking") if kind in values}
    found["hair_length"] = style.removeprefix("any ")
    found["glasses"] = "none" if values.get("glasses", "none") == "none" else "glasses"
    found["hat"] = values.get("hat", "none")
    if "expression" in values:
        smiles = accepted(Fact("expression", "happy")) | {"happy"}
        found["smile"] = "yes" if values["expression"] in smiles else "no"
    return found


@torch.no_grad()
def judged(judges: Judges, parser: FaceParser, avatar: Image.Image) -> dict[str, str]:
    """What the judges find in a drawn portrait, in the words of the labels."""
    pixels = to_tensor(avatar)[None]
    facts = judges.facts(pixels)
    seen = {kind: FACTS[kind][int(chances[0].argmax())] for kind, chances in facts.items()}
    points, _ = judges.points(pixels)
    upright = describe.Describer(parser, judges.attributes_net, None).upright(pixels, points)  # type: ignore[arg-type]
    length = describe.hair(upright, float(facts["hair_style"][0, FACTS["hair_style"].index("bald")]))[0]
    return read_off([*(Fact(kind, value) for kind, value in seen.items() if kind != "hair_style"), length])


def measured(pipe: AvatarPipeline, folder: Path, names: Sequence[str], **fields: Any) -> list[Row]:
    """An avatar of each photo, read and judged."""
    judges, parser = load_judges(), FaceParser.from_pretrained()
    rows = []
    for name in names:
        try:
            out = pipe(faces=[folder / name], select="largest", **fields)
        except NoFaceFound:
            rows.append(Row(name, labels()[name], None, None, None))
            continue
        face = pipe.person((folder / name,), "largest", pipe.adapters).references[0]  # type: ignore[union-attr]
        read = describe.Describer.from_pretrained().describe(face.image, face)
        avatar = out.images[0].convert("RGB")
        rows.append(Row(name, labels()[name], read_off(read.facts), avatar, judged(judges, parser, avatar)))
        logger.info("%s: %s", name, read.prompt())
    return rows


def scores(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By kind, and over all: the shares that are right; a photo without a face found is wrong in everything."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        asked = [row for row in rows if kind in row.labels]
        others = [(row, other) for row in asked for other in rows if other is not row and other.shown is not None]
        found[kind] = {
            "read": _share([_right(row.read, row.labels, kind) for row in asked]),
            "carried over": _share([_right(row.shown, row.labels, kind) for row in asked]),
            "chance": _share([_right(other.shown, row.labels, kind) for row, other in others]),
            "photos": len(asked),
        }
    weights = [found[kind]["photos"] for kind in KINDS]
    found["all"] = {
        column: sum(w * found[kind][column] for w, kind in zip(weights, KINDS, strict=True)) / max(1, sum(weights))
        for column in ("read", "carried over", "chance")
    }
    found["all"]["photos"] = len(rows)
    return found


def sheet(rows: Sequence[Row], across: int = 7) -> Image.Image:
    """The avatars alone, side by side."""
    made = [row.avatar for row in rows if row.avatar is not None]
    wide, tall = made[0].size
    canvas = Image.new("RGB", (across * wide, -(-len(made) // across) * tall), "white")
    for place, one in enumerate(made):
        canvas.paste(one, (place % across * wide, place // across * tall))
    return canvas


def _right(answers: Answers | None, wanted: Mapping[str, Sequence[str]], kind: str) -> bool:
    return answers is not None and answers.get(kind) in wanted[kind]


def _share(found: Sequence[bool]) -> float:
    return round(sum(found) / len(found), 4) if found else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("../shared/photos"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sheet", type=Path, help="write the avatars as one picture")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = AvatarPipeline.from_pretrained(options.model)
    fields = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "seed": options.seed}
    rows = measured(pipe, options.photos, sorted(labels()), **fields)
    table = scores(rows)
    for kind, row in table.items():
        logger.info("%-12s %s", kind, "  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    if options.out is not None:
        content = [{"photo": row.name, "read": row.read, "shown": row.shown} for row in rows]
        write_json(options.out, {"run": {"model": options.model, **fields}, "scores": table, "photos": content})
    if options.sheet is not None:
        sheet(rows).save(options.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
