"""The contract of an adapter, and how adapters are found: one per file of the folder `facegen/adapters`, by listing it.

An adapter turns faces into conditions, plain data for `denoise`. Inference and training walk the same path:
`conditions` fuses the photos of one person and calls `conditions_from_embeddings`, which is differentiable.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.checkpoints import Shapes
from facegen.conditions import Condition, Scale, Span, TokenCondition
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongAdapter, WrongRequest
from facegen.models.streams import Streams
from facegen.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from facegen.face.types import Face
    from facegen.models.base import Model

logger = logging.getLogger(__name__)
V = TypeVar("V", bound=str)


class FaceLike(Protocol):
    """What an adapter reads of a face: `facegen.face`'s Face and Fused have it, any other object may."""

    @property
    def embedding(self) -> np.ndarray:
        """(D,) float32, as the recogniser gives it, not normalised."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Guest:
    """One of several people that an adapter brings in together: photos, the first with their body and clothes.

    body: (1, H, W) in [0, 1] over the first photo, None for a photo that shows nothing else; clothes: a picture.
    """

    faces: Sequence[FaceLike]
    body: Tensor | None = None
    clothes: Image.Image | None = None


class SeenFace(FaceLike, Protocol):
    """A face together with its photo."""

    @property
    def points(self) -> np.ndarray:
        """(5, 2) eyes, nose, mouth corners in pixels of the photo, left to right in the picture."""
        ...

    @property
    def image(self) -> Image.Image:
        """The whole photo, RGB."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterRequest:
    """What a picture asks of an adapter besides the faces; an adapter reads what concerns it.

    height, width: of the picture in pixels.
    prompt, negative_prompt: one for all pictures or one each; read by adapters that write the prompt (`writes_prompt`).
    scale, control_scale: strength, None for the adapter's own default; span: as in a Condition, None for the adapter's
    own (some leave the first steps to the prompt); mask (1, H, W): where it acts.
    points: (5, 2) keypoints in pixels of the picture to be made; None: where they are in the first photo.
    structure: how much of the photo's look beyond the embedding is taken over (FaceID-PlusV2), 0 to about 2.
    guidance: False where only the conditional half will run (training): the other half is then not computed.

    The tensors below stand for what is otherwise read from the photos, so that training can give them:
    control: (B, 3, H, W) in [0, 1], the drawn keypoints; clip: (B, 3, S, S) CLIP pixels of the aligned face; body:
    (B, 3, S, S) CLIP pixels of the person cut out in front of white.

    What a few adapters understand besides: edits: how far to go along named directions of StyleGAN (W+ adapter,
    PreciseControl: smile, age …); expression (B, 55), normals and reference (B, 3, H, W) in [0, 1]: see Arc2Face;
    parts: strengths of such parts by name; manner: which of the adapter's ways to act (PuLID: fidelity, style, plain),
    None for its own choice.
    """

    height: int = 512
    width: int = 512
    prompt: str | Sequence[str] = ""
    negative_prompt: str | Sequence[str] = ""
    scale: Scale | None = None
    control_scale: Scale | None = None
    span: Span | None = None
    mask: Tensor | None = None
    points: np.ndarray | None = None
    structure: float = 1.0
    guidance: bool = True
    control: Tensor | None = None
    clip: Tensor | None = None
    body: Tensor | None = None
    edits: Mapping[str, float] = field(default_factory=dict)
    expression: Tensor | None = None
    normals: Tensor | None = None
    reference: Tensor | None = None
    parts: Mapping[str, Scale] = field(default_factory=dict)
    manner: str | None = None

    def acts(self, otherwise: Span = (0.0, 1.0)) -> Span:
        """The span asked for, else `otherwise`."""
        return otherwise if self.span is None else self.span


