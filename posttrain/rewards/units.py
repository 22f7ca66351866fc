r"""The verifier `units`: compares physical quantities across units (1.5 m = 150 cm, 36 km/h = 10 m/s).

A unit is a product of powers: `kg m/s^2`, `m·s⁻¹`, `\text{ cm}^2`, "metres per second". Sizes are exact, and a unit's
kind (its dimension) is the power of each base unit, so that a length never equals a time.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache

from posttrain.data.answers import final_part, marked_answer
from posttrain.rewards.judging import gold_text, verdict
from posttrain.rewards.numbers import NUMBER, Tolerance, Values, equal, plain, tolerance_of, values
from posttrain.types import RolloutError, Task, Verdict

CONVERTED: Tolerance = (Fraction(0), Fraction(1, 1000))
"""Tolerance for a quantity in another unit than the gold's: conversions are often rounded (27.8 m/s)."""

Kind = tuple[tuple[str, int], ...]
"""Base units and their powers, sorted; empty for pure numbers."""

PI = Fraction(31415926535897932385, 10**19)
PREFIXES = {"n": -9, "µ": -6, "μ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12}
LONG_PREFIXES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "hecto": 2, "kilo": 3}
LONG_PREFIXES |= {"mega": 6, "giga": 9, "tera": 12}
BASES: dict[str, tuple[str, str, str]] = {
    # symbols (with optional prefixes) · names (with optional long prefixes) · size in base units
    "metre": ("m", "metre meter", "1 m"),
    "gram": ("g", "gram gramme", "1/1000 kg"),
    "second": ("s", "second sec", "1 s"),
    "ampere": ("A", "ampere amp", "1 A"),
    "kelvin": ("K", "kelvin", "1 K"),
    "mole": ("mol", "mole", "1 mol"),
    "candela": ("cd", "candela", "1 cd"),
    "litre": ("L l ℓ", "litre liter", "1/1000 m^3"),
    "newton": ("N", "newton", "1 kg m s^-2"),
    "joule": ("J", "joule", "1 kg m^2 s^-2"),
    "watt": ("W", "watt", "1 kg m^2 s^-3"),
    "pascal": ("Pa", "pascal", "1 kg m^-1 s^-2"),
    "hertz": ("Hz", "hertz", "1 s^-1"),
    "coulomb": ("C", "coulomb", "1 A s"),
    "volt": ("V", "volt", "1 kg m^2 s^-3 A^-1"),
    "ohm": ("Ω Ω ohm", "ohm", "1 kg m^2 s^-3 A^-2"),
    "farad": ("F", "farad", "1 A^2 s^4 kg^-1 m^-2"),
    "tesla": ("T", "tesla", "1 kg s^-2 A^-1"),
    "electronvolt": ("eV", "electronvolt", "1602176634/10000000000000000000000000000 kg m^2 s^-2"),
    "calorie": ("cal", "calorie", "4184/1000 kg m^2 s^-2"),
    "watt hour": ("Wh", "", "3600 kg m^2 s^-2"),
    "bit": ("bit", "bit", "1 bit"),
    "byte": ("B", "byte", "8 bit"),
    "tonne": ("t", "tonne", "1000 kg"),
    "bar": ("bar", "bar", "100000 kg m^-1 s^-2"),
}
OTHERS: dict[str, str] = {
    "min minute": "60 s",
    "h hr hrs hour": "3600 s",
    "day d": "86400 s",
    "week wk": "604800 s",
    "year yr": "31557600 s",
    "month mo": "2629800 s",
    "inch in inches": "254/10000 m",
    "foot ft feet": "3048/10000 m",
    "yard yd": "9144/10000 m",
    "mile mi": "1609344/1000 m",
    "hectare ha": "10000 m^2",
    "acre": "40468564224/10000000 m^2",
    "pound lb lbs": "45359237/100000000 kg",
    "ounce oz": "45359237/1600000000 kg",
    "gallon gal": "3785411784/1000000000000 m^3",
    "quart qt": "946352946/1000000000000 m^3",
    "pint pt": "473176473/1000000000000 m^3",
    "cc": "1/1000000 m^3",
    "mph": "44704/100000 m s^-1",
    "kph kmh": "1000/3600 m s^-1",
    "rpm": "1/60 s^-1",
    "atm": "101325 kg m^-1 s^-2",
    "rad radian": "1",
    "degree deg °": f"{PI / 180}",
    "percent percents %": "1/100",
    "dozen": "12",
    "dollar $ usd": "1 $",
    "cent ¢": "1/100 $",
    "euro € eur": "1 €",
    "£ gbp": "1 £",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_WORDS = (("per cent", "percent"), ("degrees Celsius", "°C"), ("degrees Fahrenheit", "°F"), ("degrees", "°"))
_SQUARED = re.compile(r"\b(square|cubic)\s+([A-Za-z]+)")
_TEMPERATURES = {"°C": (Fraction(1), Fraction(27315, 100)), "°F": (Fraction(5, 9), Fraction(45967, 180))}
_MATH_MODE = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$(?!\d)")
_SCIENTIFIC = re.compile(r"(\d)\s*(?:[×x*·]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(-?\d{1,3})(?:\s*\})?")
_UNDER = re.compile(r"/\s*\(([^()]*)\)")
_FACTOR = re.compile(
    r"\s*(?P<op>[*·×⋅/]|per\b)?\s*(?P<name>[A-Za-zµμΩΩℓ]+|[°%$€£¢])(?:\^?\{?\(?(?P<power>-?\d)\)?\}?)?"
)


def units(task: Task, text: str) -> Verdict:
    """Passes if the final answer is the gold quantity, in the gold's unit or another of the same kind.

    Numbers in the gold's unit are compared as by `numeric`, in another unit within CONVERTED; a column `tolerance`
    replaces both. A reply without a unit fails if the gold has one, unless the column `unit_optional` is true: then
    its number is taken to be in the gold's unit. If the gold has no unit, the reply's unit is ignored.
    """
    gold = gold_text(task)
    expected = _quantity(gold)
    if expected is None:
        raise RolloutError(
            f"task {task.id!r} has the gold answer {gold[:60]!r}, expected a number with a known unit. "
            "Use reward.name = 'math' or 'exact'.",
            boundary="reward",
        )
    final = final_part(text)
    found = _quantity(marked_answer(final) or final, anywhere=True)
    if found is None:
        return verdict(False, final, gold)
    (value, unit), (given, given_unit) = expected, found
    tolerance = tolerance_of(task)
    if given_unit == unit or not unit or (not given_unit and task.meta.get("unit_optional")):
        return verdict(equal(value, given, tolerance), final, gold)
    ours, theirs = _in_base_units(value, unit), _in_base_units(given, given_unit)
    same = ours is not None and theirs is not None and ours[1] == theirs[1]
    return verdict(bool(same and ours and theirs and equal(ours[0], theirs[0], tolerance or CONVERTED)), final, gold)


def _quantity(text: str, anywhere: bool = False) -> tuple[Values, str] | None:
    """The number in a text and the unit after it ("" for none), or None; `anywhere` takes the text's last number."""
    text = _readable(text)
    found: tuple[Values, str] | None = None
    end = 0  # of the last unit, whose exponents are not numbers of their own
    for match in NUMBER.finditer(text):
        value = values(match)
        if not value or match.start() < end:
            continue
        rest = text[match.end() :].lstrip()
        unit = _leading_unit(rest)
        end = len(text) - len(rest) + len(unit)
        alone = not text[: match.start()].strip(" =(") and not text[end:].strip(" .)")
        if currency := re.search(r"[$£€]", match.group()):
            unit = f"{currency.group()} {unit}"
        if match["percent"]:
            value, unit = value[:1], f"% {unit}"
        if anywhere or alone:
            found = value, " ".join(unit.split())
    return found


def _readable(text: str) -> str:
    """Removes LaTeX markup and writes powers and degrees in plain characters."""
    text = plain(_MATH_MODE.sub(r" \1 ", text[-2000:])).translate(_SUPERSCRIPTS)
    text = _SCIENTIFIC.sub(r"\1e\2 ", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|\\circ|º", "°", text)
    text = re.sub(r"\\(?:text|mathrm|rm|textrm|operatorname|mbox|unit)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\s+(?=\^)", "", text)
    text = text.replace("\\cdot", "·").replace("\\times", "×").replace("\\mu", "µ").replace("\\Omega", "Ω")
    text = re.sub(r"\\[ ;:]|~|\\\s", " ", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    for words, symbol in _WORDS:
        text = re.sub(words, symbol, text, flags=re.IGNORECASE)
    text = re.sub(r"°\s+(?=[CF]\b)", "°", text)
    text = _UNDER.sub(lambda m: "".join(f"/{f}" for f in re.split(r"[\s*·×⋅]+", m[1].strip())), text)
    return _SQUARED.sub(lambda m: f"{m[2]}^{2 if m[1] == 'square' else 3}", text)


def _leading_unit(text: str) -> str:
    """The longest unit at the start of a text, or ""."""
    stripped = text.lstrip()
    for temperature in _TEMPERATURES:
        if re.match(temperature + r"(?![A-Za-z])", stripped):
            return temperature
    end = 0
    for _ in range(8):
        match = _FACTOR.match(stripped, end)
        if match is None or _lookup(match["name"]) is None or (not end and match["op"] not in (None, "/", "per")):
            break
        end = match.end()
    return stripped[:end]


def _in_base_units(value: Values, unit: str) -> tuple[Values, Kind] | None:
    """The values in base units and their kind, or None for an unknown unit."""
    if unit in _TEMPERATURES:
        slope, offset = _TEMPERATURES[unit]
        return tuple(v * slope + offset for v in value), (("K", 1),)
    size, powers = Fraction(1), dict[str, int]()
    position = 0
    while position < len(unit):
        match = _FACTOR.match(unit, position)
        factor = match and _lookup(match["name"])
        if match is None or not factor:
            return None
        power = int(match["power"] or 1) * (-1 if match["op"] in ("/", "per") else 1)
        size *= factor[0] ** power
        for base, times in factor[1]:
            powers[base] = powers.get(base, 0) + times * power
        position = match.end()
    kind = tuple(sorted((base, times) for base, times in powers.items() if times))
    return tuple(v * size for v in value), kind


@cache
def _table() -> dict[str, tuple[Fraction, Kind]]:
    """Every spelling of a unit → its size in base units and its kind."""
    table: dict[str, tuple[Fraction, Kind]] = {}
    for symbols, names, definition in BASES.values():
        size, kind = _parse_size(definition)
        for symbol in symbols.split():
            table |= {prefix + symbol: (size * Fraction(10) ** power, kind) for prefix, power in PREFIXES.items()}
        for name in names.split():
            for prefix, power in {"": 0, **LONG_PREFIXES}.items():
                table |= {prefix + name + plural: (size * Fraction(10) ** power, kind) for plural in ("", "s")}
    for symbols, _, definition in BASES.values():
        table |= {symbol: _parse_size(definition) for symbol in symbols.split()}  # `cd` is candela, not a centiday
    for names, definition in OTHERS.items():
        for name in names.split():
            table |= {name + plural: _parse_size(definition) for plural in ("", "s" if len(name) > 2 else "")}
    return table


def _parse_size(text: str) -> tuple[Fraction, Kind]:
    size, *bases = text.split()
    powers = [(base.partition("^")[0], int(base.partition("^")[2] or 1)) for base in bases]
    return Fraction(size), tuple(sorted(powers))


def _lookup(name: str) -> tuple[Fraction, Kind] | None:
    """A unit's size and kind by name; case matters for symbols but not for words."""
    table = _table()
    return table.get(name) or (table.get(name.lower()) if len(name) > 3 else None)
