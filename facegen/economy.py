"""What a run may leave out to be faster, at a price in exactness; nothing unless it is asked for.

Guidance in a part of the run only: Kynkäänniemi et al., arXiv 2404.07724. Deep features taken over from an earlier
step: DeepCache, arXiv 2312.00858.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from facegen.conditions import Condition, ControlCondition, Span, in_span
from facegen.errors import WrongRequest


@dataclass(frozen=True, kw_only=True)
class Economy:
    """guidance: the part of the run in which both halves are computed; outside it the conditional half alone.

    control: ControlNets stop after this part of the run, in [0, 1].
    control_both: whether ControlNets steer both halves of guidance, or the conditional one alone.
    reuse: the whole UNet and the ControlNets run in every `reuse`-th step only; between them the outermost blocks run
    on fresh latents, and what lies deeper is taken over from the last whole step. 1: every step is whole.
    whole: in this first part of the run, where the face takes shape, every step is whole.
    least: a run of fewer steps leaves nothing out; those of a distilled model are few, and each of them counts.
    """

    guidance: Span = (0.0, 1.0)
    control: float = 1.0
    control_both: bool = True
    reuse: int = 1
    whole: float = 0.0
    least: int = 0

    def __post_init__(self) -> None:
        start, end = self.guidance
        if not (0.0 <= start <= end <= 1.0 and 0.0 <= self.control <= 1.0 and 0.0 <= self.whole <= 1.0):
            raise WrongRequest(f"The parts of a run must lie in [0, 1] and in order, not {self}.")
        if self.reuse < 1:
            raise WrongRequest(f"Deep features can be reused in every 1st, 2nd, 3rd … step, not in every {self.reuse}.")

    def over(self, total: int) -> Economy:
        """What a run of `total` steps may leave out."""
        return EXACT if total < self.least else self

    def guides(self, index: int, total: int) -> bool:
        """Whether both halves are computed in step `index` of `total`."""
        return in_span(self.guidance, index, total)

    def is_whole(self, index: int, total: int) -> bool:
        """Whether nothing is taken over in this step."""
        last = max(int(self.whole * total + 1e-6) - 1, 0)  # of the first part; counted from it
        return index <= last or (index - last) % self.reuse == 0

    def shorten(self, conditions: Sequence[Condition]) -> list[Condition]:
        """The conditions with ControlNets that stop in time, and steer the halves that they may."""
        if self.control == 1.0 and self.control_both:
            return list(conditions)
        return [
            replace(
                one,
                span=(min(one.span[0], self.control), min(one.span[1], self.control)),
                both=one.both and self.control_both,
            )
            if isinstance(one, ControlCondition)
            else one
            for one in conditions
        ]


EXACT = Economy()
PRESETS: Mapping[str, Economy] = {
    "exact": EXACT,
    "fast": Economy(guidance=(0.0, 0.7), control=0.7, reuse=2, whole=0.2, least=10),
    "fastest": Economy(guidance=(0.0, 0.3), control=0.3, reuse=5, whole=0.1, least=10),
}


def preset(name: str) -> Economy:
    """By name; raises WrongRequest with the list of names."""
    if name not in PRESETS:
        raise WrongRequest(f"There is no preset {name!r} of speed; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