class Adapter(ABC):
    """One way to make a picture of *you*: an encoder of faces and what it puts into the model.

    name: the file's name, by which it is loaded; title: as people write it; pack: the face pack it was made for.
    needs: "face" (an embedding), "points" and "photo" (a SeenFace). writes_prompt: its conditions hold the prompt.
    knows: which of AdapterRequest's edits, manner, expression, normals, reference it understands; together: how many
    people it can bring into one picture by itself, see `conditions_together`. variants: what `from_pretrained` takes as
    `variant`, for files whose keys leave it open.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pack: ClassVar[str]
    needs: frozenset[str]
    writes_prompt: ClassVar[bool] = False
    together: ClassVar[int] = 1
    variants: ClassVar[tuple[str, ...]] = ()

    @property
    def knows(self) -> frozenset[str]:
        return frozenset()

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        """Whether a file with these tensors is of this family; the name decides only between files with equal keys."""

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        """What is worth telling of a file: "base", "variant", "tokens", "embedding" …, of those that are known."""
        return {}

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """The files (or sub-folders) in `folder` from which this family loads."""
        return [path for path in weight_files(folder) if cls.detect(checkpoints.shapes(path), path.name)]

    @classmethod
    def choose(cls, source: str | Path, model: Model) -> Path:
        """The file that `source`, a file or a folder, stands for: of several in a folder the one made for this base.

        Raises WeightsMissing, WrongAdapter (nothing of this family), WrongRequest (several that fit).
        """
        path = Path(source).expanduser()
        if path.is_dir():
            found = cls.find(path)
        else:
            found = [path] if cls.detect(checkpoints.shapes(path), path.name) else []
        if not found:
            raise refuse(path, f"a file of {cls.title}")
        if len(found) > 1:
            width = model.text_width
            own = [one for one in found if cls.sizes(checkpoints.shapes(one), one.name).get("token width") == width]
            found = own or found
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            raise WrongRequest(f"{path} holds several {cls.title} files ({names}); name one of them.")
        return found[0]

    @classmethod
    @abstractmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> Adapter:
        """From a folder or file in the official format, in the model's precision and on its device.

        Raises WeightsMissing, CheckpointBroken, WrongAdapter (a file of another family), WrongBaseModel.
        """

    @abstractmethod
    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """Write the official file format and return what `from_pretrained` takes; OutputUnwritable.

        dtype: of the file, None for that of the weights; safe: .safetensors with the same keys instead of a pickle.
        """

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Length of the embeddings it was made for."""

    @abstractmethod
    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """embeddings (B, D) or (B, n, D), RAW as the recogniser gives them; a zero row is "no person".

        B is 1 or the number of pictures; n are several photos of one person, for adapters that take them apart.
        Differentiable in the embeddings and in the weights of `modules()`.
        """

    @abstractmethod
    def modules(self) -> nn.Module:
        """Everything that training may train."""

    def host(self, model: Model) -> Model:
        """The model in which the conditions act: `model` itself, unless the adapter brings a UNet of its own."""
        return model

    def conditions(self, faces: Sequence[FaceLike], request: AdapterRequest, model: Model) -> list[Condition]:
        """Several photos of ONE person; more people are more calls, each with its mask. Raises WrongRequest."""
        if not faces:
            raise WrongRequest(f"{self.title} needs at least one photo of a face.")
        with torch.no_grad(), model.memory.using(*self.nets(model)):
            return self.conditions_from_embeddings(self.gather(faces), model, self.complete(faces, request))

    def nets(self, model: Model) -> list[nn.Module]:
        """What makes conditions of faces, image encoders too: what `ready` and `Memory.keep` brought to the device."""
        return [one for one in _held(vars(self)) if model.memory.keeps(one)]

    def conditions_together(self, people: Sequence[Guest], request: AdapterRequest, model: Model) -> list[Condition]:
        """Several people as one, for adapters whose `together` is above 1. Raises WrongRequest."""
        raise WrongRequest(f"{self.title} brings in one person at a time.")

    def expression_of(self, names: Mapping[str, float]) -> Tensor:
        """AdapterRequest.expression (1, n) from numbers by name, for adapters that know it. Raises WrongRequest."""
        raise WrongRequest(f"{self.title} knows no expressions.")

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """Faces of one person -> embeddings (1, D) or (1, n, D); here fused into one."""
        return fused(faces)

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """The request with what must be read from the photos filled in."""
        return request

    def check_embeddings(self, embeddings: Tensor) -> None:
        """WrongRequest unless they have the length this adapter was made for."""
        if embeddings.shape[-1] != self.embedding_dim:
            raise WrongRequest(
                f"{self.title} was made for face embeddings of {self.embedding_dim} numbers, but the face pack gives"
                f" {embeddings.shape[-1]}; choose the pack that belongs to the adapter."
            )


# --- faces ----------------------------------------------------------------------------------------------------------


def stacked(faces: Sequence[FaceLike]) -> Tensor:
    """(1, n, D), RAW."""
    return torch.stack([torch.as_tensor(face.embedding, dtype=torch.float32) for face in faces])[None]


def fused(faces: Sequence[FaceLike]) -> Tensor:
    """(1, D), RAW-scaled: one embedding of several photos of a person."""
    if len(faces) == 1:
        return stacked(faces)[0]
    from facegen.face.fuse import fuse

    whole = fuse(cast("Sequence[Face]", faces))
    if whole.warning:
        logger.warning("%s", whole.warning)
    return stacked([whole])[0]


def seen(faces: Sequence[FaceLike], why: str) -> SeenFace:
    """The first face together with its photo; WrongRequest, with `why`, for an embedding alone."""
    first = faces[0]
    first = getattr(first, "face", first)  # of a fused person the photo nearest to the mean
    if not (hasattr(first, "points") and hasattr(first, "image")):
        raise WrongRequest(why)
    return cast("SeenFace", first)


