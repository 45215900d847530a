"""How well `mmdit prepare-clips` finds cuts: in generated films, and in real clips that are joined
in many orders. Each film is encoded, measured and cut as the command does it.

    python -m tests.drivers.cut_accuracy --films 40
    python -m tests.drivers.cut_accuracy --films 10 --clips my_clips/train_videos.jsonl
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from mmdit.data.dataset.records import read_records
from mmdit.data.dataset.videos import probe, read_video
from mmdit.data.preparing.film_signals import FilmSignals
from mmdit.data.preparing.shots import ShotSettings, columns, gradual_changes, hard_cuts
from tests.helpers.films import Film, Score, make_film, write


def detected(path: Path, settings: ShotSettings) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the cuts and the gradual changes of a video file."""
    film = FilmSignals(str(path), path.with_suffix(".safetensors"))
    for _ in film.measure():
        pass
    numbers = columns(film.signals)
    cuts = hard_cuts(numbers, settings)
    return cuts, gradual_changes(numbers, cuts, settings.cut)


def joined(clips: list[list[np.ndarray]], seed: int) -> Film:
    """All clips one behind the other, in an order that the seed says."""
    film = Film()
    for number in np.random.default_rng(seed).permutation(len(clips)):
        if film.frames:
            film.cuts.append(len(film.frames))
        film.frames += clips[number]
    return film


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=40)
    parser.add_argument("--clips", help="a JSONL with video_path: real clips of one shot each")
    parser.add_argument("--codec", default="libx264")
    parser.add_argument("--cut", type=float, default=ShotSettings().cut)
    args = parser.parse_args(argv)
    clips = []
    if args.clips:
        for record in read_records(args.clips, "video", "video_path"):
            images = read_video(record.path, probe(record.path).fps)
            clips.append([np.asarray(image.resize((320, 180)), np.float32) for image in images])
    score, frames, seconds = Score(), 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        for seed in range(args.films):
            film = joined(clips, seed) if clips else make_film(seed)
            write(film.frames, path, args.codec)
            start = time.perf_counter()
            score.add(film, *detected(path, ShotSettings(cut=args.cut)))
            seconds += time.perf_counter() - start
            frames += len(film.frames)
            path.with_suffix(".safetensors").unlink()
    print(f"{args.films} films, {frames} frames, {frames / seconds:.0f} frames a second")
    print(score.text())


if __name__ == "__main__":
    main()
