"""A program that speaks with the library of espeak-ng, in a process of its own, on the standard library alone.

The pitch of a voice wavers by a counter that the library never resets, so that what a sentence sounds like depends on what
was said before: a new process says the same things the same way each time. espeak-ng is under the GPL, version 3.

It takes the library's path and that of its data, reads a JSON list of [voice, words per minute, pitch, range of pitch, text]
from stdin, and writes to stdout the sampling rate, then for each the number of samples and the samples, all as integers of
32 and 16 bits.
"""

import ctypes
import json
import struct
import sys

SYNCHRONOUS, DONT_EXIT = 2, 0x8000  # of espeak_Initialize: no thread of its own, and no exit if its data are missing
RATE, PITCH, RANGE = 1, 3, 4  # of espeak_SetParameter
UTF8 = 1


def main(library: str, data: str) -> None:
    """Say what stdin asks for. Exits with a sentence if the library refuses a voice or a text."""
    espeak, out, spoken = ctypes.CDLL(library), sys.stdout.buffer, bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples, n, _):
        if samples and n > 0:
            spoken.extend(ctypes.string_at(samples, 2 * n))
        return 0

    sr_hz = espeak.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT)
    if sr_hz <= 0:
        sys.exit(f"espeak_Initialize returned {sr_hz}")
    out.write(struct.pack("=i", sr_hz))
    espeak.espeak_SetSynthCallback(hear)
    for i, (voice, rate, pitch, pitch_range, text) in enumerate(json.load(sys.stdin)):
        spoken.clear()
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(i))  # of its noise, which begins with the time of day otherwise
        failed = espeak.espeak_SetVoiceByName(voice.encode())
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
            failed = failed or espeak.espeak_SetParameter(parameter, value, 0)
        written = text.encode()
        failed = failed or espeak.espeak_Synth(written, len(written) + 1, 0, 1, 0, UTF8, None, None)
        failed = failed or espeak.espeak_Synchronize()
        if failed or not spoken:
            sys.exit(f"the voice {voice} failed to say {text!r} (error {failed})")
        out.write(struct.pack("=i", len(spoken) // 2) + spoken)


if __name__ == "__main__":
    main(*sys.argv[1:])
