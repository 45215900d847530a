"""Films whose cuts are known: shots that move in the ways that look like cuts, joined by cuts,
dissolves and fades."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from PIL import Image

SIZE = (160, 90)
SHOTS = ("still", "pan", "fast_pan", "whip", "zoom", "shake", "object", "threes")
SHOTS += ("light", "light_jump", "flash", "dark")


@dataclass
class Film:
    """Frames, float `(90, 160, 3)` up to 255; the numbers of the frames with which a shot begins at
    once; and (first, end) of dissolves and fades."""

    frames: list[np.ndarray] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    gradual: list[tuple[int, int]] = field(default_factory=list)


def texture(rng: np.random.Generator) -> Image.Image:
    """A picture with the spectrum of natural ones, larger than a frame."""
    height, width = 240, 360
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    amplitude = np.maximum(distance, 1 / width) ** -rng.uniform(0.9, 1.4)
    layers = []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) * amplitude).real
        layers.append((noise - noise.mean()) / noise.std())
    luma, red, blue = layers
    colours = np.stack([luma + 0.4 * red, luma, luma + 0.4 * blue], -1)
    levels = rng.uniform(-40, 40, 3) + rng.uniform(-20, 20)
    return Image.fromarray(np.clip(128 + 50 * colours + levels, 0, 255).astype(np.uint8))


def shot(rng: np.random.Generator, name: str, count: int) -> list[np.ndarray]:
    """`count` frames of one scene that moves, or whose light changes, as `name` says."""
    picture = texture(rng)
    angle = rng.uniform(0, 6)
    frames = []

    def there_and_back(distance: float) -> float:
        return 20 + 160 * abs((distance / 160 + 1) % 2 - 1)

    for i in range(count):
        left, top, scale, light, extra = 80.0, 60.0, 1.0, 1.0, 0.0
        if name == "pan":
            left = there_and_back(0.5 * i)
        elif name == "fast_pan":
            left = there_and_back(2.5 * i)
        elif name == "whip":
            left = 10 + 180 * np.clip((i - count / 3) / 8, 0, 1)
        elif name == "zoom":
            scale = 1 - 0.6 * i / count
        elif name == "shake":
            left, top = 80 + rng.uniform(-4, 4), 60 + rng.uniform(-4, 4)
        elif name == "threes":  # every picture is shown three times
            left = there_and_back(6 * (i // 3))
        elif name == "light":
            light = 1 + 0.5 * np.sin(i / 12)
        elif name == "light_jump":
            light = 1.0 if i < count / 2 else 0.55
        elif name == "flash":
            extra = 150 if count // 2 <= i < count // 2 + 1 + count % 4 else 0
        elif name == "dark":
            left, light = there_and_back(i), 0.25
        box = (left, top, left + 160 * scale, top + 90 * scale)
        frame = np.asarray(picture.resize(SIZE, Image.Resampling.BILINEAR, box)).astype(np.float32)
        frame = np.clip(frame * light + extra, 0, 255)
        if name == "object":
            x, y = 65 + 55 * np.sin(i / 9 + angle), 30 + 20 * np.cos(i / 13)
            frame[int(y) : int(y) + 30, int(x) : int(x) + 30] = (230, 40, 40)
        frames.append(frame + rng.normal(0, 1.5, frame.shape))
    return frames


def join(film: Film, frames: list[np.ndarray], transition: str, length: int) -> None:
    """Append a shot, by a cut, a dissolve of `length` frames, or a fade through black."""
    count = len(film.frames)
    if not count:
        film.frames += frames
    elif transition == "cut":
        film.cuts.append(count)
        film.frames += frames
    elif transition == "dissolve":
        for i in range(length):
            share, place = (i + 1) / (length + 1), count - length + i
            film.frames[place] = (1 - share) * film.frames[place] + share * frames[i]
        film.gradual.append((count - length, count))
        film.frames += frames[length:]
    else:
        for i in range(length):
            film.frames[count - length + i] *= 1 - (i + 1) / length
            frames[i] *= i / length
        film.frames += [np.zeros_like(frames[0])] * 8 + frames
        film.gradual.append((count - length, count + 8 + length))


def make_film(seed: int, shots: int = 12, transitions=("cut", "cut", "dissolve", "fade")) -> Film:
    """A film of `shots` shots of 50 to 110 frames, every way of moving in turn."""
    rng, film = np.random.default_rng(seed), Film()
    order = rng.permutation(SHOTS)
    for number in range(shots):
        frames = shot(rng, order[number % len(order)], int(rng.integers(50, 110)))
        transition = transitions[rng.integers(len(transitions))]
        length = int(rng.integers(8, 40) if transition == "dissolve" else rng.integers(6, 30))
        join(film, frames, transition, length)
    return film


def write(frames: list[np.ndarray], path, codec: str = "mpeg4", rate: int = 24):
    """Encode the frames as a video file; return its path."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number, pixels in enumerate(frames):
            whole = np.clip(pixels, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(whole, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@dataclass
class Score:
    """Count right, missed and wrong cuts; `gradual`: of dissolves and fades."""

    right: int = 0
    missed: int = 0
    wrong: int = 0
    gradual_right: int = 0
    gradual_missed: int = 0
    gradual_wrong: int = 0

    def add(self, film: Film, cuts: list[int], gradual: list[tuple[int, int]]) -> None:
        """Compare what was detected with what is there. A cut must be exact to the frame; a
        gradual change must overlap."""

        def overlap(one, other) -> bool:
            return min(one[1], other[1]) > max(one[0], other[0])

        self.right += len(set(cuts) & set(film.cuts))
        self.missed += len(set(film.cuts) - set(cuts))
        for cut in set(cuts) - set(film.cuts):  # within a fade it is a part of it
            self.wrong += not any(first <= cut <= end for first, end in film.gradual)
        for true in film.gradual:
            hit = any(overlap(true, other) for other in gradual)
            self.gradual_right += hit
            self.gradual_missed += not hit
        for other in gradual:
            self.gradual_wrong += not any(overlap(true, other) for true in film.gradual)

    def text(self) -> str:
        """The counts, with recall and precision."""

        def line(name: str, right: int, missed: int, wrong: int) -> str:
            recall = right / max(1, right + missed)
            precision = right / max(1, right + wrong)
            counts = f"{right} right, {missed} missed, {wrong} wrong"
            return f"{name}: {counts}; recall {recall:.3f}, precision {precision:.3f}"

        lines = [line("cuts", self.right, self.missed, self.wrong)]
        gradual = (self.gradual_right, self.gradual_missed, self.gradual_wrong)
        lines.append(line("dissolves and fades", *gradual))
        return "\n".join(lines)
