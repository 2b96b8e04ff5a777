"""A weight by name: its pinned source, its checksum, its licence, and where it lies on this machine.

Nothing is downloaded unasked: `resolve` looks at what is there and says what is missing; `fetch`, or the environment
variable FACEGEN_DOWNLOAD=1, allows the network. FACEGEN_HOME is the folder of weights (default ~/.cache/facegen).
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from facegen.errors import CheckpointBroken, OutputUnwritable, WeightsMissing

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
CHECKSUMS = "SHA256SUMS"  # beside a folder of weights: sha256sum's format

_INSIGHTFACE_TERMS = "non-commercial research only (insightface's model terms)"
_PACKS = "https://github.com/deepinsight/insightface/releases/download/model-zoo"


@dataclass(frozen=True)
class File:
    """One file of a set of weights."""

    path: str  # in its repository, forward slashes; may be a pattern with *
    sha256: str | None = None  # None: not known to us, so it is used unverified


@dataclass(frozen=True)
class Weights:
    """A set of weights that has a name."""

    name: str
    kind: str  # base, adapter, pack, encoder, restorer
    licence: str
    files: tuple[File, ...]  # what must be there
    repo: str | None = None  # on the Hugging Face hub
    revision: str | None = None  # None: not pinned
    archive: File | None = None  # a zip by URL instead of a repository
    commercial: bool = True
    any_file: bool = False  # one of the files is enough
    note: str = ""
    page: str | None = None  # where people get it, when it is on no hub

    @property
    def source(self) -> str:
        if self.page is not None:
            return self.page
        if self.archive is not None:
            return self.archive.path
        return f"https://huggingface.co/{self.repo}" if self.repo else "part of facegen"

    @property
    def verified(self) -> bool:
        """Whether every file with numbers in it has a known checksum."""
        if self.archive is not None:
            return self.archive.sha256 is not None
        return all(file.sha256 for file in self.files if not file.path.endswith(".json"))


def _nix(digest: str) -> str:
    return base64.b64decode(digest).hex()


WEIGHTS: Mapping[str, Weights] = {
    weights.name: weights
    for weights in (
        Weights(
            "mini",
            "base",
            "Apache-2.0; trained on drawn people, no real person's likeness in it",
            (File("base/model_index.json"), File("pack/det.onnx"), File("pack/rec.onnx")),
            note="embedded: base model, face analysis, adapters and judges",
        ),
        Weights(
            "sd15",
            "base",
            "CreativeML OpenRAIL-M",
            (
                File("model_index.json"),
                File("unet/config.json"),
                File("unet/diffusion_pytorch_model*"),
                File("vae/config.json"),
                File("text_encoder/config.json"),
                File("tokenizer/vocab.json"),
            ),
            repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        ),
        Weights(
            "sdxl",
            "base",
            "CreativeML OpenRAIL++-M",
            (
                File("model_index.json"),
                File("unet/config.json"),
                File("unet/diffusion_pytorch_model*"),
                File("vae/config.json"),
                File("text_encoder/config.json"),
                File("text_encoder_2/config.json"),
                File("tokenizer/vocab.json"),
            ),
            repo="stabilityai/stable-diffusion-xl-base-1.0",
            revision="462165984030d82259a11f4367a4eed129e94a7b",
        ),
        Weights(
            "sd21",
            "base",
            "CreativeML OpenRAIL++-M",
            (
                File("model_index.json"),
                File("unet/config.json"),
                File("unet/diffusion_pytorch_model*"),
                File("vae/config.json"),
                File("text_encoder/config.json"),
                File("tokenizer/vocab.json"),
            ),
            repo="stabilityai/stable-diffusion-2-1-base",
        ),
        Weights(
            "arc2face",
            "adapter",
            "MIT; its recogniser arcface.onnx: " + _INSIGHTFACE_TERMS,
            (
                File("arc2face/config.json"),
                File("arc2face/diffusion_pytorch_model.safetensors"),
                File("encoder/config.json"),
                File("encoder/pytorch_model.bin"),
                File("arcface.onnx"),
            ),
            repo="FoivosPar/Arc2Face",
            commercial=False,
            note="needs sd15 and antelopev2's detector; controlnet/, exp_adapter/ and ref_adapter/ beside it are used",
        ),
        Weights(
            "instantid",
            "adapter",
            "Apache-2.0; works with antelopev2: " + _INSIGHTFACE_TERMS,
            (
                File("ip-adapter.bin", "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1"),
                File("ControlNetModel/config.json"),
                File(
                    "ControlNetModel/diffusion_pytorch_model.safetensors",
                    "c8127be9f174101ebdafee9964d856b49b634435cf6daa396d3f593cf0bbbb05",
                ),
            ),
            repo="InstantX/InstantID",
            revision="57b32dfee076092ad2930c71fd6d439c2c3b1820",
            commercial=False,
            note="needs sdxl and antelopev2",
        ),
        Weights(
            "ip_adapter_faceid",
            "adapter",
            _INSIGHTFACE_TERMS,
            (
                File("ip-adapter-faceid_sd15.bin", "201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7"),
                File("ip-adapter-faceid-plus_sd15.bin"),
                File("ip-adapter-faceid-plusv2_sd15.bin", _nix("JtDYah1g1syBHTuIYheLRh4e62Ueb+K3K6F6qVQR4xM=")),
                File("ip-adapter-faceid-portrait_sd15.bin"),
                File(
                    "ip-adapter-faceid-portrait-v11_sd15.bin",
                    "a48cb4f89ed18e02c6000f65aa9efec452e87eaed4a1bc9fcf4a460c8d0e3bc6",
                ),
                File("ip-adapter-faceid_sdxl.bin", "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e"),
                File("ip-adapter-faceid-plusv2_sdxl.bin", _nix("xpRdgrVDcAzDzLuY02O4N+nFligWB4V8dLcTqHba9fs=")),
                File(
                    "ip-adapter-faceid-portrait_sdxl.bin",
                    "5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512",
                ),
                File(
                    "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
                    "220bb86e205393a3d0411631cb473caddbf35fd371be2905ca9008818170db55",
                ),
            ),
            repo="h94/IP-Adapter-FaceID",
            revision="43907e6f44d079bf1a9102d9a6e56aef7a219bae",
            commercial=False,
            any_file=True,
            note="needs sd15 or sdxl, buffalo_l, and clip-vit-h for the plus variants",
        ),
        Weights(
            "ip_adapter",
            "adapter",
            "Apache-2.0",
            (
                File("models/ip-adapter_sd15.bin"),
                File("models/ip-adapter-plus_sd15.bin"),
                File("models/ip-adapter-plus-face_sd15.bin"),
                File("models/ip-adapter-full-face_sd15.bin"),
                File("sdxl_models/ip-adapter_sdxl.bin"),
                File("sdxl_models/ip-adapter_sdxl_vit-h.bin"),
                File(
                    "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
                    "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
                ),
                File(
                    "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
                    "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
                ),
            ),
            repo="h94/IP-Adapter",
            revision="018e402774aeeddd60609b4ecdb7e298259dc729",
            any_file=True,
            note="needs sd15 or sdxl, and models/image_encoder (sdxl_models/image_encoder for ip-adapter_sdxl)",
        ),
        Weights(
            "wplus",
            "adapter",
            "S-Lab 1.0: non-commercial",
            (File("wplus_adapter.bin"), File("e4e_ffhq_encode.pt")),
            commercial=False,
            note="needs sd15; edit directions in w_direction/ beside it",
            page="https://github.com/csxmli2016/w-plus-adapter/releases/tag/v1",
        ),
        Weights(
            "facechain_fact",
            "adapter",
            "Apache-2.0 (the project's); its recogniser learnt from MS1MV2, for research only",
            (File("adapter_*.ckpt"), File("ms1mv2_model_TransFace_S.pt")),
            commercial=False,
            note="needs sd15 (made with majicmixRealistic_v6 or a film model, revision v1.0.0)",
            page="https://modelscope.cn/models/yucheng1996/FaceChain-FACT",
        ),
        Weights(
            "id_animator",
            "adapter",
            "not stated by its authors",
            (File("animator.ckpt"),),
            commercial=False,
            note="needs sd15 (made with Realistic Vision V6.0) and clip-vit-h or its own image_encoder/",
            page="https://huggingface.co/spaces/ID-Animator/ID-Animator",
        ),
        Weights(
            "precisecontrol",
            "adapter",
            "MIT (the project's); e4e and its face code learnt from FFHQ: non-commercial",
            (File("embeddings_gs-*.pt"), File("e4e_ffhq_encode.pt")),
            commercial=False,
            note="needs sd21; LoRA of a person as lora_params-*.pt and all_delta_w_dict.json beside it",
            page="https://github.com/rishubhpar/PreciseControl",
        ),
        Weights(
            "lcm-lora-sdv1-5",
            "lora",
            "CreativeML OpenRAIL++-M",
            (File("pytorch_lora_weights.safetensors"),),
            repo="latent-consistency/lcm-lora-sdv1-5",
            note="for sd15 and Arc2Face: 2 to 4 steps with the scheduler lcm and guidance 1",
        ),
        Weights(
            "clip-vit-h",
            "encoder",
            "MIT",
            (File("config.json"), File("model.safetensors")),
            repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            note="image encoder of FaceID plus and StoryMaker",
        ),
        Weights(
            "storymaker",
            "adapter",
            "not stated by its authors; works with buffalo_l: " + _INSIGHTFACE_TERMS,
            (File("mask.bin"),),
            repo="RED-AIGC/StoryMaker",
            commercial=False,
            note="needs sdxl (made with huaquan/YamerMIX_v11), buffalo_l and clip-vit-h",
        ),
        Weights(
            "photomaker",
            "adapter",
            "Apache-2.0; v2 works with buffalo_l: " + _INSIGHTFACE_TERMS,
            (File("photomaker-v2.bin"),),
            repo="TencentARC/PhotoMaker-V2",
            commercial=False,
            note="needs sdxl (made with SG161222/RealVisXL_V4.0) and buffalo_l",
        ),
        Weights(
            "photomaker-v1",
            "adapter",
            "Apache-2.0",
            (File("photomaker-v1.bin"),),
            repo="TencentARC/PhotoMaker",
            note="needs sdxl (made with SG161222/RealVisXL_V3.0)",
        ),
        Weights(
            "pulid",
            "adapter",
            "Apache-2.0; works with antelopev2: " + _INSIGHTFACE_TERMS,
            (File("pulid_v1.1.safetensors"),),
            repo="guozinan/PuLID",
            commercial=False,
            note="needs sdxl (made with RunDiffusion/Juggernaut-XL-v9), antelopev2, eva02-clip-l-336 and bisenet",
        ),
        Weights(
            "pulid-v1",
            "adapter",
            "Apache-2.0; works with antelopev2: " + _INSIGHTFACE_TERMS,
            (File("pulid_v1.bin"),),
            repo="guozinan/PuLID",
            commercial=False,
            note="needs sdxl-lightning's UNet, antelopev2, eva02-clip-l-336 and bisenet",
        ),
        Weights(
            "eva02-clip-l-336",
            "encoder",
            "MIT",
            (File("EVA02_CLIP_L_336_psz14_s6B.pt"),),
            repo="QuanSun/EVA-CLIP",
            note="image encoder of PuLID",
        ),
        Weights(
            "bisenet",
            "encoder",
            "MIT; trained on CelebAMask-HQ: non-commercial research only",
            (File("parsing_bisenet.pth"),),
            commercial=False,
            note="face parsing for PuLID",
            page="https://github.com/xinntao/facexlib/releases/download/v0.2.0",
        ),
        Weights(
            "parsenet",
            "encoder",
            "MIT; trained on CelebAMask-HQ: non-commercial research only",
            (File("parsing_parsenet.pth"),),
            commercial=False,
            note="face parsing for restore",
            page="https://github.com/xinntao/facexlib/releases/download/v0.2.2",
        ),
        Weights(
            "codeformer",
            "restorer",
            "S-Lab License 1.0: non-commercial only",
            (File("codeformer.pth"),),
            commercial=False,
            page="https://github.com/sczhou/CodeFormer/releases/download/v0.1.0",
        ),
        Weights(
            "restoreformer",
            "restorer",
            "Apache-2.0; trained on FFHQ: CC BY-NC-SA 4.0",
            (File("RestoreFormer++.ckpt"), File("RestoreFormer.ckpt"), File("RestoreFormer.pth")),
            commercial=False,
            any_file=True,
            page="https://github.com/wzhouxiff/RestoreFormerPlusPlus/releases/download/v1.0.0",
        ),
        Weights(
            "gfpgan",
            "restorer",
            "Apache-2.0; trained on FFHQ: CC BY-NC-SA 4.0",
            (File("GFPGANv1.4.pth"), File("GFPGANv1.3.pth")),
            commercial=False,
            any_file=True,
            page="https://github.com/TencentARC/GFPGAN/releases/download/v1.3.0",
        ),
        Weights(
            "dfdnet",
            "restorer",
            "CC BY-NC-SA 4.0",
            (File("latest_net_G.pth"), File("DictionaryCenter512/left_eye_256_center.npy")),
            commercial=False,
            page="https://github.com/csxmli2016/DFDNet",
        ),
        Weights(
            "antelopev2",
            "pack",
            _INSIGHTFACE_TERMS,
            (
                File("scrfd_10g_bnkps.onnx", "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
                File("glintr100.onnx", "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"),
            ),
            archive=File(
                f"{_PACKS}/antelopev2.zip", "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5"
            ),
            commercial=False,
        ),
        Weights(
            "buffalo_l",
            "pack",
            _INSIGHTFACE_TERMS,
            (
                File("det_10g.onnx", "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
                File("w600k_r50.onnx", "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"),
            ),
            archive=File(f"{_PACKS}/buffalo_l.zip", "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f"),
            commercial=False,
        ),
    )
}


@dataclass(frozen=True)
class Listing:
    """A set of weights and where it lies."""

    weights: Weights
    path: Path | None

    def to_json(self) -> dict[str, Any]:
        weights = self.weights
        return {
            "name": weights.name,
            "kind": weights.kind,
            "path": None if self.path is None else str(self.path),
            "licence": weights.licence,
            "commercial": weights.commercial,
            "source": weights.source,
            "revision": weights.revision,
            "checksums": "known" if weights.verified else "unverified",
            "note": weights.note,
        }

    def __str__(self) -> str:
        weights = self.weights
        where = "not on this machine" if self.path is None else str(self.path)
        checksums = "" if weights.verified or weights.name == "mini" else "; unverified"
        note = f"; {weights.note}" if weights.note else ""
        return f"{weights.name:18} {weights.kind:8} {where}\n{'':27} {weights.licence}{checksums}{note}"


def home() -> Path:
    """Where weights are kept: FACEGEN_HOME, else facegen below the user's cache folder."""
    given = os.environ.get("FACEGEN_HOME")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "facegen"


