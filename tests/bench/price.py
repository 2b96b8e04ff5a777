"""What a faster way of making pictures costs: likeness, prompts obeyed and looks, beside the exact way.

    python -m tests.bench.price --people 24 --out price.md
    python -m tests.bench.price --ways exact fast fastest lcm "guidance 0-0.5" "control 0.4" "reuse 3" --people 24

Every way paints the same held-out people from the same noise (`facegen.evaluation.protocol`). A way is a preset
(exact, fast, fastest: as the command line's --speed, with the steps and the LoRA that the model brings), an
approximation by itself (guidance FROM-TO, control PART, control-cond, reuse N, steps N; lcm N: that scheduler's N steps
without guidance; int8, fp8: weights in eight bits; tiny FILE: a tiny decoder), or a LoRA for few steps: few for the
model's own, or a file.
likeness and prompt are the judges'; `unlike` is the mean distance of the pictures to the exact ones' in the features
of the parsing net, unit-normalised per place and averaged over its stages, as LPIPS does it without learned weights
(0: the same picture; what other noise does stands in the
last row). Times are this process's processor time, decoding included, with packed weights throughout.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facegen.adapter import Adapter, load_adapter
from facegen.economy import EXACT, PRESETS, Economy
from facegen.eight_bits import Weights
from facegen.errors import WrongRequest
from facegen.evaluation import protocol
from facegen.evaluation.judges import load_judges
from facegen.evaluation.protocol import Plan, Row
from facegen.few_steps import FewSteps, hurried, told_by
from facegen.models.base import Model, locate
from facegen.models.lora import load_lora
from facegen.models.packed import pack
from facegen.models.tiny import load_tiny
from facegen.world.captions import captions_for
from facegen.world.sampling import HELD_OUT_FROM, scenes_for
from tests.bench.sheet import Sheet

logger = logging.getLogger("price")
OTHER_NOISE = "exact, other noise"


@dataclass(frozen=True)
class Way:
    """How pictures are made: what is left out, with which LoRA; few: scheduler, steps and guidance, None: the plan's;
    steps: another number of them.
    """

    name: str
    economy: Economy = EXACT
    few: FewSteps | None = None
    steps: int | None = None
    lora: Path | None = None
    seed: int = 0
    weights: Weights = "whole"
    tiny: str | None = None


def way(name: str, model: str) -> Way:
    """By its name on the command line; raises WrongRequest."""
    word, _, value = name.partition(" ")
    try:
        if name in PRESETS:
            folder = locate(model).parent
            worn, few = hurried(name, folder, {})
            lora = next((folder / "loras" / f"{one}.safetensors" for one in worn), None)
            return Way(name, PRESETS[name], few=few, lora=lora)
        if name in ("int8", "fp8"):
            return Way(name, weights=name)
        if word == "tiny":
            return Way(name, tiny=value)
        if word == "guidance":
            begin, end = map(float, value.split("-"))
            return Way(name, Economy(guidance=(begin, end)))
        if word == "control":
            return Way(name, Economy(control=float(value)))
        if name == "control-cond":
            return Way(name, Economy(control_both=False))
        if word == "reuse":
            return Way(name, Economy(reuse=int(value)))
        if word == "steps":
            return Way(name, steps=int(value))
        if word == "lcm" and value:
            return Way(name, few=FewSteps("lcm", int(value)))
    except ValueError as error:
        raise WrongRequest(f"{name!r} is no way of making pictures: {error}.") from error
    path = Path(name)
    if not path.exists():
        path = locate(model).parent / "loras" / f"{name}.safetensors"
    if not path.exists():
        raise WrongRequest(f"There is neither a preset nor a LoRA {name!r}.")
    return Way(name, lora=path, few=told_by(path))


class Features:
    """The states of a net's convolutions behind each change of resolution, by hooks."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._seen: list[Tensor] = []

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            self._seen.append(output)

        convolutions = [part for part in self.net.modules() if isinstance(part, nn.Conv2d)]
        hooks = [part.register_forward_hook(note) for part in convolutions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] → the last state at each resolution, channels of unit length, (B, C, h, w) each."""
        self._seen = []
        with self._watched():
            self.net(pictures * 2 - 1)
        last = {state.shape[-2:]: state for state in self._seen}
        return [state / state.norm(dim=1, keepdim=True).clamp_min(1e-6) for state in last.values()]


def unlike(features: Features, one: Tensor, other: Tensor) -> float:
    """Mean distance of pictures (B, 3, H, W) pair by pair, 0 to 4."""
    pairs = zip(features(one), features(other), strict=True)
    return float(torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean())


@dataclass(frozen=True)
class Price:
    """A line of the table; seconds of processor time per picture, this process's."""

    way: str
    row: Row
    unlike: float
    seconds: float


