"""Read scores as events on a grid: frames of pitches, and the chorales that the package music21 carries, without importing it."""

import importlib.metadata
import importlib.util
import zipfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from genai import progress
from genai.core import extras, files
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError
from genai.modalities.midi import HOLD, OFF, Note, to_events

VOICES = "Soprano", "Alto", "Tenor", "Bass"
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FORMAT = 1  # version of the cached file


class Chorale(NamedTuple):
    """A chorale that begins at a bar line: its name, events int16 (S, 4), and the steps of its bars."""

    name: str
    events: np.ndarray
    bar: int


def from_frames(frames: Sequence[Sequence[int]], voices: int) -> np.ndarray:
    """Convert frames of pitches (S, V), -1 for silence, to events int16 (S, voices); equal pitches in a row are one note.

    One voice is the first of any number. Raises ValueError for other values, and for more voices than one that are not V.
    """
    x = np.asarray(frames)
    if x.ndim != 2 or not len(x) or x.dtype.kind != "i" or x.min() < -1 or x.max() > 127:
        raise ValueError("a piece is not a list of frames of as many pitches, -1 to 127")
    if voices not in (1, x.shape[1]):
        raise ValueError(f"a frame has {x.shape[1]} pitch{'es' * (x.shape[1] > 1)}, and not {voices}")
    x = x[:, :voices]
    before = np.concatenate([np.full_like(x[:1], OFF), x[:-1]])
    return np.where(x == before, HOLD, x).astype(np.int16)


def chorales(steps_per_quarter: int) -> list[Chorale]:
    """Return the chorales of music21 for four voices in one metre, sorted by name; read once, then cached.

    Raises UserError where music21 is not installed.
    """
    found = importlib.util.find_spec("music21")
    if found is None or not found.submodule_search_locations:
        raise extras.missing("music21", "audio", "data=chorales")
    version = importlib.metadata.version("music21")
    path = cache_folder("melodies") / f"chorales-{version}-{steps_per_quarter}-{FORMAT}.npz"
    try:
        return _read_cache(path)
    except FileNotFoundError:
        pass
    except Exception as error:  # numpy raises almost any exception on a broken file
        print(f"warning: {path} is damaged ({type(error).__name__}): made again")
    folder = Path(found.submodule_search_locations[0]) / "corpus" / "bach"
    paths = sorted(folder.glob("*.mxl"))
    read = (_chorale(p, steps_per_quarter) for p in progress.track(paths, "reading chorales, once", len(paths)))
    made = [chorale for chorale in read if chorale is not None]
    if not made:
        raise UserError(f"{folder} has no chorale that can be read: install music21 anew")
    arrays: dict[str, Any] = {
        "names": np.array([c.name for c in made]),
        "bars": np.array([c.bar for c in made]),
        "steps": np.array([len(c.events) for c in made]),
        "events": np.concatenate([c.events for c in made]),
    }
    files.write(path, lambda file: np.savez_compressed(file, **arrays), hint=CACHE_HINT)
    return made


def _read_cache(path: Path) -> list[Chorale]:
    with np.load(path, allow_pickle=False) as arrays:
        names, bars = arrays["names"].tolist(), arrays["bars"].tolist()
        parts = np.split(arrays["events"], arrays["steps"].cumsum()[:-1])
    return [Chorale(*each) for each in zip(names, parts, bars, strict=True)]


def _chorale(path: Path, steps_per_quarter: int) -> Chorale | None:
    """Read a compressed MusicXML file; None unless it has the four voices, once each, and one metre."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith((".xml", ".musicxml")) and not n.startswith("META-INF")]
        if not names:
            return None
        root = ElementTree.fromstring(archive.read(names[0]))
    ids = {part.findtext("part-name", "").strip(): part.get("id") for part in root.iter("score-part")}
    parts = {part.get("id"): part for part in root.findall("part")}
    metres = {(t.findtext("beats"), t.findtext("beat-type")) for t in root.iter("time")}
    if len(metres) != 1 or not all(voice in ids for voice in VOICES):
        return None
    ((beats, unit),) = metres
    bar = Fraction(int(beats or 4), int(unit or 4)) * 4 * steps_per_quarter
    lines = [_line(parts[ids[voice]], steps_per_quarter, bar) for voice in VOICES]
    if bar.denominator > 1 or not all(notes for notes, _ in lines):
        return None
    steps = max(length for _, length in lines)
    return Chorale(path.stem, np.stack([to_events(notes, steps) for notes, _ in lines], 1), int(bar))


def _line(part: ElementTree.Element, steps_per_quarter: int, bar: Fraction) -> tuple[list[Note], int]:
    """Return the notes of a part and its length in steps; a first measure that is shorter than a bar ends it."""
    now, divisions, first = Fraction(0), 1, True
    found: list[tuple[Fraction, Fraction, int]] = []
    for measure in part.findall("measure"):
        for element in measure:
            if element.tag == "attributes":
                divisions = int(element.findtext("divisions") or divisions)
            elif element.tag in ("note", "forward", "backup"):
                length = Fraction(element.findtext("duration") or "0") / divisions * steps_per_quarter
                if element.find("chord") is not None or element.find("grace") is not None:
                    continue
                pitch, tied = element.find("pitch"), any(t.get("type") == "stop" for t in element.findall("tie"))
                if pitch is not None:
                    octave, step = int(pitch.findtext("octave", "4")), SEMITONES[pitch.findtext("step", "C")]
                    number = 12 * (octave + 1) + step + int(float(pitch.findtext("alter", "0")))
                    if tied and found and found[-1][1:] == (now, number):
                        found[-1] = found[-1][0], now + length, number
                    else:
                        found.append((now, now + length, number))
                now += -length if element.tag == "backup" else length
        if first:  # an upbeat
            shift, first = (bar - now) % bar, False
    notes = [Note(round(a + shift), round(b + shift), p) for a, b, p in found]
    return [note for note in notes if note.end > note.start], round(now + shift)
