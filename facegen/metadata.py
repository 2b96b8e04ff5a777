"""The call that made a picture, written into the picture: rebuilt by ``facegen read``.

A PNG carries the whole call as JSON in the text chunk ``facegen``, and what other programs read: the software, an
"AI-generated" remark and the IPTC digital source type in XMP. Photos are recorded by path and SHA-256, never by pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from facegen import __version__
from facegen.errors import BadImage, NoMetadata, WrongRequest
from facegen.images import load_rgb, save_png, to_pil
from facegen.request import Photo

CHUNK = "facegen"
AI_GENERATED = "AI-generated picture of a person"
# IPTC NewsCodes: media made by a model trained on samples
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    f'Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}" xmp:CreatorTool="facegen {__version__}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def marks() -> dict[str, str]:
    """What other programs read in a PNG: the software, and that the picture is generated."""
    return {"Software": f"facegen {__version__}", "Comment": AI_GENERATED, "XML:com.adobe.xmp": _XMP}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture's origin, as plain data.

    pipeline: the file of pipelines/ that made it ("generate"); loaded: model, adapters and their checksums, precision;
    request: the fields of the request, photos as {"path", "sha256"}; index: which of the request's pictures this is;
    noise: what is known of noise that was given instead of the seed's, else empty.
    """

    pipeline: str
    loaded: Mapping[str, Any]
    request: Mapping[str, Any]
    index: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    noise: str = ""

    def photos(self) -> list[dict[str, Any]]:
        """The records of all photos of the request: {"path", "sha256"} each."""
        found: list[dict[str, Any]] = []

        def gather(value: Any) -> None:
            if isinstance(value, dict) and "sha256" in value:
                found.append(value)
            elif isinstance(value, (dict, list)):
                for one in value.values() if isinstance(value, dict) else value:
                    gather(one)

        gather(dict(self.request))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in the PNG."""
        return {CHUNK: self.version, "ai_generated": True, **asdict(self)}

    def chunks(self) -> dict[str, str]:
        """The PNG text chunks."""
        return {CHUNK: json.dumps(self.to_json(), ensure_ascii=False), **marks()}

    @classmethod
    def from_text(cls, text: str, where: str = "picture") -> Record:
        """Raises :class:`NoMetadata` when the text is not what :meth:`chunks` writes."""
        try:
            values = json.loads(text)
            known = {name: values[name] for name in ("pipeline", "loaded", "request", "index", "report", "version")}
            record = cls(**known, noise=str(values.get("noise", "")))  # older pictures do not have it
        except (ValueError, KeyError, TypeError) as error:
            raise NoMetadata(f"The metadata of {where} is damaged; facegen cannot rebuild its call.") from error
        if not isinstance(record.request, dict) or not isinstance(record.loaded, dict):
            raise NoMetadata(f"The metadata of {where} is damaged; facegen cannot rebuild its call.")
        return record


class Picture(Image.Image):
    """A PIL picture that knows where it comes from and says so in the PNG it is saved to.

    Whatever PIL makes of it (a crop, a resize) is an ordinary picture without the record, for it is another picture.
    """

    record: Record | None = None

    @classmethod
    def of(cls, image: Image.Image, record: Record | None) -> Picture:
        picture = cls()
        # The pickle protocol is PIL's only public way to fill a subclass; it copies the pixels.
        picture.__setstate__(image.__getstate__())
        picture.record = record
        return picture

    def with_report(self, report: Mapping[str, Any]) -> Picture:
        assert self.record is not None
        return Picture.of(self, replace(self.record, report=report))

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002 PIL's own name
        """As PIL's; a PNG at a path gets its record and is written whole or not at all.

        Raises :class:`facegen.errors.OutputUnwritable`.
        """
        is_path = isinstance(fp, (str, os.PathLike))
        if is_path and self.record is not None and not params and _is_png(fp, format):
            save_png(self, fp, self.record.chunks())
        else:
            super().save(fp, format, **params)


def _is_png(path: str | os.PathLike[str], format_name: str | None) -> bool:
    return (format_name or Path(path).suffix.removeprefix(".")).lower() == "png"


def read(path: str | os.PathLike[str]) -> Record:
    """The record in a PNG; raises :class:`BadImage` for no picture and :class:`NoMetadata` where there is none."""
    load_rgb(path, what="picture")  # says in a sentence what is wrong with the file, if anything
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        text = getattr(image, "text", {}).get(CHUNK) or image.info.get(CHUNK)
    if not isinstance(text, str):
        raise NoMetadata(
            f"{os.fspath(path)} carries no facegen metadata; only PNGs saved by facegen do, "
            "and editors and chat programs remove it."
        )
    return Record.from_text(text, os.fspath(path))


def photo_record(photo: Photo, read_named: Callable[[str], Image.Image] | None = None) -> dict[str, Any]:
    """How a photo is written down: path as given and SHA-256 of the file, or of the pixels where there is no file.

    `read_named` draws photos that have a name instead of a file ("example:3").
    """
    if isinstance(photo, (str, os.PathLike)):
        name = os.fspath(photo)
        if read_named is not None and is_named(name):
            return {"path": name, "sha256": _pixels(read_named(name))}
        return {"path": name, "sha256": file_checksum(Path(name))}
    if isinstance(photo, bytes):
        return {"path": None, "sha256": hashlib.sha256(photo).hexdigest()}
    return {"path": None, "sha256": _pixels(load_rgb(photo))}


def is_named(photo: Photo) -> bool:
    """Whether a photo is one of the drawn example people rather than a file."""
    return isinstance(photo, str) and photo.startswith("example:")


def _pixels(image: Image.Image) -> str:
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes()).hexdigest()


def photo_read(record: Any) -> Photo:
    """The path of a recorded photo; raises :class:`WrongRequest` where it had none."""
    path = record.get("path") if isinstance(record, Mapping) else record
    if not isinstance(path, str):
        raise WrongRequest("The call used a photo that was not a file; give it again with --faces.")
    return path


def changed(record: Mapping[str, Any], read_named: Callable[[str], Image.Image] | None = None) -> str:
    """Empty when a recorded photo is still what it was, else a sentence."""
    path = photo_read(record)
    if not is_named(path) and not Path(path).is_file():
        return f"The photo {path} is not there any more."
    now = photo_record(path, read_named)["sha256"]
    return "" if now == record.get("sha256") else f"The photo {path} has changed since the picture was made."


def file_checksum(path: Path) -> str:
    """SHA-256 of a file; raises :class:`BadImage` when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BadImage(f"{path} cannot be read: {error.strerror}; check the path.") from error
    return digest.hexdigest()


def as_picture(tensor: Any, record: Record) -> Picture:
    """A picture from a tensor (3, H, W) in [0, 1]."""
    return Picture.of(to_pil(tensor), record)
