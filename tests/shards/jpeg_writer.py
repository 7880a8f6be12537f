"""A JPEG writer for tests: any sampling factors, restart intervals and Huffman tables, of coefficients it is given.

Pillow writes three of the many sampling factors that decoders must know. There is no transform here: the coefficients
are what a test wants them to be. ITU-T T.81, annexes B, C and F.
"""

from __future__ import annotations

import struct

import numpy as np

ZIGZAG = sorted(range(64), key=lambda n: (n // 8 + n % 8, (n // 8 if (n // 8 + n % 8) % 2 else n % 8)))
"""Zigzag position → natural position."""

DC_SYMBOLS = tuple(range(12))
AC_SYMBOLS = (*(run << 4 | size for size in range(1, 11) for run in range(16)), 0x00, 0xF0)


def huffman_code(symbols: tuple[int, ...], lengths: dict[int, int]) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The DHT content for symbols that take code lengths in order, and (code, length) of each.

    Args:
        symbols: the most frequent first.
        lengths: code length → how many symbols have it; must hold all of them.
    """
    counts = bytes(lengths.get(length, 0) for length in range(1, 17))
    codes, code, index = {}, 0, 0
    for length in range(1, 17):
        for _ in range(lengths.get(length, 0)):
            codes[symbols[index]] = (code, length)
            code, index = code + 1, index + 1
        assert code < 1 << length or index == 0, "the code of all ones is reserved"
        code <<= 1
    assert index == len(symbols)
    return counts + bytes(symbols), codes


FLAT = ({4: 12}, {8: 162})
"""Code lengths of the DC and the AC table: all equal."""
STEEP = ({2: 1, 3: 2, 5: 3, 8: 2, 9: 1, 12: 3}, {2: 1, 4: 4, 6: 6, 9: 10, 12: 21, 14: 30, 16: 90})
"""Short ones, and ones longer than any look-up table."""


class _Bits:
    def __init__(self) -> None:
        self.done = bytearray()
        self._value, self._count = 0, 0

    def put(self, value: int, count: int) -> None:
        self._value = self._value << count | value
        self._count += count
        while self._count >= 8:
            self._count -= 8
            byte = self._value >> self._count & 255
            self.done += bytes((byte, 0)) if byte == 255 else bytes((byte,))
        self._value &= (1 << self._count) - 1

    def pad(self) -> None:
        if self._count:
            self.put((1 << (8 - self._count)) - 1, 8 - self._count)


def random_coefficients(generator: np.random.Generator, blocks: int, *, density: float = 0.12) -> np.ndarray:
    """int [blocks, 64] in zigzag order: DC anywhere, AC sparse and smaller at high frequencies; some blocks flat."""
    strength = 60 / (1 + np.arange(64))
    values = np.rint(generator.laplace(0, 1, (blocks, 64)) * strength).astype(int)
    values[generator.random((blocks, 64)) > density] = 0
    values[generator.random(blocks) < 0.2, 1:] = 0
    values[:, 0] = generator.integers(-60, 61, blocks)
    values[generator.random(blocks) < 0.05, 63] = 1  # a block without an end-of-block code
    return values


def write_jpeg(
    width: int,
    height: int,
    sampling: tuple[tuple[int, int], ...],
    generator: np.random.Generator,
    *,
    restart_interval: int = 0,
    lengths: tuple[dict[int, int], dict[int, int]] = FLAT,
    quantization: int = 16,
    density: float = 0.12,
) -> bytes:
    """A baseline JPEG of random coefficients.

    Args:
        width, height: in pixels.
        sampling: (across, down) of each component, one or three.
        generator: draws the coefficients.
        restart_interval: in MCUs; 0 for none.
        lengths: code lengths of the DC and AC tables.
        quantization: the step of the DC coefficient; others are larger.
        density: share of AC coefficients that are not zero.
    """
    most_across, most_down = max(h for h, _ in sampling), max(v for _, v in sampling)
    single = len(sampling) == 1
    if single:
        most_across = most_down = 1
    across, down = -(-width // (8 * most_across)), -(-height // (8 * most_down))
    dc_content, dc_codes = huffman_code(DC_SYMBOLS, lengths[0])
    ac_order = sorted(AC_SYMBOLS, key=lambda symbol: (symbol != 0, (symbol & 15) + (symbol >> 4)))
    ac_content, ac_codes = huffman_code(tuple(ac_order), lengths[1])
    steps = bytes(min(255, quantization + k // 2) for k in range(64))
    out = bytearray(b"\xff\xd8" + _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"))
    out += _segment(0xDB, b"\0" + steps) + _segment(0xC4, b"\0" + dc_content) + _segment(0xC4, b"\x10" + ac_content)
    frame = struct.pack(">BHHB", 8, height, width, len(sampling))
    frame += b"".join(bytes((number + 1, h << 4 | v, 0)) for number, (h, v) in enumerate(sampling))
    out += _segment(0xC0, frame)
    if restart_interval:
        out += _segment(0xDD, struct.pack(">H", restart_interval))
    scan = bytes((len(sampling),)) + b"".join(bytes((number + 1, 0)) for number in range(len(sampling)))
    out += _segment(0xDA, scan + b"\0\x3f\0")
    blocks_of = [1 if single else h * v for h, v in sampling]
    values = random_coefficients(generator, across * down * sum(blocks_of), density=density)
    bits, predictors, block = _Bits(), [0] * len(sampling), 0
    for mcu in range(across * down):
        if restart_interval and mcu and mcu % restart_interval == 0:
            bits.pad()
            bits.done += bytes((0xFF, 0xD0 + (mcu // restart_interval - 1) % 8))
            predictors = [0] * len(sampling)
        for component, count in enumerate(blocks_of):
            for _ in range(count):
                _put_block(bits, values[block], predictors[component], dc_codes, ac_codes)
                predictors[component] = int(values[block, 0])
                block += 1
    bits.pad()
    return bytes(out + bits.done + b"\xff\xd9")


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _put_value(bits: _Bits, value: int, size: int) -> None:
    bits.put(value if value > 0 else value + (1 << size) - 1, size)


def _put_block(bits: _Bits, values: np.ndarray, predictor: int, dc_codes: dict, ac_codes: dict) -> None:
    difference = int(values[0]) - predictor
    size = abs(difference).bit_length()
    bits.put(*dc_codes[size])
    if size:
        _put_value(bits, difference, size)
    run = 0
    for value in map(int, values[1:]):
        if value == 0:
            run += 1
            continue
        while run > 15:
            bits.put(*ac_codes[0xF0])
            run -= 16
        size = abs(value).bit_length()
        bits.put(*ac_codes[run << 4 | size])
        _put_value(bits, value, size)
        run = 0
    if run:
        bits.put(*ac_codes[0x00])