def unit(embeddings: Tensor) -> Tensor:
    """L2-normalised in float32; zero rows stay zero."""
    return nn.functional.normalize(embeddings.float(), dim=-1).to(embeddings.dtype)


def given(embeddings: Tensor, sees: Preprocessing) -> Tensor:
    """RAW embeddings as the system was published to read them: as they are, or L2-normalised."""
    return unit(embeddings) if sees.embedding == "unit" else embeddings


def with_zeros(embeddings: Tensor, guidance: bool) -> Tensor:
    """[zeros (1, …) ; embeddings (B, …)]: what goes through a projector when both halves are wanted."""
    return torch.cat([torch.zeros_like(embeddings[:1]), embeddings]) if guidance else embeddings


def halves(tokens: Tensor, guidance: bool) -> Tensor:
    """What came out for `with_zeros` -> Pair (2, B, …). Without guidance row 0 is never looked at."""
    if not guidance:
        return tokens.expand(2, *tokens.shape)
    uncond, cond = tokens[:1], tokens[1:]
    return torch.stack([uncond.expand_as(cond), cond])


AFTER = 1e-6  # the step at which the delay ends is still without the face (`<=` in the official loops)


def delayed(share: float) -> tuple[float, float]:
    """The span that leaves out the steps i (from 0) with i <= share · steps."""
    return (min(share + AFTER, 1.0), 1.0)


# --- modules --------------------------------------------------------------------------------------------------------


def beside_text(tokens: Tensor, streams: Streams, request: AdapterRequest, strength: Scale) -> TokenCondition:
    """Tokens (2, B, N, width) in a stream of their own, as the request asks; strength: where it leaves that open."""
    return TokenCondition(
        tokens=tokens,
        layers=streams.layers,
        lora=streams.lora,
        scale=strength if request.scale is None else request.scale,
        span=request.acts(),
        mask=request.mask,
    )


def ready(module: nn.Module, model: Model) -> None:
    """For inference: where the model is, in its precision, without gradients."""
    model.memory.keep(module, model.dtype).requires_grad_(False).eval()


def trainable(module: nn.Module, model: Model) -> None:
    """For training: where the model is, in float32, with gradients."""
    module.to(model.device, torch.float32).requires_grad_(True).train()


def said(asked: V | None, read: V, file: Path, alike: tuple[V, V]) -> V:
    """The variant of a file that is `read` by keys and name: as asked where both are among those with `alike` keys."""
    if asked is None or asked == read or {asked, read} == set(alike):
        return asked or read
    raise WrongRequest(f"{file} is a file of the variant {read}, by its keys, not {asked}; leave the variant out.")


def _held(value: object) -> Iterator[nn.Module]:
    """The nets in an adapter's fields; not the weights of its streams, which `Model.prepare` lends, nor ControlNets."""
    if isinstance(value, nn.Module):
        if not isinstance(value, Streams) and not hasattr(value, "controlnet_cond_embedding"):
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _held(one)
    elif dataclasses.is_dataclass(value):
        yield from _held({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})


# --- finding --------------------------------------------------------------------------------------------------------


