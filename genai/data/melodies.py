"""Data sets of melodies on a grid of sixteenths: Bach's chorales, a JSON file of them, and folders of MIDI files."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data import scores
from genai.data.base import Data, Split, split_indices
from genai.data.files import Files, print_summary
from genai.data.fingerprint import checksum
from genai.data.scan import reason
from genai.data.splits import arrange
from genai.modalities import melody as modalities
from genai.modalities import midi

STEPS_PER_QUARTER = 4
SPLITS = "train", "val", "test"


class Piece(NamedTuple):
    """A piece of music that begins at a bar line: events int16 (S, V) of `genai.modalities.midi`."""

    name: str
    events: np.ndarray
    label: int = 0


class Melodies(Data):
    """Pieces of music as tokens, see `genai.modalities.melody.Melody`, in windows that begin at bar lines.

    Args:
        pieces: by split; those of val and test in random order.
        voices: of each piece.
        low, high: MIDI pitches of the vocabulary; None takes the range of all pieces.
        transpose: pieces are moved by up to so many semitones in training, as far as low and high allow.
        bar: steps of a bar.
        overlap: tokens of context that consecutive windows share, of which only the later ones are targets.
        shape: [tokens of a window], whole bars.
        class_names: name of each label, None without labels.
        field, classes, levels, batch_size, num_workers: see `Data`.

    Raises UserError for windows that are no whole bars, and for pieces outside of low and high.
    """

    def __init__(
        self,
        pieces: Mapping[str, Sequence[Piece]],
        voices: int,
        low: int | None,
        high: int | None,
        transpose: int,
        bar: int,
        overlap: int,
        field: str,
        shape: Sequence[int],
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
        class_names: Sequence[str] | None = None,
    ):
        unit = at_least(bar, 1, "data.bar") * voices
        for key, tokens in (("shape", shape[0]), ("overlap", at_least(overlap, 0, "data.overlap"))):
            if tokens % unit:
                raise UserError(
                    f"data.{key}={tokens} must be tokens of whole bars, a multiple of {unit} (data.bar, voices)"
                )
        if overlap >= shape[0]:
            raise UserError(f"data.overlap={overlap} must be smaller than a window of {shape[0]} tokens (data.shape)")
        at_least(transpose, 0, "data.transpose", most=24)
        for name in SPLITS:
            if not pieces.get(name):
                raise UserError(f"there are no pieces for the split {name}: give more files")
        sounding = {p.name: p.events[p.events >= 0] for part in pieces.values() for p in part}
        for name, x in sounding.items():
            if not len(x):
                raise UserError(f"{name} has no notes (data.voices): remove it")
        least, most = (int(f(g(x) for x in sounding.values())) for f, g in ((min, np.min), (max, np.max)))
        low, high = least if low is None else low, most if high is None else high
        for name, x in sounding.items():
            if x.min() < low or x.max() > high:
                raise UserError(
                    f"{name} has pitches from {x.min()} to {x.max()}, outside of data.low={low} and data.high={high}: set "
                    "them to null, or to a wider range"
                )
        melody = modalities.Melody(low, high, voices, STEPS_PER_QUARTER)
        self.bar, self.transpose = bar, transpose
        labelled = class_names is not None
        splits: dict[str, Split] = {
            name: Windows(part, melody, shape[0], overlap, unit, transpose if name == "train" else None, labelled)
            for name, part in pieces.items()
        }
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=shape,
            class_names=class_names,
            found_levels=melody.vocab_size,
            modality=melody,
        )


class Windows:
    """A split of windows of `length` + 1 tokens, of which a model predicts all but the first, the one before the window.

    Without draws every token of every piece is a target exactly once, as marked in `mask`: consecutive windows of a piece share
    `overlap` tokens, which are context only in the later one, and the last is padded with holds. With draws a window begins at
    any bar line of its piece, which is transposed by up to `transpose` semitones; None for a split without draws.

    A batch has tokens int64 (B, length + 1) and mask bool (B, length + 1), and `label` where there are several classes.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        melody: modalities.Melody,
        length: int,
        overlap: int,
        unit: int,
        transpose: int | None,
        labelled: bool,
    ):
        self.length, self.overlap, self.unit, self.augments = length, overlap, unit, transpose is not None
        rows = [melody.encode(piece.events) for piece in pieces]
        self.sizes = torch.tensor([len(row) for row in rows])
        padding = np.zeros(length, np.int16)
        self.tokens = torch.from_numpy(
            np.concatenate([part for row in rows for part in ([modalities.SILENCE], row, padding)])
        )
        self.begins = (self.sizes + length + 1).cumsum(0) - self.sizes - length  # of each piece, after its first id
        counts = (-(-(self.sizes - overlap) // (length - overlap))).clamp_min(1)
        self.piece = torch.repeat_interleave(torch.arange(len(rows)), counts)
        self.window = torch.arange(len(self.piece)) - (counts.cumsum(0) - counts)[self.piece]
        self.labels = torch.tensor([piece.label for piece in pieces]) if labelled else None
        sounding = [row[row > 1] - 2 for row in rows]
        size, most = melody.high - melody.low, transpose or 0
        self.down = torch.tensor([min(most, int(x.min())) for x in sounding])
        self.up = torch.tensor([min(most, size - int(x.max())) for x in sounding])
        self.targets = int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.piece)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index` (B,); draws (B, 4): the bar line, the transposition, unused, unused."""
        piece = self.piece[index]
        start, moved = self.window[index] * (self.length - self.overlap), torch.zeros_like(index)
        context = start + self.overlap * (start > 0)  # where targets begin
        if self.augments and draws is not None:
            lines = (-(-(self.sizes[piece] - self.length) // self.unit)).clamp_min(0) + 1
            context = start = (draws[:, 0] * lines).long() * self.unit
            moved = (draws[:, 1] * (self.down + self.up + 1)[piece]).long() - self.down[piece]
        at = start[:, None] + torch.arange(-1, self.length)
        tokens = self.tokens[self.begins[piece][:, None] + at].long()
        tokens = torch.where(tokens > 1, tokens + moved[:, None], tokens)
        mask = (at >= context[:, None]) & (at < self.sizes[piece][:, None])
        label = {} if self.labels is None else {"label": self.labels[piece]}
        return {"tokens": tokens, "mask": mask, **label}

    def fingerprint(self, quick: bool) -> str:
        return checksum(self.tokens, self.sizes, self.labels, self.unit, quick=quick)


def chorales(voices: str, **facts) -> Melodies:
    """Build the data set of Bach's chorales that the package music21 carries: those of four voices in bars of `data.bar` steps.

    Re-attacks are kept, and an upbeat stands at its place in the bar, after silence. Chorales whose sopranos begin alike, up to
    transposition, are in the same split: 80 % of such groups are for training, the others are shared by val and test.

    Args:
        voices: soprano or all.
        facts: further arguments of `Melodies`.

    Raises UserError where music21 is not installed.
    """
    number = _voices(voices)
    found = [Piece(name, events) for name, events, bar in scores.chorales(STEPS_PER_QUARTER) if bar == facts["bar"]]
    if not found:
        raise UserError(f"data.bar={facts['bar']}, and no chorale has bars of so many sixteenths: set 16 or 12")
    groups: dict[tuple[int, ...], list[Piece]] = {}
    for piece in found:
        pitches = [note.pitch for note in midi.to_notes(piece.events[:, 0])][:10]
        groups.setdefault(tuple(np.diff(pitches).tolist()), []).append(Piece(piece.name, piece.events[:, :number]))
    rest, held = split_indices(len(groups), 0.2)
    order, half = [*groups.values()], len(held) // 2
    parts = {"train": rest, "val": held[:half], "test": held[half:]}
    return Melodies({name: [p for i in part for p in order[i]] for name, part in parts.items()}, number, **facts)


def json_file(path: str, voices: str, **facts) -> Melodies:
    """Build the data set of a JSON file {train: [piece, ...], valid: ..., test: ...} of frames of MIDI pitches, one a step.

    A frame has one pitch for each voice, the highest first, -1 for silence. Such a file cannot tell a note that is struck again
    from one that is held: equal pitches in a row are one note.

    Args:
        path: of the file.
        voices: soprano or all.
        facts: further arguments of `Melodies`.

    Raises UserError for a file that is not like that.
    """
    number = _voices(voices)
    try:
        content = json.loads(Path(path).read_text())
        parts = {"val" if key in ("valid", "validation") else key: value for key, value in content.items()}
        pieces = {
            name: [
                Piece(f"{path}, piece {i} of {name}", scores.from_frames(x, number)) for i, x in enumerate(parts[name])
            ]
            for name in SPLITS
        }
    except OSError as error:
        raise UserError(
            f"data.path={path!r} cannot be read ({error.strerror}): set data.path to a JSON file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"data.path={path!r} is not JSON of train, valid and test, each a list of pieces, each a list of frames of pitches "
            f"({type(error).__name__}: {error}): set data.path to such a file"
        ) from error
    return Melodies(pieces, number, **facts)


def midi_folder(root: str, voices: str, **facts) -> Melodies:
    """Build the data set of the MIDI files below a folder, or in a zip of it.

    Folders are splits and classes as those of images are, see `genai.data.splits`. Files that cannot be used are skipped,
    counted and named, as are those in another metre than `data.bar`; changes of tempo move nothing.

    Args:
        root: folder or zip.
        voices: soprano, the top line of all that sounds, or all, four tracks or channels.
        facts: further arguments of `Melodies`.

    Raises UserError where no file can be used.
    """
    number, files = _voices(voices), Files(root, 2, "MIDI files", few=math.inf)
    pieces: dict[str, Piece] = {}
    problems: dict[str, str] = {}
    for name in files.candidates((".mid", ".midi")):
        try:
            score = midi.read(files.read(name), number, STEPS_PER_QUARTER)
            if score.bar != facts["bar"]:
                raise ValueError(
                    f"has bars of {score.bar or 'several numbers of'} steps, and not {facts['bar']} (data.bar)"
                )
            pieces[name] = Piece(name, midi.trimmed(score.events))
        except (UserError, MemoryError):
            raise
        except ValueError as error:
            problems[name] = str(error)
        except Exception as error:  # zipfile raises almost any exception on a broken member
            problems[name] = reason(error)
    files.drop(problems, len(pieces))
    arranged = arrange(root, [*pieces], 2)
    print_summary(files, arranged.parts, arranged.class_names, arranged.notes)
    found = [*pieces.values()]
    if arranged.labels is not None:
        found = [piece._replace(label=int(label)) for piece, label in zip(found, arranged.labels, strict=True)]
    parts = {name: [found[i] for i in part] for name, part in arranged.parts.items()}
    return Melodies(parts, number, **facts, class_names=arranged.class_names)


def _voices(voices: str) -> int:
    """Return the number of voices. Raises UserError for another word."""
    if voices not in ("soprano", "all"):
        raise UserError(f"data.voices={voices} must be soprano or all")
    return 1 if voices == "soprano" else 4
