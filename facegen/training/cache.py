"""Training pictures of the face world, drawn once and kept as arrays that are read through memory maps.

A cache is a folder of shards ``00000/``, each with one ``.npy`` file per field; a
shard is renamed into place when it is whole. So a killed rendering goes on where it stopped, and several
workers (or machines) can fill one folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facegen.errors import Cancelled, WeightsMissing, WrongRequest
from facegen.files import write_json
from facegen.world.parameters import GROUPS, Scenes

logger = logging.getLogger(__name__)
PLAN = "plan.json"


@dataclass(frozen=True)
class CachePlan:
    """Which pictures a cache holds: the world's seed, people ``first`` to ``first + people - 1``, how many each."""

    first: int
    people: int
    pictures: int  # of each person
    seed: int = 0
    size: int = 128  # pixels
    shard_people: int = 20

    @property
    def shards(self) -> int:
        return -(-self.people // self.shard_people)

    def names(self, shard: int) -> tuple[list[int], list[int]]:
        """People and picture numbers of one shard, a person's pictures side by side."""
        start = self.first + shard * self.shard_people
        numbers = range(start, min(start + self.shard_people, self.first + self.people))
        people = [person for person in numbers for _ in range(self.pictures)]
        return people, list(range(self.pictures)) * len(numbers)


def render_cache(folder: Path, plan: CachePlan, worker: int = 0, workers: int = 1) -> int:
    """Draw the shards ``worker``, ``worker + workers``, … that are not there yet; returns how many were drawn.

    Raises :class:`WrongRequest` when the folder was begun with another plan. A larger number of people is welcome.
    """
    from tqdm import tqdm

    _agree(folder, plan)
    drawn = 0
    for shard in tqdm(range(worker, plan.shards, workers), desc=f"worker {worker}", mininterval=20.0):
        if (folder / f"{shard:05d}").is_dir():
            continue
        drawn += keep_shard(folder, shard, _draw(plan, *plan.names(shard)))
    return drawn


def keep_shard(folder: Path, shard: int, arrays: Mapping[str, np.ndarray]) -> bool:
    """Write a shard's fields; False if another worker was faster."""
    unfinished = folder / f".{shard:05d}.{os.getpid()}"
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(unfinished / f"{name}.npy", array)
    try:
        os.rename(unfinished, folder / f"{shard:05d}")
    except OSError:
        shutil.rmtree(unfinished)
        return False
    return True


def stored_pixels(rgb: Tensor) -> np.ndarray:
    """Drawn pictures (B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8, as a cache keeps them."""
    pixels: np.ndarray = (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels


def _agree(folder: Path, plan: CachePlan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    wanted = asdict(plan)
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        different = [name for name, value in wanted.items() if found.get(name) != value and name != "people"]
        if different:
            raise WrongRequest(f"{folder} was begun with another {', '.join(different)}; choose another folder.")
        wanted["people"] = max(wanted["people"], found["people"])
    write_json(path, wanted)


def _draw(plan: CachePlan, people: Sequence[int], pictures: Sequence[int], batch: int = 20) -> dict[str, np.ndarray]:
    """One shard: uint8 pictures and parsing, float16 points in pixels, float32 parameters."""
    from facegen.world.render import render
    from facegen.world.sampling import scenes_for

    scenes = scenes_for(plan.seed, people, pictures)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(scenes), batch):
        drawn = render(scenes[start : start + batch], plan.size)
        fields = {
            "rgb": stored_pixels(drawn.rgb),  # (B, H, W, 3)
            "parsing": drawn.parsing.byte().numpy(),  # (B, H, W)
            "landmarks5": drawn.landmarks5.half().numpy(),  # (B, 5, 2)
            "landmarks68": drawn.landmarks68.half().numpy(),  # (B, 68, 2)
            "box": drawn.box.half().numpy(),  # (B, 4)
        }
        for name, array in fields.items():
            parts.setdefault(name, []).append(array)
    arrays = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    arrays |= {group: getattr(scenes, group).numpy() for group in GROUPS}
    arrays["person"] = np.asarray(people, np.int32)
    arrays["picture"] = np.asarray(pictures, np.int32)
    return arrays


class Cache:
    """Reads the shards that are in the folder now; later ones are seen by the next ``Cache``.

    ``fields`` chooses what is mapped. Indices run over all pictures, 0 to ``len(cache) - 1``.
    """

    def __init__(self, folder: Path, shards: slice = slice(None)) -> None:
        found = sorted(path for path in folder.glob("[0-9]*") if path.is_dir())[shards]
        if not found:
            raise WeightsMissing(
                f"There are no rendered pictures in {folder}; draw some: "
                f"python -m facegen.training.cache --folder {folder} --people 200 --pictures 10"
            )
        self.folder = folder
        self._shards = [
            {path.stem: np.load(path, mmap_mode="r") for path in sorted(shard.glob("*.npy"))} for shard in found
        ]
        counts = [len(shard["person"]) for shard in self._shards]
        self._ends = np.cumsum(counts)
        self.person = torch.from_numpy(np.concatenate([shard["person"] for shard in self._shards]).astype(np.int64))
        self.picture = torch.from_numpy(np.concatenate([shard["picture"] for shard in self._shards]).astype(np.int64))
        self.people, self.label = self.person.unique(return_inverse=True)  # label: 0 to number of people - 1

    def __len__(self) -> int:
        return int(self._ends[-1])

    def field(self, name: str, rows: Tensor) -> Tensor:
        """Rows (B,) int64 of one field, in the stored type: rgb is (B, H, W, 3) uint8."""
        numbers = rows.numpy()
        shards = np.searchsorted(self._ends, numbers, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        picked = [self._shards[s][name][n - starts[s]] for s, n in zip(shards.tolist(), numbers.tolist(), strict=True)]
        return torch.from_numpy(np.stack(picked))

    def whole(self, name: str) -> Tensor:
        """All rows of one field in memory; for small ones and for pictures when there is room."""
        return torch.from_numpy(np.concatenate([shard[name] for shard in self._shards]))

    def rgb(self, rows: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]."""
        return self.field("rgb", rows).permute(0, 3, 1, 2).float() / 255.0

    def scenes(self, rows: Tensor) -> Scenes:
        return Scenes(*(self.field(group, rows).float() for group in GROUPS))

    def same_person_pairs(self, generator: torch.Generator, count: int) -> Tensor:
        """(count, 2) rows of two different pictures of one person."""
        order = torch.argsort(self.label, stable=True)
        sizes = torch.bincount(self.label)
        starts = torch.cumsum(sizes, 0) - sizes
        usable = (sizes > 1).nonzero()[:, 0]
        who = usable[torch.randint(len(usable), (count,), generator=generator)]
        first = (torch.rand(count, generator=generator) * sizes[who]).long()
        step = 1 + (torch.rand(count, generator=generator) * (sizes[who] - 1)).long()
        second = (first + step) % sizes[who]
        return torch.stack([order[starts[who] + first], order[starts[who] + second]], 1)


def shuffled(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The rows of training step ``step``: epochs of a seeded shuffle, so that no state need be kept. (batch,) int64."""
    per_epoch = max(1, count // batch)
    epoch, place = divmod(step, per_epoch)
    order = _permutation(count, seed * 1_000_003 + epoch)
    return order[place * batch : (place + 1) * batch] if count >= batch else order.repeat(-(-batch // count))[:batch]


_last_permutation: tuple[tuple[int, int], Tensor] | None = None


def _permutation(count: int, seed: int) -> Tensor:
    global _last_permutation  # one permutation is used for a whole epoch
    if _last_permutation is None or _last_permutation[0] != (count, seed):
        _last_permutation = (count, seed), torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _last_permutation[1]


def _spawn(folder: Path, plan: CachePlan, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """One process of one thread per worker: threads of one process get in each other's way here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for worker in range(workers):
        options: Mapping[str, object] = {
            "folder": folder, "people": plan.people, "pictures": plan.pictures, "first": plan.first,
            "seed": plan.seed, "size": plan.size, "workers": workers, "worker": worker,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        yield subprocess.Popen([sys.executable, "-m", "facegen.training.cache", *words], env=environment)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apart(folder: Path, plan: CachePlan, workers: int) -> int:
    """The worst exit status of so many processes; none of them outlives this one."""
    processes = list(_spawn(folder, plan, workers))
    try:
        return max(abs(process.wait()) for process in processes)
    finally:
        for process in processes:
            process.terminate()


def fill_cache(folder: Path, plan: CachePlan, workers: int | None = None) -> None:
    """Draw what a cache still lacks, with so many processes; None: as many as there are cores.

    Raises what :func:`render_cache` raises, and :class:`Cancelled` on Ctrl-C; whole shards stay.
    """
    workers = cores() if workers is None else workers
    try:
        if workers > 1 and sum((folder / f"{shard:05d}").is_dir() for shard in range(plan.shards)) < plan.shards - 1:
            _agree(folder, plan)
            if _apart(folder, plan, min(workers, plan.shards)):
                logger.warning("Drawing in several processes failed; what is missing is drawn in this one.")
        render_cache(folder, plan)
    except KeyboardInterrupt:
        raise Cancelled(f"Stopped; the same call goes on where {folder} ends now.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw training pictures of the face world into a folder.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--people", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=10, help="of each person")
    parser.add_argument("--first", type=int, default=0, help="number of the first person; 100000 and up are held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--worker", type=int, default=None, help="draw only this worker's shards, in this process")
    options = parser.parse_args(arguments)
    plan = CachePlan(options.first, options.people, options.pictures, options.seed, options.size)
    if options.worker is None and options.workers > 1:
        return _apart(options.folder, plan, options.workers)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        render_cache(options.folder, plan, options.worker or 0, options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
