"""Several photos of one person become one embedding, with a word when they seem to show two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facegen.errors import NoFaceFound
from facegen.face.types import Array, Face, unit


@dataclass(frozen=True, eq=False)
class Fused:
    """What several photos say of one person; stands wherever a `Face` is asked for its embedding."""

    embedding: Array  # (D,) float32, of the length that raw embeddings of this recogniser have
    faces: tuple[Face, ...]  # those that count
    kept: tuple[int, ...]  # their places in what was given
    warning: str | None  # when photos seem to show somebody else

    @property
    def unit(self) -> Array:
        return unit(self.embedding).astype(np.float32)

    @property
    def face(self) -> Face:
        """The face that stands for all where only one will do (its points, its photo): the nearest to the mean."""
        return max(self.faces, key=lambda face: float(face.unit @ self.unit))

    @property
    def points(self) -> Array:
        return self.face.points

    @property
    def box(self) -> Array:
        return self.face.box


def fuse(faces: Sequence[Face], *, same_person: float | None = None) -> Fused:
    """The mean on the unit sphere of the largest group of faces that resemble one another.

    `same_person` is the cosine above which two photos count as one person; without it the faces themselves are asked:
    a gap in their cosines where there is one, else three standard deviations of unrelated directions (3 / √D, at most
    0.15).
    Raises NoFaceFound for an empty list.
    """
    if not faces:
        raise NoFaceFound("No face to work with; give at least one photo of a person.")
    units = np.stack([face.unit for face in faces]).astype(np.float64)  # (N, D)
    cosines = units @ units.T
    groups = _groups(cosines, _threshold(cosines, units.shape[1]) if same_person is None else same_person)
    main = groups[0]
    if len(faces) == 2 and len(groups) == 2:
        main = [0, 1]  # two photos that differ: nobody can say which of them is meant
    length = float(np.mean([np.linalg.norm(faces[i].embedding) for i in main]))
    embedding = (unit(units[main].mean(0)) * length).astype(np.float32)
    return Fused(embedding, tuple(faces[i] for i in main), tuple(main), _warning(groups, len(faces)))


def _groups(cosines: Array, threshold: float) -> list[list[int]]:
    """Average linkage: the two most alike groups merge while their mean cosine is above the threshold.

    Largest group first, of equal ones the one more alike within, then the one given first.
    """
    groups = [[i] for i in range(len(cosines))]
    while len(groups) > 1:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        alike = [float(cosines[np.ix_(groups[i], groups[j])].mean()) for i, j in pairs]
        best = int(np.argmax(alike))
        if alike[best] < threshold:
            break
        i, j = pairs[best]
        groups[j] = sorted(groups[j] + groups[i])
        del groups[i]
    return sorted(groups, key=lambda group: (-len(group), -float(cosines[np.ix_(group, group)].mean()), group[0]))


def _threshold(cosines: Array, dim: int) -> float:
    """Where "another person" begins, as far as these cosines can tell."""
    chance = 1 / np.sqrt(dim)  # the standard deviation of the cosine of unrelated directions
    count = len(cosines)
    # Never above 0.15: a recogniser outside what it was taught spreads one person's photos that far.
    floor = min(float(3 * chance), 0.15)
    if count < 5:
        return floor  # among few cosines the best split always shows a gap
    # A recogniser outside what it was trained on finds all faces alike; then only a gap tells two people apart.
    first, second = _two_groups(cosines)
    within = [float(cosines[i, j]) for group in (first, second) for i in group for j in group if i < j]
    between = [float(cosines[i, j]) for i in first for j in second]
    gap = float(np.mean(within) - np.mean(between))
    spread = max(float(chance), float(np.std(np.array(within))), float(np.std(np.array(between))))
    if gap > 3 * spread:
        return max(floor, (float(np.mean(within)) + float(np.mean(between))) / 2)
    return floor


def _two_groups(cosines: Array) -> tuple[list[int], list[int]]:
    groups = [[i] for i in range(len(cosines))]
    while len(groups) > 2:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = max(pairs, key=lambda pair: float(cosines[np.ix_(groups[pair[0]], groups[pair[1]])].mean()))
        groups[j] = groups[j] + groups[i]
        del groups[i]
    return groups[0], groups[1]


def _warning(groups: list[list[int]], count: int) -> str | None:
    if len(groups) == 1:
        return None
    main, others = groups[0], sorted(i for group in groups[1:] for i in group)
    if count == 2:
        return "The two photos seem to show two people; both are used, so the result may resemble neither."
    if len(main) == 1:
        return f"The photos all seem to show different people; only {_photos(main)} is used."
    rest = f"{_photos(others)} {'is' if len(others) == 1 else 'are'} left out"
    if any(len(group) > 1 for group in groups[1:]):
        return f"The photos seem to show more than one person: {_photos(main)} agree and are used, {rest}."
    return f"Not all photos seem to show the same person: {rest}."


def _photos(places: Sequence[int]) -> str:
    names = [str(place + 1) for place in places]
    if len(names) == 1:
        return f"photo {names[0]}"
    return f"photos {', '.join(names[:-1])} and {names[-1]}"