def list_weights() -> tuple[Weights, ...]:
    """Every set of weights that has a name."""
    return tuple(WEIGHTS.values())


def listing() -> list[Listing]:
    """The same, each with its place on this machine; touches no network."""
    return [Listing(weights, _locate(weights)) for weights in list_weights()]


def licence(name: str) -> str:
    """What the terms of named weights are; empty for what is not in the table."""
    weights = WEIGHTS.get(_canonical(name))
    return weights.licence if weights else ""


def resolve(name: str, *, part: str | None = None) -> Path:
    """The folder of named weights, of a hub id ("owner/name") or of a path; with `part` a file or folder inside.

    Raises WeightsMissing, which says what to put where.
    """
    path = Path(name).expanduser()
    weights = WEIGHTS.get(_canonical(name))
    if weights is not None:
        folder = _locate(weights)
        if folder is None and _may_download():
            folder = fetch(name)
        if folder is None:
            raise WeightsMissing(_how_to_get(weights))
        _announce(weights)
    elif path.exists():
        folder = path
    elif name.count("/") == 1 and not name.startswith((".", "~", "/")):
        folder = _hub_id(name)
    else:
        close = difflib.get_close_matches(_canonical(name), WEIGHTS, 1)
        hint = f" Did you mean {close[0]}?" if close else f" Known names: {', '.join(WEIGHTS)}."
        raise WeightsMissing(f"There are no weights called {name}, and no such path.{hint}")
    if part is None:
        return folder
    if not (folder / part).exists():
        raise WeightsMissing(f"{folder / part} is not there; {name} is incomplete on this machine, fetch it again.")
    return folder / part


