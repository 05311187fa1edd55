"""An additive synthesiser for melodies: enough to hear what a model wrote, without any recorded sound."""

import functools

import numpy as np

from genai.modalities.midi import to_notes

SR_HZ = 16_000
PARTIALS = 8
ATTACK_SECONDS, RELEASE_SECONDS, TAIL_SECONDS = 0.012, 0.08, 0.4
AUDIBLE_SECONDS = 20.0  # after which a note has died away to less than a step of 16 bits, however long it is held
PEAK = 0.8  # of the loudest moment


def render(events: np.ndarray, steps_per_quarter: int, tempo: float, sr_hz: int = SR_HZ) -> np.ndarray:
    """Render events int (S, V) as a mono wave float32 (T,) in [-1, 1], its loudest moment at 0.8; silence stays silence."""
    step = 60 / tempo / steps_per_quarter * sr_hz
    wave = np.zeros(round(len(events) * step) + round(TAIL_SECONDS * sr_hz), np.float32)
    for voice in events.T:
        for note in to_notes(voice):
            first = round(note.start * step)
            samples = min(round(note.end * step) - first, round(AUDIBLE_SECONDS * sr_hz))
            sound = tone(note.pitch, samples, sr_hz)
            wave[first : first + len(sound)] += sound[: len(wave) - first]
    return wave * (PEAK / max(np.abs(wave).max(initial=0), 1e-9)) if wave.any() else wave


@functools.lru_cache(1024)
def tone(pitch: int, samples: int, sr_hz: int) -> np.ndarray:
    """Return one note float32 (T,): partials k = 1, 2, ... of amplitude k^-1.6 below the Nyquist frequency, each dying away
    faster the higher it is, then a release after its `samples`. MIDI pitch 69 is 440 Hz."""
    t = np.arange(samples + round(RELEASE_SECONDS * sr_hz)) / sr_hz
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    k = np.arange(1, PARTIALS + 1)[:, None]
    k = k[k * frequency < sr_hz / 2].reshape(-1, 1)
    partials = np.sin(2 * np.pi * frequency * k * t) * np.exp(-t * (0.6 + 0.5 * k)) * k**-1.6
    rise = np.clip(t / ATTACK_SECONDS, 0, 1)
    fall = np.clip((len(t) - np.arange(len(t))) / (RELEASE_SECONDS * sr_hz), 0, 1)
    return (partials.sum(0) * rise * fall).astype(np.float32)
