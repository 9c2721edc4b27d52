"""Analyse smartwatch recordings of physiotherapy exercises: cadence and effort of each exercise.

140 recordings of an accelerometer and a gyroscope (six axes, 50 Hz, ten people, seven exercises)
come inside the wheel of seglearn (Burns et al., Physiological Measurement 39(7), 2018). They are
joined by exercise, zero-phase filtered, resampled to 200 Hz, correlated with a template repetition
and turned into spectrograms. The program knows nothing of Moirai; run it with `python` or with
`python -m moirai run`: it prints the same.

    python examples/signal_chain.py --repeat 3
"""

import argparse
import importlib.util
import zlib
from pathlib import Path

import numpy as np
from scipy import signal

SENSOR_HZ = 50
ANALYSIS_HZ = 200
EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}


def load():
    """Read the recordings, joined by exercise: name -> samples of shape (6, samples)."""
    folder = Path(importlib.util.find_spec("seglearn").origin).parent
    data = np.load(
        folder / "data" / "watch_dataset.npy", allow_pickle=True, encoding="latin1"
    ).item()
    recordings = {}
    for index, label in enumerate(data["y_labels"]):
        members = [rows for rows, kind in zip(data["X"], data["y"], strict=True) if kind == index]
        recordings[EXERCISES[label]] = np.concatenate(members).T.copy()
    return recordings


def analyse(samples):
    """Return cadence (repetitions a minute), effort (dB) and envelope of the template match."""
    band = signal.butter(4, [0.15, 12.0], btype="bandpass", fs=SENSOR_HZ)
    steady = signal.filtfilt(*band, samples)
    fine = signal.resample(steady, samples.shape[1] * ANALYSIS_HZ // SENSOR_HZ, axis=1)
    smooth = signal.filtfilt(*signal.butter(3, 6.0, fs=ANALYSIS_HZ), fine)
    template = smooth[:, : 4 * ANALYSIS_HZ][:, ::-1]
    match = signal.fftconvolve(smooth, template, mode="same", axes=1).sum(axis=0)
    envelope = np.sqrt(signal.fftconvolve(match**2, np.hanning(ANALYSIS_HZ), mode="same").clip(0))
    frequencies, _, power = signal.spectrogram(
        fine, fs=ANALYSIS_HZ, nperseg=4096, noverlap=3584, detrend="linear"
    )
    spectrum = power.mean(axis=(0, 2))
    slow = (frequencies > 0.1) & (frequencies < 2.0)
    cadence = 60 * frequencies[slow][np.argmax(spectrum[slow])]
    effort = 10 * np.log10(np.square(smooth).sum(axis=0).mean())
    return cadence, effort, envelope


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=1, help="how often to analyse the recordings")
    parser.add_argument(
        "--exercises", type=int, default=7, help="how many exercises to analyse, 1 to 7"
    )
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: must be at least 1, got {arguments.repeat}")
    if not 1 <= arguments.exercises <= len(EXERCISES):
        parser.error(f"--exercises: must be from 1 to {len(EXERCISES)}, got {arguments.exercises}")
    for _ in range(arguments.repeat):
        lines = []
        for name, samples in list(load().items())[: arguments.exercises]:
            cadence, effort, envelope = analyse(samples)
            checksum = zlib.crc32(np.round(envelope, 3).tobytes())
            lines.append(
                f"{name:20s} {samples.shape[1] / SENSOR_HZ:5.0f} s  cadence {cadence:5.1f}/min  "
                f"effort {effort:5.1f} dB  checksum {checksum:08x}"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