def fetch(name: str) -> Path:
    """Download named weights into the folder of weights, verify what has a known checksum, and say where they are.

    Raises WeightsMissing when they cannot be had, CheckpointBroken when a checksum differs.
    """
    weights = WEIGHTS[_canonical(name)]
    if weights.archive is not None:
        folder = _fetch_archive(weights, weights.archive)
    elif weights.repo is not None:
        patterns = [file.path for file in weights.files] if weights.kind != "base" else None
        folder = _snapshot(weights.repo, weights.revision, patterns, offline=False)
    else:
        raise WeightsMissing(_how_to_get(weights))
    problems = verify(weights, folder)
    if problems:
        raise CheckpointBroken(f"The download of {weights.name} is not what it should be: {problems[0]}")
    if not weights.verified:
        log.warning("%s has no known checksum; it is used unverified.", weights.name)
    return folder


def verify(weights: Weights, folder: Path) -> list[str]:
    """One sentence per file whose checksum is known and differs."""
    problems = []
    for file in weights.files:
        path = folder / file.path
        if file.sha256 and path.is_file() and sha256(path) != file.sha256:
            problems.append(f"{path} has another checksum than the published file; delete it and fetch it again.")
    return problems


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> Path:
    """Write SHA256SUMS for all files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return folder / CHECKSUMS


def check_checksums(folder: Path) -> list[str]:
    """One sentence per file that is missing or differs from SHA256SUMS; empty when all is well or there is none."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return []
    problems = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing.")
        elif sha256(folder / name) != digest:
            problems.append(f"{folder / name} is damaged or was changed.")
    return problems


