"""Draws a car cabin with a driver in one of ten postures: the pictures of the stand-in for State Farm.

Coordinates are pixels of a 640×480 picture, x to the right, y down. The camera sits on the passenger's side of the
dashboard, as State Farm's: the driver faces right, towards the wheel, with the right arm nearest.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 640, 480
SUPERSAMPLING = 2
MISS = 7.0  # pixels: standard deviation of where a hand goes, from clip to clip

Colour = tuple[int, int, int]
Point = tuple[float, float]

SHOULDER, FAR_SHOULDER, HEAD = (232.0, 238.0), (262.0, 226.0), (268.0, 138.0)
WHEEL = (492.0, 292.0)
UPPER_ARM, FOREARM = 105.0, 105.0

SKINS = [(244, 208, 180), (228, 184, 148), (198, 146, 108), (160, 108, 74), (128, 86, 60), (104, 72, 52)]
HAIRS = [(28, 24, 22), (60, 40, 26), (104, 70, 40), (170, 130, 76), (204, 176, 120), (136, 60, 36), (150, 150, 150)]
STYLES = ("short", "long", "bald", "cap", "bun")
PATTERNS = ("plain", "stripes", "bands", "dots")


@dataclasses.dataclass(frozen=True)
class Posture:
    """Where the hands, the head and the things in them are, for one class.

    Attributes:
        right, left: targets of the near and the far hand.
        right_bend, left_bend: which way the elbow points: 1 down, -1 up.
        turn: of the head: 0 profile to the right, 1 to the camera, -1 away to the back.
        pitch: of the head in degrees, positive down.
        lean: how far the shoulders move, (x, y).
        thing: what a hand holds ("phone", "cup", "brush"), and `holder` which ("right", "left").
    """

    right: Point
    left: Point
    right_bend: int = 1
    left_bend: int = 1
    turn: float = 0.0
    pitch: float = 0.0
    lean: Point = (0.0, 0.0)
    thing: str | None = None
    holder: str = "right"


ON_WHEEL, ON_WHEEL_FAR = (476.0, 262.0), (500.0, 222.0)

# In the order of State Farm's c0 … c9; a class with several rows takes one for each clip.
POSTURES: tuple[tuple[Posture, ...], ...] = (
    (Posture(ON_WHEEL, ON_WHEEL_FAR),),
    (Posture((392, 352), ON_WHEEL_FAR, pitch=24, turn=0.15, thing="phone"),),
    (Posture((244, 162), ON_WHEEL_FAR, thing="phone"),),
    (Posture((470, 330), (418, 232), pitch=16, thing="phone", holder="left"),),
    (Posture((474, 282), (322, 142), thing="phone", holder="left"),),
    (Posture((572, 398), ON_WHEEL_FAR, pitch=10, turn=0.3, lean=(26, 10)),),
    (Posture((338, 190), ON_WHEEL_FAR, pitch=-10, thing="cup"),),
    (
        Posture((84, 322), ON_WHEEL_FAR, turn=-0.8, lean=(-26, 6)),
        Posture((70, 396), ON_WHEEL_FAR, turn=-0.9, lean=(-30, 14)),
    ),
    (
        Posture((262, 66), ON_WHEEL_FAR, right_bend=-1, pitch=-6, turn=0.1),
        Posture((304, 76), ON_WHEEL_FAR, right_bend=-1, pitch=-12, thing="brush"),
    ),
    (Posture((312, 438), ON_WHEEL_FAR, turn=1.0), Posture((326, 430), ON_WHEEL_FAR, turn=0.9, pitch=4)),
)


@dataclasses.dataclass(frozen=True)
class Driver:
    """What stays the same over all pictures of a driver: looks, car and camera."""

    skin: Colour
    hair: Colour
    style: str
    beard: bool
    glasses: bool
    shirt: Colour
    second: Colour
    pattern: str
    long_sleeves: bool
    girth: float
    reach: Point
    habit: Point  # where the hands go, beside the usual place
    seat: Colour
    cabin: Colour
    wheel: Colour
    phone: Colour
    cup: Colour
    camera: tuple[float, float, float, float]  # scale, degrees, shift x, shift y
    exposure: float


def random_driver(rng: np.random.Generator) -> Driver:
    """Draws a driver, a car and a camera."""

    def colour(low: int, high: int, vivid: float = 1.0) -> Colour:
        r, g, b = (rng.uniform(low, high) * (1 - vivid) + vivid * rng.uniform(low, high, 3)).astype(int).tolist()
        return (r, g, b)

    return Driver(
        skin=SKINS[rng.integers(len(SKINS))],
        hair=HAIRS[rng.integers(len(HAIRS))],
        style=STYLES[rng.integers(len(STYLES))],
        beard=bool(rng.random() < 0.25),
        glasses=bool(rng.random() < 0.3),
        shirt=colour(110, 250),
        second=colour(20, 235),
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        long_sleeves=bool(rng.random() < 0.5),
        girth=float(rng.uniform(0.88, 1.18)),
        reach=(float(rng.uniform(-12, 10)), float(rng.uniform(-10, 10))),
        habit=(float(rng.normal(0, 5)), float(rng.normal(0, 5))),
        seat=colour(25, 110, 0.4),
        cabin=colour(25, 85, 0.25),
        wheel=colour(15, 70, 0.2),
        phone=colour(10, 60) if rng.random() < 0.7 else colour(190, 240),
        cup=colour(60, 250),
        camera=(
            float(rng.uniform(0.97, 1.07)),
            float(rng.uniform(-2, 2)),
            float(rng.uniform(-12, 12)),
            float(rng.uniform(-8, 8)),
        ),
        exposure=float(rng.uniform(0.85, 1.15)),
    )


def picture(
    driver: Driver,
    label: int,
    clip: np.random.Generator,
    moment: float,
    noise: np.random.Generator,
    *,
    begun: float = 1.0,
    scale: float = 1.0,
) -> np.ndarray:
    """One photograph.

    Args:
        driver: who, in which car.
        label: the class, 0 to 9.
        clip: what a sequence of pictures has in common; give each picture of it a generator in the same state.
        moment: place in the sequence, any number; pictures of near moments are alike.
        noise: decides what differs from picture to picture.
        begun: how far the driver has come from driving safely to the posture of the class, 0 to 1.
        scale: of the picture's sides.

    Returns:
        uint8 [480 · scale, 640 · scale, 3].
    """
    rows = POSTURES[label]
    posture = _begun(rows[clip.integers(len(rows))], begun, clip.normal(0, 1, 4), driver)
    phases, speeds = clip.uniform(0, 2 * math.pi, 12), clip.uniform(0.15, 0.6, 12)
    sway = np.sin(phases + speeds * moment)  # slow movement, -1 to 1
    light = clip.uniform(0, 1, 6)
    painter = _Painter(driver.camera, sway[:2] * 3, scale)
    _outside(painter, clip, moment)
    _cabin(painter, driver, clip)
    _console(painter, driver)
    _driver(painter, driver, posture, sway)
    _foreground(painter, driver, clip)
    return _photograph(painter.image, driver, light, noise)


def _begun(posture: Posture, share: float, miss: np.ndarray, driver: Driver) -> Posture:
    """A posture on the way from safe driving, with hands beside the usual places by habit and by chance."""

    def between(start: Point, end: Point, chance: np.ndarray) -> Point:
        x, y = (a + share * (b - a + h + c) for a, b, h, c in zip(start, end, driver.habit, MISS * chance, strict=True))
        return (x, y)

    lean = (posture.lean[0] * share, posture.lean[1] * share)
    return dataclasses.replace(
        posture,
        right=between(ON_WHEEL, posture.right, miss[:2]),
        left=between(ON_WHEEL_FAR, posture.left, miss[2:]),
        turn=posture.turn * share,
        pitch=posture.pitch * share,
        lean=lean,
    )


class _Painter:
    """Pillow's drawing under the camera's affine map."""

    def __init__(self, camera: tuple[float, float, float, float], shake: np.ndarray, size: float):
        zoom, degrees, x, y = camera
        drawn = size * SUPERSAMPLING
        self.scale = zoom * drawn
        cos, sin = math.cos(math.radians(degrees)) * self.scale, math.sin(math.radians(degrees)) * self.scale
        self.matrix = np.array([[cos, -sin], [sin, cos]])
        self.centre = np.array([WIDTH / 2, HEIGHT / 2])
        self.shift = (self.centre + (x + shake[0], y + shake[1])) * drawn
        self.image = Image.new("RGB", (round(WIDTH * size) * SUPERSAMPLING, round(HEIGHT * size) * SUPERSAMPLING))
        self.draw = ImageDraw.Draw(self.image)

    def map(self, points: Sequence[Point]) -> list[Point]:
        return [tuple(p) for p in ((np.asarray(points) - self.centre) @ self.matrix.T + self.shift).tolist()]

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon(self.map(points), fill=colour)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour, degrees: float = 0.0) -> None:
        angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        self.polygon(_turned(np.stack([rx * np.cos(angles), ry * np.sin(angles)], 1), centre, degrees), colour)

    def rectangle(self, centre: Point, width: float, height: float, colour: Colour, degrees: float = 0.0) -> None:
        w, h = width / 2, height / 2
        self.polygon(_turned(np.array([(-w, -h), (w, -h), (w, h), (-w, h)]), centre, degrees), colour)

    def limb(self, start: Point, end: Point, width: float, end_width: float, colour: Colour) -> None:
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length / 2, dx / length / 2
        corners = [(start[0] + nx * width, start[1] + ny * width), (end[0] + nx * end_width, end[1] + ny * end_width)]
        corners += [(end[0] - nx * end_width, end[1] - ny * end_width), (start[0] - nx * width, start[1] - ny * width)]
        self.polygon(corners, colour)
        self.ellipse(start, width / 2, width / 2, colour)
        self.ellipse(end, end_width / 2, end_width / 2, colour)


def _turned(points: np.ndarray, centre: Point, degrees: float) -> list[Point]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [tuple(p) for p in (points @ np.array([[cos, sin], [-sin, cos]]) + centre).tolist()]


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, max(0, round(c * factor))) for c in colour)
    return (r, g, b)


def _outside(painter: _Painter, clip: np.random.Generator, moment: float) -> None:
    grey = clip.uniform(110, 225)
    painter.rectangle((320, 60), 900, 500, _shade((235, 245, 255), grey / 225))
    painter.rectangle((320, 330), 900, 260, _shade((120, 124, 112), grey / 225))
    for _ in range(9):  # houses and trees pass by
        x = (clip.uniform(0, 900) + 14 * moment) % 900 - 130
        size, (r, g, b) = clip.uniform(30, 130), clip.integers(60, 190, 3).tolist()
        if clip.random() < 0.5:
            painter.rectangle((x, 200 - size / 2), size * 0.8, size * 1.4, (r, (r + g) // 2, (r + b) // 2))
        else:
            painter.ellipse((x, 190 - size / 2), size * 0.6, size * 0.7, (g // 2, g, g // 3))


def _cabin(painter: _Painter, driver: Driver, clip: np.random.Generator) -> None:
    cabin, dark = driver.cabin, _shade(driver.cabin, 0.7)
    painter.polygon([(-150, -150), (800, -150), (800, 12), (480, 18), (60, 34), (-150, 60)], _shade(cabin, 1.5))  # roof
    painter.polygon([(-150, 60), (56, 34), (26, 240), (-150, 260)], cabin)  # pillar behind
    painter.polygon([(456, 18), (486, 18), (566, 226), (528, 226)], cabin)  # pillar in front
    painter.polygon([(-150, 222), (560, 214), (800, 220), (800, 640), (-150, 640)], _shade(cabin, 1.15))  # door
    painter.polygon([(60, 300), (470, 290), (470, 316), (60, 330)], dark)  # armrest
    x, y = driver.reach[0], driver.reach[1] * 0.5
    painter.polygon([(40 + x, 190 + y), (196 + x, 170 + y), (250 + x, 640), (0 + x, 640)], driver.seat)
    painter.polygon([(72 + x, 190 + y), (90 + x, 190 + y), (64 + x, 640), (40 + x, 640)], _shade(driver.seat, 1.3))
    painter.ellipse((148 + x, 120 + y), 46, 56, _shade(driver.seat, 0.9), 8)
    painter.polygon([(540, 226), (800, 196), (800, 640), (520, 640), (506, 330)], _shade(cabin, 0.85))  # dashboard
    if clip.random() < 0.5:
        painter.ellipse((596, 214), 22, 12, tuple(clip.integers(0, 255, 3).tolist()))


def _driver(painter: _Painter, driver: Driver, posture: Posture, sway: np.ndarray) -> None:
    dx, dy = driver.reach[0] + posture.lean[0] + 4 * sway[0], driver.reach[1] + posture.lean[1] + 3 * sway[1]
    shoulder, far_shoulder = _plus(SHOULDER, dx, dy), _plus(FAR_SHOULDER, dx, dy)
    head = _plus(HEAD, dx * 1.15 + 5 * sway[2], dy + 4 * sway[3])
    hands = {}
    for side, target, jitter in (("right", posture.right, sway[4:6]), ("left", posture.left, sway[6:8])):
        at_body = math.dist(target, HEAD) < 120 or target[0] < 160  # moves with the body, not with the car
        x, y = (dx, dy) if at_body else (0.0, 0.0)
        hands[side] = _plus(target, x + 7 * jitter[0], y + 7 * jitter[1])
    things = {side: posture.thing if posture.holder == side else None for side in hands}

    _arm(painter, driver, far_shoulder, hands["left"], posture.left_bend, 0.82, None)
    _wheel(painter, driver)
    if hands["left"][0] > 370:  # in front of the wheel, behind the body
        _hand(painter, driver, hands["left"], 0.85, things["left"])
    _torso(painter, driver, shoulder)
    painter.limb(_plus(shoulder, 14, -34), _plus(head, -8, 30), 40, 34, _shade(driver.skin, 0.88))
    _head(painter, driver, head, posture.turn + 0.12 * sway[8], posture.pitch + 5 * sway[9])
    if hands["left"][0] <= 370:  # the fingers of the far hand reach round the face
        _hand(painter, driver, hands["left"], 0.85, things["left"])
    _arm(painter, driver, shoulder, hands["right"], posture.right_bend, 1.0, things["right"])


def _torso(painter: _Painter, driver: Driver, shoulder: Point) -> None:
    girth = driver.girth
    outline = [(-46, -26), (18, -44), (56, -14), (62, 130), (70, 330), (-70, 330)]
    painter.polygon([_plus(shoulder, x * girth, y) for x, y in outline], driver.shirt)
    painter.ellipse(shoulder, 50 * girth, 42, driver.shirt)
    for k in range(9):
        if driver.pattern == "bands":
            painter.rectangle(_plus(shoulder, 2, 34 * k - 20), 106 * girth, 13, driver.second)
        elif driver.pattern == "stripes" and k < 6:
            painter.rectangle(_plus(shoulder, (17 * k - 40) * girth, 140), 7, 310, driver.second)
        elif driver.pattern == "dots":
            painter.ellipse(_plus(shoulder, (28 * (k % 3) - 30) * girth, 34 * k - 20), 7, 7, driver.second)
    belt = [(22, -40), (34, -38), (74, 330), (58, 330)]
    painter.polygon([_plus(shoulder, x, y) for x, y in belt], (40, 40, 44))


def _arm(
    painter: _Painter, driver: Driver, shoulder: Point, hand: Point, bend: int, size: float, thing: str | None
) -> None:
    """Two links of a length that reaches, the elbow on the side that `bend` says; far arms are smaller and darker."""
    reach = math.dist(shoulder, hand)
    upper, fore = (max(link, reach / 1.96) for link in (UPPER_ARM, FOREARM))
    along = (upper**2 - fore**2 + reach**2) / (2 * reach)
    out = bend * math.sqrt(max(upper**2 - along**2, 0.0))
    ux, uy = (hand[0] - shoulder[0]) / reach, (hand[1] - shoulder[1]) / reach
    side = 1 if ux >= 0 else -1  # so that "down" stays down for an arm that points back
    elbow = (shoulder[0] + along * ux - side * out * uy, shoulder[1] + along * uy + side * out * ux)
    light = 1.1 if size == 1.0 else 0.75
    sleeve = _shade(driver.shirt, light)
    painter.limb(shoulder, elbow, 52 * size * driver.girth, 40 * size, sleeve)
    painter.limb(elbow, hand, 36 * size, 25 * size, sleeve if driver.long_sleeves else _shade(driver.skin, light))
    _hand(painter, driver, hand, size, thing)


def _hand(painter: _Painter, driver: Driver, hand: Point, size: float, thing: str | None) -> None:
    skin = _shade(driver.skin, 1.08 if size == 1.0 else 0.92)
    if thing == "phone":
        upright = hand[1] < 220  # at the ear; else held out to be read
        centre = _plus(hand, 2, -14) if upright else _plus(hand, 12, -20)
        painter.rectangle(centre, 40 * size, 82 * size, _shade(driver.phone, 0.8), 8 if upright else 28)
        if not upright:
            painter.rectangle(centre, 32 * size, 66 * size, (186, 220, 244), 28)
    elif thing == "cup":
        painter.rectangle(_plus(hand, 14, -16), 44, 84, driver.cup, -38)
        painter.rectangle(_plus(hand, -8, -44), 48, 14, (240, 240, 236), -38)
    elif thing == "brush":
        painter.limb(_plus(hand, -6, -8), _plus(hand, -26, -30), 9, 6, driver.cup)
    painter.ellipse(hand, 26 * size, 24 * size, skin)
    for k in range(3):
        start = _plus(hand, 9 * size, (11 * k - 11) * size)
        painter.limb(start, _plus(start, 18 * size, -3 * size), 11 * size, 8 * size, _shade(skin, 0.93 + 0.05 * k))


def _wheel(painter: _Painter, driver: Driver) -> None:
    angles = np.linspace(0, 2 * math.pi, 40)
    ring = [_turned(np.stack([r * np.cos(angles), 3.0 * r * np.sin(angles)], 1), WHEEL, 14) for r in (36.0, 29.0)]
    outer, inner = ring
    for k in range(len(outer) - 1):
        painter.polygon([outer[k], outer[k + 1], inner[k + 1], inner[k]], driver.wheel)
    painter.limb(WHEEL, (WHEEL[0] + 60, WHEEL[1] + 26), 34, 46, _shade(driver.wheel, 1.4))
    painter.limb((WHEEL[0] + 16, WHEEL[1] - 70), (WHEEL[0] - 14, WHEEL[1] + 70), 12, 12, driver.wheel)


def _head(painter: _Painter, driver: Driver, head: Point, turn: float, pitch: float) -> None:
    """`turn` slides the features from the edge of the face (profile) over it (frontal), or out of sight (away)."""

    def at(x: float, y: float) -> Point:
        return _turned(np.array([(x, y)]), head, pitch)[0]

    skin, dark = driver.skin, _shade(driver.skin, 0.72)
    if driver.style in ("long", "bun"):
        painter.ellipse(at(-22, 14), 38, 62 if driver.style == "long" else 44, _shade(driver.hair, 0.85), pitch)
    if driver.style == "bun":
        painter.ellipse(at(-52, -26), 20, 20, driver.hair)
    painter.ellipse(at(0, 0), 46, 58, skin, pitch)
    frontal = min(max(turn, 0.0), 1.0)
    middle = 40 - 34 * frontal  # where the nose is
    if driver.style != "bald":
        painter.ellipse(at(-8 + 6 * frontal, -34), 46, 30, driver.hair, pitch)
        painter.ellipse(at(-26 + 2 * frontal, -6), 26 - 10 * frontal, 44, driver.hair, pitch)
    if turn < -0.3:  # the back of the head
        if driver.style != "bald":
            painter.ellipse(at(6, -4), 42, 52, driver.hair, pitch)
    else:
        if driver.beard:
            painter.ellipse(at(middle * 0.55, 40), 30, 22, driver.hair, pitch)
        painter.polygon(
            [at(middle - 4, -10), at(middle + 16 - 10 * frontal, 12), at(middle - 6, 16)], _shade(skin, 0.9)
        )
        painter.ellipse(at(middle * 0.6, 32), 8 + 6 * frontal, 4 + 6 * frontal, (140, 50, 50), pitch)
        eyes = [middle * 0.66] if frontal < 0.45 else [middle - 17, middle + 17]
        for x in eyes:
            painter.ellipse(at(x, -10), 7, 5, (245, 245, 245), pitch)
            painter.ellipse(at(x + 2 - 2 * frontal, -10), 4, 4, (30, 24, 20), pitch)
            painter.rectangle(at(x, -20), 18, 4, _shade(driver.hair, 0.8), pitch)
            if driver.glasses:
                painter.rectangle(at(x, -9), 22, 5, (20, 20, 24), pitch)
        if frontal < 0.45:
            painter.ellipse(at(-10, 2), 8, 13, dark, pitch)  # the ear
    if driver.style == "cap":
        painter.ellipse(at(-2, -40), 48, 24, driver.second, pitch)
        painter.limb(at(middle * 0.5, -38), at(middle + 30 - 26 * frontal, -34 + 8 * frontal), 14, 10, driver.second)


def _foreground(painter: _Painter, driver: Driver, clip: np.random.Generator) -> None:
    """What lies about: some of it looks like what a hand may hold."""
    for _ in range(clip.integers(0, 4)):
        x, y = clip.uniform(520, 640), clip.uniform(420, 480)
        colour = tuple(clip.integers(0, 255, 3).tolist())
        painter.rectangle((x, y), clip.uniform(14, 60), clip.uniform(14, 60), colour, clip.uniform(0, 90))


def _console(painter: _Painter, driver: Driver) -> None:
    painter.polygon([(548, 330), (660, 316), (672, 640), (536, 640)], _shade(driver.cabin, 0.6))
    painter.rectangle((600, 372), 76, 40, (30, 44, 54), -6)
    for k in range(3):
        painter.ellipse((572 + 28 * k, 424), 9, 9, _shade(driver.cabin, 1.8))


def _photograph(image: Image.Image, driver: Driver, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, shadow, glare, blur, exposure and noise."""
    image = image.reduce(SUPERSAMPLING)
    width, height = image.size
    if (blur := rng.uniform(-0.6, 1.3)) > 0.3:
        image = image.filter(ImageFilter.BoxBlur(blur))
    x, y = np.linspace(-1, 1, width).astype(np.float32), np.linspace(-1, 1, height).astype(np.float32)[:, None]
    angle = 2 * math.pi * light[0]
    gain = 1 + (0.1 + 0.2 * light[1]) * (math.cos(angle) * x + math.sin(angle) * y)
    band = math.cos(angle + 1) * x + math.sin(angle + 1) * y - (2 * light[2] - 1)
    gain[np.abs(band) < 0.3 * light[3]] *= 0.75  # the shadow of a pillar
    gain *= driver.exposure
    gain *= rng.uniform(0.85, 1.15)
    warmth = (light[4] - 0.5) * 0.36
    glare = 100 * light[5] ** 3 * np.exp(-6 * ((x - 0.4 * math.cos(angle)) ** 2 + (y + 0.6) ** 2))
    grain = rng.standard_normal((height // 2, width // 2, 3), np.float32) * rng.uniform(3, 9)
    drawn, pixels = np.asarray(image), np.empty((height, width, 3), np.uint8)
    for c, colour in enumerate(np.asarray([1 + warmth, 1.0, 1 - warmth], np.float32)):  # twice as fast as all at once
        channel = drawn[..., c].astype(np.float32)
        channel *= gain * colour
        channel += glare
        blocks = channel.reshape(height // 2, 2, width // 2, 2)  # a grain is 2×2 pixels
        blocks += grain[:, None, :, None, c]
        pixels[..., c] = channel.clip(0, 255)
    return pixels


def _plus(point: Point, x: float, y: float) -> Point:
    return (point[0] + x, point[1] + y)
