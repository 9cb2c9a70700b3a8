"""Synthetic colour photographs of road signs, 32x32, drawn by code from a seed.

Every sign is a flat picture seen through a random camera (rotation, tilt, distance, shift), in front of a
random background, under random light, dirt, occlusion, blur and sensor noise. Nothing is downloaded and no font
is used: letters and digits are strokes. The set stands in for real road signs where a small, quick one is needed.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
OVERSAMPLE = 4  # signs are projected at 4 times the final size and averaged down
CANVAS = 192  # pixels of a flat sign
CHUNK = 400  # images worked on at once: keeps temporary arrays in the processor's cache

Point = tuple[float, float]
Colour = tuple[int, int, int]

RED, BLUE, YELLOW = (190, 22, 32), (18, 76, 160), (245, 190, 20)
WHITE, BLACK = (240, 240, 236), (22, 22, 24)


class Pen:
    """Draws in the square [-1, 1] x [-1, 1], y downwards, with antialiasing."""

    SCALE = 3

    def __init__(self, rim: Colour):
        side = CANVAS * self.SCALE
        # Transparent pixels carry the rim's colour, so that no fringe appears when edges are averaged.
        self.image = Image.new("RGBA", (side, side), (*rim, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.half = side / 2

    def _xy(self, points: Sequence[Point]) -> list[Point]:
        return [(self.half * (1 + x), self.half * (1 + y)) for x, y in points]

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon(self._xy(points), fill=(*colour, 255))

    def disc(self, radius: float, colour: Colour, x: float = 0.0, y: float = 0.0) -> None:
        self.draw.ellipse(
            [*self._xy([(x - radius, y - radius), (x + radius, y + radius)])], fill=(*colour, 255)
        )

    def stroke(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """A line through `points` with round joints and ends."""
        self.draw.line(self._xy(points), fill=(*colour, 255), width=round(width * self.half), joint="curve")
        for x, y in points:
            self.disc(width / 2, colour, x, y)

    def finish(self) -> Image.Image:
        return self.image.reduce(self.SCALE).convert("RGBa")


def regular(corners: int, radius: float, turn: float = 0.0) -> list[Point]:
    """The corners of a regular polygon, the first straight up, turned by `turn` parts of a full circle."""
    angles = [2 * math.pi * (k / corners + turn) for k in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Points on an ellipse from `start` to `end` degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 25))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


# Strokes of each glyph in a box of half width 1 and half height 1.
GLYPHS: dict[str, list[list[Point]]] = {
    "0": [arc(0, 0, 1, 1, 0, 360)],
    "3": [arc(0, -0.5, 0.9, 0.5, -150, 90), arc(0, 0.5, 1, 0.5, -90, 150)],
    "5": [[(0.85, -1), (-0.75, -1), (-0.85, -0.1)], arc(0, 0.36, 1, 0.64, -150, 150)],
    "8": [arc(0, -0.5, 0.82, 0.5, 0, 360), arc(0, 0.5, 1, 0.5, 0, 360)],
    "S": [[*arc(0, -0.5, 0.9, 0.5, -30, -270), *arc(0, 0.5, 0.9, 0.5, -90, 150)]],
    "T": [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]],
    "O": [arc(0, 0, 1, 1, 0, 360)],
    "P": [[(-0.8, 1), (-0.8, -1), (0.2, -1), *arc(0.2, -0.45, 0.8, 0.55, -90, 90), (-0.8, 0.1)]],
}


def write(
    pen: Pen, text: str, half_height: float, half_width: float, gap: float, width: float, colour: Colour
) -> None:
    """Centres `text` on the sign."""
    step = 2 * half_width + gap
    for k, letter in enumerate(text):
        centre = (k - (len(text) - 1) / 2) * step
        for points in GLYPHS[letter]:
            pen.stroke([(centre + x * half_width, y * half_height) for x, y in points], colour, width)


def stop() -> Pen:
    pen = Pen(WHITE)
    pen.polygon(regular(8, 1.0, 1 / 16), WHITE)
    pen.polygon(regular(8, 0.92, 1 / 16), RED)
    write(pen, "STOP", half_height=0.3, half_width=0.13, gap=0.16, width=0.1, colour=WHITE)
    return pen


def give_way() -> Pen:
    pen = Pen(RED)
    pen.polygon([(x, y - 0.22) for x, y in regular(3, 1.08, 1 / 2)], RED)
    pen.polygon([(x, y - 0.22) for x, y in regular(3, 0.62, 1 / 2)], WHITE)
    return pen


def no_entry() -> Pen:
    pen = Pen(WHITE)
    pen.disc(0.96, WHITE)
    pen.disc(0.9, RED)
    pen.polygon([(-0.62, -0.16), (0.62, -0.16), (0.62, 0.16), (-0.62, 0.16)], WHITE)
    return pen


def speed(text: str) -> Pen:
    pen = Pen(RED)
    pen.disc(0.96, RED)
    pen.disc(0.72, WHITE)
    write(pen, text, half_height=0.34, half_width=0.19, gap=0.2, width=0.14, colour=BLACK)
    return pen


def priority_road() -> Pen:
    pen = Pen(WHITE)
    pen.polygon(regular(4, 1.0), WHITE)
    pen.polygon(regular(4, 0.66), YELLOW)
    return pen


def blue_disc() -> Pen:
    pen = Pen(WHITE)
    pen.disc(0.96, WHITE)
    pen.disc(0.9, BLUE)
    return pen


def ahead_only() -> Pen:
    pen = blue_disc()
    pen.stroke([(0, 0.58), (0, -0.2)], WHITE, 0.2)
    pen.polygon([(0, -0.7), (0.38, -0.16), (-0.38, -0.16)], WHITE)
    return pen


def turn(side: int) -> Pen:
    """An arrow that comes from below and bends to the left (-1) or the right (1)."""
    pen = blue_disc()
    pen.stroke([(-0.3 * side, 0.56), (-0.3 * side, -0.02), (0.1 * side, -0.02)], WHITE, 0.2)
    pen.polygon([(0.66 * side, -0.02), (0.12 * side, -0.4), (0.12 * side, 0.36)], WHITE)
    return pen


def warning() -> Pen:
    pen = Pen(RED)
    pen.polygon([(x, y + 0.22) for x, y in regular(3, 1.08)], RED)
    pen.polygon([(x, y + 0.22) for x, y in regular(3, 0.72)], WHITE)
    return pen


def caution() -> Pen:
    pen = warning()
    pen.stroke([(0, -0.2), (0, 0.22)], BLACK, 0.15)
    pen.disc(0.09, BLACK, 0, 0.44)
    return pen


def pedestrians() -> Pen:
    pen = warning()
    pen.disc(0.1, BLACK, 0.02, -0.16)
    pen.stroke([(0, 0.02), (-0.03, 0.22)], BLACK, 0.14)
    pen.stroke([(-0.03, 0.22), (-0.2, 0.5)], BLACK, 0.09)
    pen.stroke([(-0.03, 0.22), (0.16, 0.5)], BLACK, 0.09)
    pen.stroke([(-0.22, 0.16), (0, 0.02), (0.22, 0.14)], BLACK, 0.07)
    return pen


SIGNS: dict[str, Callable[[], Pen]] = {
    "ahead-only": ahead_only,
    "caution": caution,
    "give-way": give_way,
    "no-entry": no_entry,
    "pedestrians": pedestrians,
    "priority-road": priority_road,
    "speed-30": lambda: speed("30"),
    "speed-50": lambda: speed("50"),
    "speed-80": lambda: speed("80"),
    "stop": stop,
    "turn-left": lambda: turn(-1),
    "turn-right": lambda: turn(1),
}
CLASSES = tuple(sorted(SIGNS))


@cache
def flat_sign(name: str) -> Image.Image:
    return SIGNS[name]().finish()


def cameras(count: int, random: np.random.Generator) -> np.ndarray:
    """Random homographies [count 8] that take a pixel of the oversampled picture to one of the flat sign."""
    roll, yaw, pitch = (np.radians(random.normal(0, s, count)) for s in (7.0, 20.0, 12.0))
    half = random.uniform(9.0, 15.0, count) * OVERSAMPLE  # the sign fills half to nearly all of the picture
    centre = (SIZE / 2 + random.normal(0, 1.8, (count, 2))) * OVERSAMPLE
    distance = 4.0

    def rotation(angle: np.ndarray, i: int, j: int) -> np.ndarray:
        r = np.tile(np.eye(3), (count, 1, 1))
        r[:, i, i] = r[:, j, j] = np.cos(angle)
        r[:, i, j], r[:, j, i] = -np.sin(angle), np.sin(angle)
        return r

    turned = rotation(roll, 0, 1) @ rotation(pitch, 1, 2) @ rotation(yaw, 0, 2)
    to_picture = turned.copy()
    to_picture[:, :, 2] = [0, 0, distance]
    lens = np.zeros((count, 3, 3))
    lens[:, 0, 0] = lens[:, 1, 1] = half * distance
    lens[:, :2, 2] = centre
    lens[:, 2, 2] = 1
    canvas = np.array([[2 / CANVAS, 0, -1], [0, 2 / CANVAS, -1], [0, 0, 1]])
    back = np.linalg.inv(lens @ to_picture @ canvas)
    return (back / back[:, 2:, 2:]).reshape(count, 9)[:, :8]


def project(names: list[str], views: np.ndarray) -> np.ndarray:
    """Signs as seen by the cameras: float [n 32 32 4], colours already multiplied by alpha, in [0, 1]."""
    side = SIZE * OVERSAMPLE
    seen = np.empty((len(names), SIZE, SIZE, 4), np.uint8)
    for k, (name, view) in enumerate(zip(names, views, strict=True)):
        picture = flat_sign(name).transform(
            (side, side), Image.Transform.PERSPECTIVE, list(view), Image.Resampling.BILINEAR
        )
        seen[k] = np.frombuffer(picture.reduce(OVERSAMPLE).tobytes(), np.uint8).reshape(SIZE, SIZE, 4)
    return seen.astype(np.float32) / 255


@cache
def stretch(points: int) -> np.ndarray:
    """Matrix [32 points] of linear interpolation from `points` values to 32."""
    places = np.linspace(0, points - 1, SIZE)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(points))).astype(np.float32)


def clouds(
    count: int, random: np.random.Generator, scales: dict[int, float], channels: int = 1
) -> np.ndarray:
    """Smooth noise [count 32 32 channels]: a sum of grids of `scales` (points: amplitude)."""
    total = np.zeros((count, channels, SIZE, SIZE), np.float32)
    for points, amplitude in scales.items():
        grid = random.standard_normal((count, channels, points, points), dtype=np.float32)
        total += amplitude * (stretch(points) @ grid @ stretch(points).T)
    return total.transpose(0, 2, 3, 1)


def colours(count: int, random: np.random.Generator, middle: Colour, spread: float) -> np.ndarray:
    """Random colours [count 1 1 3] around `middle` (0..255)."""
    brighter = random.normal(0, spread, (count, 1, 1, 1))
    tinted = random.normal(0, 0.35 * spread, (count, 1, 1, 3))
    return (np.asarray(middle) / 255 + brighter + tinted).astype(np.float32)


def backgrounds(count: int, random: np.random.Generator) -> np.ndarray:
    """Skies over ground, foliage, brick walls, house fronts and plain haze: float [count 32 32 3]."""
    down = np.linspace(0, 1, SIZE, dtype=np.float32)[None, :, None, None]
    across = np.linspace(0, 1, SIZE, dtype=np.float32)[None, None, :, None]

    def pick(low: float, high: float) -> np.ndarray:
        return random.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)

    sky = colours(count, random, (150, 185, 225), 0.12) + (down - 0.5) * pick(-0.1, 0.4)
    sky = sky + clouds(count, random, {4: 0.06, 8: 0.03})
    ground = colours(count, random, (100, 95, 85), 0.1) + clouds(count, random, {8: 0.05, 20: 0.03})
    foliage = colours(count, random, (70, 95, 50), 0.07) + clouds(count, random, {6: 0.1, 14: 0.1, 24: 0.05})
    foliage = foliage + clouds(count, random, {10: 0.04}, channels=3)
    brick = colours(count, random, (150, 105, 85), 0.1) + clouds(count, random, {8: 0.04, 20: 0.02})
    row, column = pick(2.5, 6), pick(5, 11)
    y, x = down * (SIZE - 1) + pick(0, 6), across * (SIZE - 1) + pick(0, 9)
    shifted = x + column / 2 * (np.floor(y / row) % 2)
    brick = brick + pick(0.05, 0.25) * ((y % row < 1) | (shifted % column < 1))
    fronts = colours(count, random, (125, 120, 115), 0.14) + clouds(count, random, {16: 0.03}, channels=3)
    storeys, windows = pick(5, 12), pick(4, 10)
    fronts = fronts - pick(0.1, 0.4) * ((y % storeys > storeys * 0.45) & (x % windows > windows * 0.45))

    horizon = pick(0.3, 0.9) + pick(-0.3, 0.3) * (across - 0.5)
    far = np.where(pick(0, 1) < 0.5, foliage, ground)
    landscape = np.where(down < horizon, sky, far)
    haze = colours(count, random, (130, 130, 130), 0.2) + (across - 0.5) * pick(-0.4, 0.4)
    kind = random.choice(5, count, p=[0.35, 0.25, 0.12, 0.16, 0.12])[:, None, None, None]
    scene = np.choose(kind, [landscape, foliage, brick, fronts, haze + clouds(count, random, {4: 0.08})])
    return np.clip(scene, 0, 1)


def occlusions(count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leaves, snow, stickers on a quarter of the pictures: alpha [count 32 32 1], colour [count 1 1 3]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    centre = random.uniform(4, 28, (count, 2, 1, 1))
    radius = random.uniform(1.5, 6, (count, 2, 1, 1))
    lean = random.uniform(-1, 1, (count, 1, 1))
    dx, dy = (x - centre[:, 0]) / radius[:, 0], (y - centre[:, 1]) / radius[:, 1]
    alpha = np.clip((1 - dx**2 - dy**2 - lean * dx * dy) * 4, 0, 1) * (random.random((count, 1, 1)) < 0.25)
    shade = np.where(random.random((count, 1, 1, 1)) < 0.6, 0.3, 0.85)
    colour = np.clip(shade + random.normal(0, 0.12, (count, 1, 1, 3)), 0, 1)
    return alpha[..., None].astype(np.float32), colour.astype(np.float32)


def blur(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A lens out of focus and a shaking camera: each picture gets a 5x5 kernel of its own."""
    count = len(images)
    dy, dx = np.mgrid[-2:3, -2:3].astype(np.float32)
    angle = random.uniform(0, math.pi, (count, 1, 1))
    along = dx * np.cos(angle) + dy * np.sin(angle)
    beside = dy * np.cos(angle) - dx * np.sin(angle)
    focus = random.gamma(2.0, 0.22, (count, 1, 1)) + 0.2
    shake = focus + random.gamma(1.0, 0.45, (count, 1, 1))
    kernel = np.exp(-0.5 * ((along / shake) ** 2 + (beside / focus) ** 2))
    kernel = (kernel / kernel.sum((1, 2), keepdims=True)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    total = np.zeros_like(images)
    for i in range(5):
        for j in range(5):
            total += kernel[:, i, j, None, None, None] * padded[:, i : i + SIZE, j : j + SIZE]
    return total


def photographs(names: list[str], random: np.random.Generator) -> np.ndarray:
    """One picture for each name: uint8 [n 32 32 3]."""
    count = len(names)
    sign = project(names, cameras(count, random))
    colour, alpha = sign[..., :3], sign[..., 3:]
    faded = random.uniform(0, 0.45, (count, 1, 1, 1)).astype(np.float32)
    grey = colour.mean(-1, keepdims=True)
    colour = colour * (1 - faded) + (0.7 * grey + 0.3 * 0.6 * alpha) * faded
    dirt = 1 + clouds(count, random, {3: 0.1, 7: 0.06})
    # A face turned to the sun or away from it, apart from the light of the whole scene.
    facing = random.uniform(0.5, 1.15, (count, 1, 1, 1)).astype(np.float32)
    scene = colour * dirt * facing + backgrounds(count, random) * (1 - alpha)
    cover, shade = occlusions(count, random)
    scene = scene * (1 - cover) + shade * cover
    scene = blur(scene.astype(np.float32), random)

    light = np.exp(random.normal(-0.05, 0.3, (count, 1, 1, 1)))
    tint = np.exp(random.normal(0, 0.06, (count, 1, 1, 3)))
    contrast = random.uniform(0.45, 1.0, (count, 1, 1, 1))  # fog and glare
    veil = random.uniform(0.1, 0.8, (count, 1, 1, 1))
    scene = (scene * contrast + veil * (1 - contrast)) * light * tint
    noise = random.gamma(2.0, 0.006, (count, 1, 1, 1))
    scene = scene + noise * random.standard_normal(scene.shape, dtype=np.float32)
    return (np.clip(scene, 0, 1) * 255).round().astype(np.uint8)


def draw(per_class: int, seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A shuffled set, `per_class` pictures of each of `CLASSES`: uint8 [n 3 32 32] and labels int64 [n]."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(CLASSES)), per_class))
    parts = [
        photographs([CLASSES[k] for k in labels[start : start + CHUNK]], random)
        for start in range(0, len(labels), CHUNK)
    ]
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 3, 1, 2)), labels