def pack_folder(folder: Path) -> Path:
    """Where a face pack's .onnx files are: in the folder itself, or one level deeper.

    antelopev2.zip holds a folder of its own name, so unpacking it leaves models/antelopev2/antelopev2/*.onnx, in which
    insightface finds nothing.
    """
    if any(folder.glob("*.onnx")) or (folder / "manifest.json").is_file():
        return folder
    below = sorted({path.parent for path in folder.glob("*/*.onnx")})
    return below[0] if len(below) == 1 else folder


# --- finding --------------------------------------------------------------------------------------------------------


def _canonical(name: str) -> str:
    known = {key.replace("-", "_").lower(): key for key in WEIGHTS}
    return known.get(name.replace("-", "_").lower(), name)


def _locate(weights: Weights) -> Path | None:
    for folder in _places(weights):
        if folder.is_dir():
            place = pack_folder(folder) if weights.kind == "pack" else folder
            if _complete(weights, place):
                return place
    return None


def _places(weights: Weights) -> Iterator[Path]:
    if weights.name == "mini":
        yield ASSETS / "mini"
        return
    yield home() / weights.name
    yield home() / "models" / weights.name
    yield Path("models") / weights.name
    if weights.kind == "pack":
        yield Path.home() / ".insightface" / "models" / weights.name
    if weights.repo is not None:
        for revision in dict.fromkeys((weights.revision, None)):
            try:
                yield _snapshot(weights.repo, revision, None, offline=True)
            except WeightsMissing:
                continue