def measure(plan: Plan, adapter: str, ways: list[Way], tell: Callable[[str], None] = logger.info) -> list[Price]:
    """Each way's price; the first way is what the others are held against."""
    judges = load_judges()
    whole = _loaded(plan.model, adapter, "whole")
    names = range(HELD_OUT_FROM, HELD_OUT_FROM + plan.people)
    size = whole[0].default_size[0]
    first = protocol.drawn(judges, scenes_for(plan.seed, names, [0] * plan.people), size)
    scenes = scenes_for(plan.seed, names, [1] * plan.people)
    texts = captions_for(plan.seed, names, [1] * plan.people, scenes, subject="person")
    strangers = protocol.apart(first, protocol.drawn(judges, scenes, size))
    threshold = float(torch.quantile(strangers, 0.99))
    features = Features(judges.parsing_net)
    found: list[Price] = []
    exact: Tensor | None = None
    for one in ways:
        model, worn = whole if one.weights == "whole" else _loaded(plan.model, adapter, one.weights)
        model.tiny = None if one.tiny is None else load_tiny(one.tiny, model)
        settings = plan
        loras = []
        if one.few is not None:
            settings = replace(plan, **vars(one.few))
        if one.steps is not None:
            settings = replace(settings, steps=one.steps)
        if one.lora is not None:
            loras = [load_lora(one.lora, model)]
        tally = protocol.Tally(first.judged)
        pictures = []
        host = worn.host(model)
        host.economy = one.economy
        seconds = 0.0
        for rows in torch.arange(plan.people).split(plan.batch):
            seeds = [plan.seed + one.seed + 1_000_003 + int(row) for row in rows]
            asked = [texts[row] for row in rows.tolist()]
            begin = time.process_time()
            made = protocol.generate(settings, model, worn, first, (rows, asked, seeds), loras)
            seconds += (time.process_time() - begin) / plan.people
            pictures.append(made)
            tally.add(judges, made, asked, rows)
        host.economy = EXACT
        every = torch.cat(pictures)
        exact = every if exact is None else exact
        found.append(Price(one.name, tally.row(one.name, threshold), unlike(features, every, exact), seconds))
        tell(f"{one.name}: likeness {found[-1].row.likeness:.3f}, {seconds:.2f} s")
    return found


def _loaded(model: str, adapter: str, weights: Weights) -> tuple[Model, Adapter]:
    base = Model.from_pretrained(model, weights=weights)
    worn = load_adapter(adapter, base)
    pack(base.unet, base.vae, base.text_encoder, worn.modules(), worn.host(base).unet)
    return base, worn


def table(plan: Plan, adapter: str, prices: list[Price]) -> str:
    """The table in Markdown."""
    base = prices[0]
    lines = [
        f"## What speed costs: {plan.model}, {adapter}, {plan.steps} steps, guidance {plan.guidance}",
        "",
        f"{datetime.date.today().isoformat()}, {plan.people} held-out people, one picture each.",
        "",
        "| way | likeness | change | same person | prompt | change | face | unlike | × faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for price in prices:
        row = price.row
        lines.append(
            f"| {price.way} | {row.likeness:.3f} | {row.likeness - base.row.likeness:+.3f} | {row.tar:.1%}"
            f" | {row.obeyed:.1%} | {100 * (row.obeyed - base.row.obeyed):+.1f} | {row.found:.1%}"
            f" | {price.unlike:.3f} | {base.seconds / price.seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--adapter", default="instantid")
    parser.add_argument("--ways", nargs="+", default=["exact", "fast", "fastest"])
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=1, help="pictures made at a time")
    parser.add_argument("--out", type=Path, help="Markdown file to append to; default: standard output")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = Plan(
        options.model,
        (options.adapter,),
        options.people,
        1,
        steps=options.steps,
        guidance=options.guidance,
        batch=options.batch,
    )
    ways = [way(name, options.model) for name in options.ways]
    ways.append(Way(OTHER_NOISE, seed=500_000))
    told = table(plan, options.adapter, measure(plan, options.adapter, ways))
    Sheet(options.out).add(told + "\n")


if __name__ == "__main__":
    main()