def find_adapters() -> dict[str, type[Adapter]]:
    """Every adapter by name, from the files of `facegen/adapters`."""
    import facegen.adapters as package

    folder = Path(package.__file__ or "").parent
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        module = importlib.import_module(f"{package.__name__}.{path.stem}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Adapter) and kind.__module__ == module.__name__:
                assert kind.name == path.stem, f"{kind} in {path.name} must be called {path.stem}"
                found[path.stem] = kind
    return found


def load_adapter(source: str | Path, model: Model, *, variant: str | None = None) -> Adapter:
    """By name ("instantid"), by folder or by file; the family is detected from the keys.

    A name is looked for beside the model (`adapters/<name>` beside the embedded base), then by the hub. variant: which
    one the file is where its keys leave that open ("plusv2"), instead of what its name says; also in the source itself,
    "face.bin=plusv2". Raises WeightsMissing, WrongAdapter, CheckpointBroken, WrongBaseModel, WrongRequest (variant).
    """
    return load(with_variant(source, variant), model)[0]


def with_variant(source: str | Path, variant: str | None) -> str:
    """A source with the variant it is said to be, "face.bin=plusv2"; as it is without one."""
    return str(source) if variant is None else f"{source}={variant}"


def told_variant(source: str | Path) -> tuple[str, str | None]:
    """What `with_variant` put together; a path that is there, or whose last part has a suffix, is whole."""
    told = str(source)
    name, equals, variant = told.rpartition("=")
    whole = not equals or not name or "/" in variant or Path(variant).suffix in checkpoints.SUFFIXES
    return (told, None) if whole or Path(told).expanduser().exists() else (name, variant)


def load(source: str | Path, model: Model, *, commercial_only: bool = False) -> tuple[Adapter, Path]:
    """As `load_adapter`, and the path it was loaded from.

    commercial_only: NotCommercial, with the reason, for weights whose terms, or those of the recogniser that they work
    with, forbid commercial use.
    """
    from facegen import hub

    source, variant = told_variant(source)
    path = Path(source).expanduser()
    kind = None
    if not path.exists():
        name = str(source)
        kind = find_adapters().get(name)
        # diffusers keeps in the UNet's configuration where it came from: …/base/unet
        origin = Path(model.unet.config.get("_name_or_path") or "")
        beside = origin.parent.parent / "adapters" / name
        if origin.is_dir() and beside.is_dir():
            path = beside
        else:
            if commercial_only:
                hub.check_commercial(name)
            path = hub.resolve(name)
    kind = kind or recognise(path)
    if variant is not None:
        kind = _of_variant(kind, variant, source)
    if commercial_only and not hub.own(path):
        hub.check_commercial_family(kind.name, variant or str(describe(path).sizes.get("variant")))
    if variant is not None:
        return cast(Any, kind).from_pretrained(path, model, variant=variant), path
    return kind.from_pretrained(path, model), path


def _of_variant(kind: type[Adapter], variant: str, source: str) -> type[Adapter]:
    """The family that has this variant: the file's own by its keys, else the only one; WrongRequest."""
    if variant in kind.variants:
        return kind
    others = [one for one in find_adapters().values() if variant in one.variants]
    if len(others) == 1:
        return others[0]
    there = f"; there are: {', '.join(kind.variants)}" if kind.variants else "s to choose from; leave it out"
    raise WrongRequest(
        f"{source} is a file of {kind.title}, which has no variant"
        + (f" {variant!r}" if kind.variants else "")
        + f"{there} (how strongly it acts is said by strength)."
    )


def recognise(path: Path) -> type[Adapter]:
    """The family of a file or folder; WrongAdapter says what it is instead."""
    for kind in find_adapters().values():
        if kind.find(path) if path.is_dir() else kind.detect(checkpoints.shapes(path), path.name):
            return kind
    raise refuse(path, "an adapter that facegen knows")


def refuse(path: Path, wanted: str) -> FacegenError:
    """The error for a path that does not hold `wanted`; it says what is there, where that is known."""
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        return WeightsMissing(f"{path} holds no weights ({', '.join(checkpoints.SUFFIXES)}) of {wanted}.")
    shapes = checkpoints.shapes(files[0])
    for kind in find_adapters().values():
        if kind.detect(shapes, files[0].name):
            return WrongAdapter(f"{files[0]} is a file of {kind.title}, not {wanted}; load it as {kind.name!r}.")
    return checkpoints.refuse(files[0], shapes, wanted)


def weight_files(folder: Path) -> list[Path]:
    """Checkpoints directly in a folder, without the LoRA companions that only repeat what the adapter's file holds."""
    files = sorted(path for path in folder.iterdir() if path.suffix in checkpoints.SUFFIXES and path.is_file())
    return [path for path in files if not path.stem.endswith("_lora") and not path.stem.startswith("lora_params")]


# --- telling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What is in a file or folder of weights.

    family: the adapter's title or another kind of weights; base: the base model it was made for; sizes: variant,
    tokens, widths, as far as known; tensors and parameters: how many.
    """

    path: Path
    family: str
    base: str
    tensors: int
    parameters: int
    adapter: str | None = None
    sizes: Mapping[str, int | str] = field(default_factory=dict)


def describe(path: Path) -> Description:
    """Tell what a file or folder is, without loading it; WeightsMissing or CheckpointBroken."""
    kind = None
    for candidate in find_adapters().values():
        if path.is_dir():
            found = candidate.find(path)
        else:
            found = [path] if candidate.detect(checkpoints.shapes(path), path.name) else []
        if found:
            kind, path = candidate, found[0]
            break
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in checkpoints.SUFFIXES)
        if not files:
            raise WeightsMissing(f"{path} holds no weights ({', '.join(checkpoints.SUFFIXES)}).")
    else:
        files = [path]
    shapes = checkpoints.shapes(files[0])
    try:
        sizes = dict(kind.sizes(shapes, path.name)) if kind else {}
    except KeyError as missing:
        raise CheckpointBroken(f"{path} lacks {missing.args[0]}; fetch the file again.") from missing
    return Description(
        path=path,
        family=kind.title if kind else checkpoints.foreign(shapes) or "unknown",
        base=str(sizes.pop("base", "unknown")),
        tensors=len(shapes),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        adapter=kind.name if kind else None,
        sizes=sizes,
    )