def _complete(weights: Weights, folder: Path) -> bool:
    if weights.kind == "pack":
        return any(folder.glob("*.onnx"))  # the names of a pack's files are free (Arc2Face adds its own)
    if weights.name == "mini":
        return any((folder / file.path).is_file() for file in weights.files)
    there = [any(path.is_file() for path in folder.glob(file.path)) for file in weights.files]
    if weights.name == "arc2face":
        there = there[:-1]  # arcface.onnx usually lies in the pack
    return any(there) if weights.any_file else all(there)


def _how_to_get(weights: Weights) -> str:
    if weights.name == "mini":
        return f"The embedded model is not in {ASSETS / 'mini'}; install facegen again."
    place = home() / weights.name
    names = [file.path for file in weights.files]
    wanted = ("one of " if weights.any_file else "") + ", ".join(names)
    return (
        f"The weights {weights.name} are not on this machine: put {wanted} from {weights.source} into {place}, "
        f"or set FACEGEN_DOWNLOAD=1 to allow the download ({weights.licence})."
    )


def _may_download() -> bool:
    offline = any(os.environ.get(name, "0").lower() in ("1", "true", "yes", "on") for name in ("HF_HUB_OFFLINE",))
    return os.environ.get("FACEGEN_DOWNLOAD", "0").lower() in ("1", "true", "yes", "on") and not offline


