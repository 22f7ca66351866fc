"""Exact arithmetic with bounded size: expressions are parsed to a syntax tree and evaluated without executing code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from posttrain.data.tool_schema import ToolError

MOST_CHARACTERS = 200
MOST_BITS = 4096  # of any numerator or denominator, also of intermediate results: about 1,200 digits
MOST_DECIMALS = 30  # a value with more is shown as a fraction
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_SPELT = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})
_WORK: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Works out arithmetic exactly.

    Args:
        expression: numbers with + - * / // % ** and brackets, e.g. (12+30)*7/2
    """
    return show(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The exact value. Operators and precedence are Python's; `^` means power, and `×` and `÷` are accepted.

    Raises ToolError for anything but numbers, `+ - * / // % **` and brackets, for division by zero, and if the text or
    any intermediate number is too long.
    """
    text = " ".join(expression.translate(_SPELT).split())
    if len(text) > MOST_CHARACTERS:
        raise ToolError(f"the expression has {len(text)} characters, at most {MOST_CHARACTERS} are read.")
    if strange := re.search(r"[^-+*/%().0-9eE ]", text):
        raise ToolError(f"{strange.group()!r} is not arithmetic; use numbers, + - * / // % ** and brackets.")
    try:
        tree = ast.parse(text, mode="eval")
        return _value(tree.body, text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, ToolError):
            raise
        raise ToolError(f"{text!r} cannot be read as arithmetic; write for example (12+30)*7.") from None


def show(value: Fraction) -> str:
    """Formats a value exactly: as a whole number, as a decimal if that is exact and short, or else as a fraction."""
    for places in range(MOST_DECIMALS + 1):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
            point = f"{digits[:-places]}.{digits[-places:]}" if places else digits
            return f"-{point}" if value < 0 else point
    return f"{value.numerator}/{value.denominator}"


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        literal = text[node.col_offset : node.end_col_offset]
        if not _NUMBER.fullmatch(literal):
            raise ToolError(f"{literal!r} is not a number.")
        return _bounded(Fraction(literal.rstrip(".")))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ToolError("only numbers, + - * / // % ** and brackets are arithmetic here.")
    left, right = _value(node.left, text), _value(node.right, text)
    if isinstance(node.op, ast.Pow):
        return _power(left, right)
    if type(node.op) not in _WORK:
        raise ToolError("only numbers, + - * / // % ** and brackets are arithmetic here.")
    if not right and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
        raise ToolError("division by zero.")
    return _bounded(Fraction(_WORK[type(node.op)](left, right)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError(f"the exponent {show(exponent)} is not a whole number.")
    if not base and exponent < 0:
        raise ToolError("division by zero.")
    if base in (-1, 0, 1):  # their powers do not grow
        return base ** (abs(exponent.numerator) % 2 + 2 * (exponent != 0))
    if abs(exponent) * (_bits(base) - 1) > MOST_BITS:
        raise _too_long()
    return _bounded(base**exponent.numerator)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MOST_BITS:
        raise _too_long()
    return value


def _too_long() -> ToolError:
    return ToolError(f"a number in the work is longer than {MOST_BITS} bits.")
