"""The measure of everything: its figures on sets whose answer is known, and one run of all of it, killed in between."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from facegen.errors import WrongRequest
from facegen.evaluation.frechet import fid, kid
from facegen.evaluation.judges import load_judges
from facegen.evaluation.ledger import Ledger
from facegen.evaluation.phrasings import PHRASES, WAYS, phrased
from facegen.evaluation.protocol import drawn, load
from facegen.evaluation.quality import run
from facegen.evaluation.sight import copied, obedience, spread_of_looks
from facegen.models.base import Model
from facegen.world.captions import captions_for
from facegen.world.facts import Fact, accepted
from facegen.world.render import render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for
from facegen.world.words import parse_prompt


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fid_is_the_formula() -> None:
    from scipy.linalg import sqrtm

    a, b = normal(0, 60, 7), 1.5 * normal(1, 80, 7) + 0.3
    first, second = (torch.cov(one.double().T).numpy() for one in (a, b))
    apart = float((a.double().mean(0) - b.double().mean(0)).square().sum())
    wanted = apart + first.trace() + second.trace() - 2 * sqrtm(first @ second).real.trace()
    assert fid(a, b) == pytest.approx(wanted, rel=1e-4)
    assert fid(a, a) == pytest.approx(0, abs=1e-6)
    assert fid(a, a + 2) == pytest.approx(7 * 4, rel=1e-5)


def test_kid_has_no_bias() -> None:
    alike = torch.tensor([kid(normal(seed, 20, 5), normal(100 + seed, 20, 5)) for seed in range(60)])
    assert abs(float(alike.mean())) < 2.5 * float(alike.std()) / 60**0.5
    assert kid(normal(0, 40, 5), normal(1, 40, 5) + 1) > 10 * float(alike.std())


def test_copies_are_told_from_chance() -> None:
    photo, others, fresh = normal(0, 200, 3), normal(1, 4, 200, 3), normal(2, 4, 200, 3)
    assert copied(photo.expand(4, -1, -1), photo, others) == 1
    assert abs(copied(fresh, photo, others)) < 0.05
    assert 0.2 < copied(0.5 * photo + 0.5 * fresh, photo, others) < 0.8
    # What was asked for is no copying: the picture whose caption was asked counts as neither.
    assert abs(copied(others, photo, others)) < 0.1


def test_test_phrasings_are_not_in_captions_and_mean_what_they_say() -> None:
    people = range(600)
    scenes = scenes_for(9, people, [0] * len(people))
    said = "\n".join(
        text
        for subject in (None, "person")
        for text in captions_for(9, people, [0] * len(people), scenes, subject=subject)
    )
    for way in WAYS:
        for (kind, value), phrases in PHRASES[way].items():
            for phrase in phrases:
                assert not re.search(rf"\b{re.escape(phrase)}\b", said), phrase
                read = [fact for fact in parse_prompt(f"a person, {phrase}") if fact.kind == kind]
                assert all(value in accepted(fact) for fact in read), phrase
                assert read or way == "sentences", phrase  # the words are known to whoever reads prompts


def test_nothing_that_trains_reads_the_test_phrasings(root: Path) -> None:
    for folder in ("training", "world"):
        for file in (root / "facegen" / folder).rglob("*.py"):
            assert "phrasings" not in file.read_text("utf-8"), file


def test_a_phrased_prompt_tells_what_it_says() -> None:
    facts = [Fact("hair_color", "red"), Fact("glasses", "round"), Fact("hat", "none")]
    generator = torch.Generator().manual_seed(0)
    text, told = phrased(facts, "words", 2, generator) or ("", ())
    assert set(told) == set(facts[:2])
    assert set(told) <= set(parse_prompt(text))
    assert phrased(facts, "words", 3, generator) is None


def test_a_ledger_forgets_another_plan_and_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    Ledger(path, {"people": 2}).row("look/one", lambda: {"FID": 1.0})
    again = Ledger(path, {"people": 2})
    assert again.row("look/one", lambda: pytest.fail("measured twice")) == {"FID": 1.0}
    assert again.table("look", "Look").rows == {"one": {"FID": 1.0}}
    assert not Ledger(path, {"people": 3}).rows
    path.write_text("[]", "utf-8")
    with pytest.raises(WrongRequest, match="another file"):
        Ledger(path, {})


def test_renders_obey_their_own_captions_best(mini: Path) -> None:
    judges = load_judges()
    scenes = scenes_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 8), [1] * 8)
    pictures = render(scenes, 128).rgb
    texts = captions_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 8), [1] * 8, scenes, subject="person")
    asked = [parse_prompt(text) for text in texts]
    own, other = (obedience(judges, [one], [asked])["obeyed"] for one in (pictures, pictures.roll(1, 0)))
    assert own > other + 0.2
    assert spread_of_looks(judges, [pictures, pictures]) == pytest.approx(0, abs=1e-6)
    assert spread_of_looks(judges, [pictures, pictures.roll(1, 0)]) > 0.1
    assert judges.features(pictures).shape == (8, judges.attributes_net.config["widths"][-1])


def test_key_points_are_the_persons_own_in_another_pose(mini: Path) -> None:
    people = range(HELD_OUT_FROM, HELD_OUT_FROM + 6)
    cast = drawn(load_judges(), scenes_for(0, people, [0] * 6), 128)
    other = scenes_for(0, people, [1] * 6)
    true = render(other, 128).landmarks5
    rows = torch.tensor([4, 1])
    turned = cast.turned(rows, other.pose[rows])
    wrong, photo, stranger = (
        float((one - true[rows]).norm(dim=2).mean()) for one in (turned, cast.points[rows], true.roll(1, 0)[rows])
    )
    assert wrong < 4  # pixels of 128; the photo's expression stays
    assert wrong < 0.5 * min(photo, stranger)
    beyond = other.pose[rows] * 100
    assert bool(cast.turned(rows, beyond).isfinite().all())


def test_a_pose_is_for_who_follows_key_points(mini: Path) -> None:
    model = Model.from_pretrained(mini)
    assert load("none", model) is None
    assert {load(name, model).name for name in ("instantid", "instantid+pose")} == {"instantid"}  # type: ignore[union-attr]
    with pytest.raises(WrongRequest, match="follows no key points"):
        load("arc2face+pose", model)


def test_one_run_has_ceilings_and_floors_and_goes_on_where_it_was(mini: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "quality.json", list[tuple[int, int]]()
    result = run(
        adapters=("arc2face", "instantid+pose"), people=2, prompts=2, steps=1, output=path,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    tables = {table.title.split()[0].rstrip(",:"): table.rows for table in result.tables}
    likeness = tables["Likeness"]
    references = {"renders (ceiling)", "another person's (floor)", "the photo itself", "renders, autoencoded"}
    assert set(likeness) == references | {"none", "arc2face", "instantid+pose"}
    assert likeness["renders (ceiling)"]["of ceiling"] == 1
    assert likeness["renders (ceiling)"]["diverse look"] == pytest.approx(1, abs=1e-4)
    assert 0.8 < likeness["renders, autoencoded"]["of ceiling"] < 1
    assert likeness["the photo itself"]["pose copied"] > 0.9
    assert likeness["the photo itself"]["diverse look"] < 0.01
    assert likeness["renders (ceiling)"]["likeness"] > likeness["another person's (floor)"]["likeness"]
    assert tables["Look"]["noise (floor)"]["FID"] > tables["Look"]["renders (ceiling)"]["FID"]
    coded = tables["Autoencoder"]
    assert coded["mini"]["PSNR, dB"] > coded["another picture (floor)"]["PSNR, dB"] + 5
    assert {row.split(": ")[1] for row in tables["Recognisers"]} >= {"pose", "hair", "ageing", "everything"}
    assert tables["The"]["parsing"]["mean F1"] > 0.5
    assert tables["Size"]["mini"]["MB"] < 80
    kept = json.loads(path.read_text("utf-8"))
    del kept["rows"]["size/mini"]
    kept["rows"]["look/arc2face"]["FID"] = -1.0  # as if it had been measured
    path.write_text(json.dumps(kept), "utf-8")
    again = run(adapters=("arc2face", "instantid+pose"), people=2, prompts=2, steps=1, output=path)
    assert again.tables[0].rows["arc2face"]["FID"] == -1
    assert "size/mini" in json.loads(path.read_text("utf-8"))["rows"]
