"""What can go wrong for a user: one sentence that says what happened and how to mend it."""

from __future__ import annotations


class FacegenError(Exception):
    """Base of every error that is meant for the user; its text is the whole message."""

    exit_code = 2


class BadImage(FacegenError):
    """A file or array that is not a usable picture."""


class NoFaceFound(FacegenError):
    """No face where one is needed."""


class SeveralFaces(FacegenError):
    """More than one face where exactly one is meant."""


class WrongMask(FacegenError):
    """A mask whose size or content does not fit its picture."""


class WrongRequest(FacegenError, ValueError):
    """A value of a request that is out of range or contradicts another one."""


class WrongBaseModel(FacegenError):
    """An adapter made for another base model than the one that is loaded."""


class WrongAdapter(FacegenError):
    """A checkpoint of no known family, or of another one than was asked for."""


class CheckpointBroken(FacegenError):
    """A checkpoint that is truncated, lacks keys, or holds NaN or infinite numbers."""


class WeightsMissing(FacegenError):
    """Weights that are not on this machine; the text names the files and where to put them."""


class NotCommercial(FacegenError):
    """Weights whose terms forbid commercial use, where only others were asked for."""


class PackageMissing(FacegenError):
    """An optional package or system library that this call needs."""


class NotEnoughMemory(FacegenError):
    """More memory than the device has; the text says how much, where that is known, and what takes less."""


class OutputUnwritable(FacegenError):
    """A place where the result cannot be written: no permission, no such folder, no disk space."""


class NoMetadata(FacegenError):
    """A picture that carries no facegen metadata."""


class Cancelled(FacegenError):
    """The user stopped the run; nothing half-written is left."""

    exit_code = 130
