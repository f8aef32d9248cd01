"""Whether two short answers are the same number: exact fractions where possible, in bounded time for any text.

Reads decimals, fractions, powers, roots, pi and percent, in plain notation or LaTeX. Anything else is compared as text.
This is a verifier for rewards, not computer algebra: what it cannot read is never equal to a number.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_LENGTH = 512  # characters of an expression
MAX_BITS = 4096  # of a numerator or denominator
MAX_EXPONENT = 512
MAX_NESTING = 32
TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-z]+|pi|sqrt|[-+*/^(){}%]")
WRITTEN = {  # what is written in several ways, in order
    "\\left": "", "\\right": "", "\\!": "", "\\,": "", "\\;": "", "\\ ": "", "$": "", "\\(": "", "\\)": "", "\\%": "%",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cdot": "*", "\\times": "*", "\\div": "/", "×": "*", "·": "*", "÷": "/",
    "−": "-", "π": "pi", "√": "sqrt", "**": "^",
}  # fmt: skip
Value = Fraction | float


class Unreadable(ValueError):
    """An answer that cannot be read; it scores 0."""


def same_value(answer: str, truth: str) -> bool:
    """Whether the two are equal: exactly as fractions, to 1e-9 where a root or pi is in them, else as text.

    "x = 3" counts as "3". An empty answer equals nothing.
    """
    given, wanted = _normal(answer), _normal(truth)
    if not given:
        return False
    try:
        expected = evaluate(wanted)
    except Unreadable:
        return given.casefold() == wanted.casefold()
    try:
        found = evaluate(given)
    except Unreadable:
        return False
    if isinstance(expected, Fraction) and isinstance(found, Fraction):
        return expected == found
    try:
        return math.isclose(expected, found, rel_tol=1e-9)
    except OverflowError:  # a fraction beyond float64 beside a root
        return False


def _normal(text: str) -> str:
    if len(text) > 4 * MAX_LENGTH or re.search(r"[\d.]\s+[\d.]", text):
        return text.strip()  # no number: too long, or two of them
    for old, new in WRITTEN.items():
        text = text.replace(old, new)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000,000
    left, equals, right = text.partition("=")
    if equals and "=" not in right and re.fullmatch(r"\s*[A-Za-z]\w{0,8}\s*", left):
        text = right
    return "".join(text.split()).rstrip(".")


def evaluate(text: str) -> Value:
    """The value of an expression. Raises Unreadable for anything that is none, too long, or too large."""
    if not 0 < len(text) <= MAX_LENGTH:
        raise Unreadable(f"an expression has 1 to {MAX_LENGTH} characters")
    tokens = TOKEN.findall(text)
    if sum(map(len, tokens)) != len(text):
        raise Unreadable("an unknown sign")
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
    except (ArithmeticError, ValueError) as problem:  # a root of a negative number, division by 0, overflow
        raise Unreadable(str(problem)) from problem
    if reader.tokens or (isinstance(value, float) and not math.isfinite(value)):
        raise Unreadable("not one finite value")
    return value


class _Reader:
    """Recursive descent over tokens that are taken from the end of a reversed list."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def sum(self, depth: int) -> Value:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = 1 if self.tokens.pop() == "+" else -1
            value = _checked(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Value:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= 1 if self.tokens.pop() == "+" else -1
        value = self.power(depth)
        while self.tokens and self.peek() not in ("+", "-", ")", "}"):
            if self.peek() in ("*", "/"):
                divide = self.tokens.pop() == "/"
                minus = self.peek() == "-" and bool(self.tokens.pop())
                factor = self.power(depth)
                value = _checked(value / factor if divide else value * factor)
                sign = -sign if minus else sign
            elif self.peek()[0] in ".0123456789" or self.peek() == "\\frac":
                raise Unreadable("two numbers side by side, or a mixed number")
            else:  # 2 pi, 3 \sqrt{2}
                value = _checked(value * self.power(depth))
        return sign * value

    def power(self, depth: int) -> Value:
        base = self.atom(depth)
        while self.peek() == "%":
            self.tokens.pop()
            base = base / 100
        if self.peek() != "^":
            return base
        self.tokens.pop()
        minus = self.peek() == "-" and bool(self.tokens.pop())
        exponent = self.atom(depth)
        return _power(base, -exponent if minus else exponent)

    def atom(self, depth: int) -> Value:
        if not self.tokens or depth > MAX_NESTING:
            raise Unreadable(f"something is missing, or nested deeper than {MAX_NESTING}")
        token = self.tokens.pop()
        if token[0] in ".0123456789":
            return _checked(Fraction(token))
        if token in ("pi", "\\pi"):
            return math.pi
        if token in ("sqrt", "\\sqrt"):
            return _root(self.atom(depth + 1))
        if token == "\\frac":
            return _checked(self.group("{", depth) / self.group("{", depth))
        if token in ("(", "{"):
            self.tokens.append(token)
            return self.group(token, depth)
        raise Unreadable(f"{token} is not known")

    def group(self, opening: str, depth: int) -> Value:
        if self.peek() != opening:
            raise Unreadable(f"{opening} is missing")
        self.tokens.pop()
        value = self.sum(depth + 1)
        if self.peek() != {"(": ")", "{": "}"}[opening]:
            raise Unreadable(f"{opening} is not closed")
        self.tokens.pop()
        return value


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Unreadable("a number is too large")
    return value


def _power(base: Value, exponent: Value) -> Value:
    if not -MAX_EXPONENT <= exponent <= MAX_EXPONENT:
        raise Unreadable("an exponent is too large")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) > 2 * MAX_BITS:
            raise Unreadable("a power is too large")
        return _checked(base**exponent.numerator)
    if base < 0:
        raise Unreadable("a root of a negative number")
    return float(base) ** float(exponent)


def _root(value: Value) -> Value:
    if isinstance(value, Fraction) and value >= 0:
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if top * top == value.numerator and bottom * bottom == value.denominator:
            return Fraction(top, bottom)
    return math.sqrt(value)
