"""Melodies as token ids: prompts and samples are MIDI files, a piano roll shows them, a small synthesiser plays them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core import files
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.core.rng import RNG_VERSION
from genai.core.runs import Facts
from genai.metrics import likelihood
from genai.modalities import midi, sound, synth
from genai.modalities.base import MAX_HEARD, MAX_SHOWN, Clips, Modality, Picture, Request, pad_prompts, read_each, save

SILENCE = 1  # the id before every melody: the note before it, if any, has ended
STEP_PIXELS, ROW_PIXELS, GAP_PIXELS = 4, 4, 6
INK = (("#1f4e8c", "#7ba7d9"), ("#2e7d4f", "#8cc7a4"), ("#b35c00", "#efb377"), ("#8c1f4e", "#d98fb0"))
"""Colours of the voices in turn: of a note's first step, and of the rest of it."""


class Melody(Modality):
    """Melodies as tokens int64 (B, T), without the first id: 0 is a hold, 1 the end of a note, 2 + k the pitch low + k.

    Several voices alternate, the highest first: T is steps times voices.

    Args:
        low, high: the least and the greatest MIDI pitch.
        voices: number of voices.
        steps_per_quarter: steps of a quarter note.
        tempo: quarter notes a minute, of the files that are written.

    Raises UserError for values out of range.
    """

    field, keys, meaning = "tokens", ("prompt",), "range of pitches"
    comparison, likelihoods = "melodies", ("nats_per_step",)

    def __init__(self, low: int, high: int, voices: int = 1, steps_per_quarter: int = 4, tempo: float = 90.0):
        if not all(type(n) is int for n in (low, high, voices, steps_per_quarter)) or not 0 <= low <= high <= 127:
            raise UserError(
                f"a melody has low={low!r} and high={high!r}, which must be MIDI pitches, 0 <= low <= high <= 127"
            )
        if not 1 <= voices <= 8 or steps_per_quarter not in (1, 2, 3, 4, 6, 8, 12):
            raise UserError(
                f"a melody has voices={voices} (1 to 8) and steps_per_quarter={steps_per_quarter} (1 to 12)"
            )
        if type(tempo) not in (int, float) or not 10 <= tempo <= 400:
            raise UserError(f"a melody has tempo={tempo!r}, which must be from 10 to 400 quarter notes a minute")
        self.low, self.high, self.voices = low, high, voices
        self.steps_per_quarter, self.tempo = steps_per_quarter, tempo

    @property
    def vocab_size(self) -> int:
        return self.high - self.low + 3

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("low", "high", "voices", "steps_per_quarter", "tempo")}

    def encode(self, events: np.ndarray) -> np.ndarray:
        """Encode events (S, V) within the range as ids int16 (S V,), without the first id."""
        return (np.where(events < 0, events + 2, events - self.low + 2)).astype(np.int16).reshape(-1)

    def events(self, tokens: Tensor) -> np.ndarray:
        """Decode ids (T,) to canonical events int16 (S, V); an unfinished last step is left out."""
        ids = tokens.cpu().numpy().astype(np.int16)
        ids = ids[: len(ids) // self.voices * self.voices].reshape(-1, self.voices)
        return midi.canonical(np.where(ids < 2, ids - 2, ids - 2 + self.low).astype(np.int16))

    def voices_of(self, rows: Tensor) -> list[list[list[midi.Note]]]:
        """Return the notes of each voice of each melody of tokens (B, T)."""
        return [[midi.to_notes(voice) for voice in self.events(row).T] for row in rows]

    def compared(self, x: Tensor) -> list[list[list[midi.Note]]]:
        return self.voices_of(x)

    def condition(self, request: Request, n: int) -> Batch:
        """Return the first id and the events of prompts, padded on the left: `tokens`, `pad`, and `lead` = 1.

        A prompt is a MIDI file, `prompt=theme.mid`, or a list of them in turn. One outside the range is transposed into it.

        Raises UserError for a file that cannot be read, has no notes, or spans more pitches than the range.
        """
        prompts = self._prompts(request, n)
        if moved := sorted({shift for _, shift in prompts if shift}):
            how = ", ".join(f"{shift:+}" for shift in moved)
            print(
                f"prompts are moved by {how} semitones into the range of the model, and back afterwards",
                file=sys.stderr,
            )
        rows = [torch.tensor([SILENCE, *self.encode(events).tolist()]) for events, _ in prompts]
        return {**pad_prompts(rows), "lead": torch.ones(n, dtype=torch.int64)}

    def _prompts(self, request: Request, n: int) -> list[tuple[np.ndarray, int]]:
        """Return the prompts of n samples, events (S, V) within the range, with the semitones that each was moved up by."""
        if request.get("prompt") is None:
            return [(np.zeros((0, self.voices), np.int16), 0)] * n
        return read_each(request["prompt"], n, "prompt", self._prompt)

    def _prompt(self, path: Path) -> tuple[np.ndarray, int]:
        try:
            score = midi.read(path.read_bytes(), self.voices, self.steps_per_quarter)
        except OSError as error:
            raise UserError(
                f"prompt={path} cannot be read ({error.strerror}): name a MIDI file with prompt="
            ) from error
        except ValueError as error:
            raise UserError(f"prompt={path} {error}: name another file with prompt=") from error
        events = midi.trimmed(score.events)
        pitches = events[events >= 0]
        least, most = int(pitches.min()), int(pitches.max())
        if most - least > self.high - self.low:
            raise UserError(
                f"prompt={path} has pitches from {least} to {most}, which no transposition brings into the range of this "
                f"model, {self.low} to {self.high}: name another file with prompt="
            )
        shift = max(self.low - least, 0) - max(most - self.high, 0)
        return np.where(events >= 0, events + shift, events).astype(np.int16), shift

    def preview(self, batch: Batch, columns: int | None = None) -> Clips:
        """Return the piano rolls of samples and the sound of the first."""
        return self.show([self.events(row) for row in batch[self.field]], columns)

    def show(self, melodies: list[np.ndarray], columns: int | None = None) -> Clips:
        """Return the piano rolls of melodies, events (S, V) each, and the sound of the first."""
        waves = [torch.from_numpy(self.render(events)) for events in melodies[:MAX_HEARD]]
        heard = pad_sequence(waves, batch_first=True)[:, None]
        return Clips(self.roll(melodies, columns), heard, synth.SR_HZ)

    def render(self, events: np.ndarray) -> np.ndarray:
        """Return the sound float32 (T,) of events (S, V)."""
        return synth.render(events, self.steps_per_quarter, self.tempo)

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        """Convert -ln p in nats (N,) of windows to nats per step."""
        steps = (len(nats) * shape[0] if targets is None else targets) // self.voices
        window = {"context": shape[0], "context_overlap": getattr(part, "overlap", 0), "vocabulary": self.vocab_size}
        return likelihood.per_step(nats, steps) | window

    def roll(self, melodies: list[np.ndarray], columns: int | None = None) -> Picture:
        """Draw melodies, events (S, V) each, as piano rolls uint8 (3, H, W): pitch upwards, a note's first step darker."""
        pitches = np.concatenate([events[events >= 0] for events in melodies] or [np.zeros(0, np.int16)])
        low, high = (int(pitches.min()), int(pitches.max())) if len(pitches) else (self.low, self.high)
        low, high = low - 1, high + 1
        columns = min(columns or max(1, round((len(melodies) / 3) ** 0.5)), len(melodies))
        height = (high - low + 1) * ROW_PIXELS + GAP_PIXELS
        width = max(map(len, melodies)) * STEP_PIXELS + GAP_PIXELS
        picture = np.full((-(-len(melodies) // columns) * height, columns * width, 3), 255, np.uint8)
        for i, events in enumerate(melodies):
            top, left = i // columns * height, i % columns * width
            part = picture[top : top + height - GAP_PIXELS, left : left + width - GAP_PIXELS]
            part[:] = 246
            part[:, :: 4 * self.steps_per_quarter * STEP_PIXELS] = 205  # bars of four quarters
            for v in reversed(range(self.voices)):
                first, rest = (np.array(bytearray.fromhex(colour[1:])) for colour in INK[v % len(INK)])
                for note in midi.to_notes(events[:, v]):
                    row = (high - note.pitch) * ROW_PIXELS
                    part[row : row + ROW_PIXELS, note.start * STEP_PIXELS : note.end * STEP_PIXELS] = rest
                    part[row : row + ROW_PIXELS, note.start * STEP_PIXELS : (note.start + 1) * STEP_PIXELS] = first
        return torch.from_numpy(picture).permute(2, 0, 1)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write each melody, its prompt in front and in that key, as .mid and .wav; grid.png, grid.wav and samples.npz of all."""
        folder.mkdir(parents=True, exist_ok=True)
        melodies = []
        for row, (prompt, shift) in zip(batch[self.field], self._prompts(request, len(names)), strict=True):
            events = self.events(torch.cat([torch.from_numpy(self.encode(prompt)).long(), row.cpu()]))
            melodies.append(np.where(events >= 0, events - shift, events).astype(np.int16))
        for name, events in zip(names, melodies, strict=True):
            content = midi.write(events, self.steps_per_quarter, self.tempo)
            files.write(folder / f"{name}.mid", lambda file, content=content: file.write(content))
            sound.write_wave(folder / f"{name}.wav", torch.from_numpy(self.render(events))[None], synth.SR_HZ)
        found = {"samples": batch[self.field], "seeds": batch["seeds"], "labels": batch.get("label")}
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in found.items() if value is not None}
        np.savez(folder / "samples.npz", rng_version=RNG_VERSION, **arrays)
        shown = save(self.show(melodies[:MAX_SHOWN], columns), folder / "grid")
        return [f"{names[0]}.mid", *shown, "samples.npz"]