def _hub_id(name: str) -> Path:
    try:
        return _snapshot(name, None, None, offline=not _may_download())
    except WeightsMissing as error:
        raise WeightsMissing(
            f"{name} is neither a path nor in the Hugging Face cache; give a folder, or set FACEGEN_DOWNLOAD=1 to "
            "allow the download."
        ) from error


def _snapshot(repo: str, revision: str | None, patterns: list[str] | None, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline)  # nosec
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise WeightsMissing(
            f"{repo} cannot be had: {str(error).splitlines()[0] if str(error) else error!r}."
        ) from error


# --- archives -------------------------------------------------------------------------------------------------------


def _fetch_archive(weights: Weights, archive: File) -> Path:
    target = home() / weights.name
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home(), prefix=f".{weights.name}-") as scratch:
            packed = Path(scratch) / "pack.zip"
            with urllib.request.urlopen(archive.path, timeout=60) as answer, packed.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            if archive.sha256 and sha256(packed) != archive.sha256:
                raise CheckpointBroken(
                    f"The download of {weights.name} has another checksum than published; try again."
                )
            unpacked = Path(scratch) / weights.name
            unpack(packed, unpacked)
            shutil.rmtree(target, ignore_errors=True)
            unpacked.replace(target)
    except urllib.error.URLError as error:
        raise WeightsMissing(f"{archive.path} cannot be reached ({error.reason}). {_how_to_get(weights)}") from error
    except OSError as error:
        raise OutputUnwritable(f"{weights.name} cannot be written to {home()}: {error.strerror or error}.") from error
    return target


def unpack(archive: Path, folder: Path) -> None:
    """The .onnx files of a pack's zip, flat, whatever folders the zip has; other files and paths are left out.

    Raises CheckpointBroken for a damaged zip.
    """
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                name = PurePosixPath(member.filename).name
                if member.is_dir() or not name.endswith(".onnx"):
                    continue
                with packed.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointBroken(f"{archive} is damaged; fetch it again.") from error


@cache
def _announce(weights: Weights) -> None:
    """Said once per process."""
    if not weights.commercial:
        log.warning("The weights %s may be used for: %s.", weights.name, weights.licence)
