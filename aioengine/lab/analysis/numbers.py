"""Numbers as people read them: seconds, shares, changes, and names that fit."""

from __future__ import annotations

from typing import NamedTuple


class Scale(NamedTuple):
    """A way to write numbers: their unit and decimals, which a mean and its interval share."""

    factor: float
    decimals: int
    unit: str

    def text(self, value: float) -> str:
        return f"{value * self.factor:,.{self.decimals}f}{self.unit}"


def digits_scale(value: float, digits: int, factor: float = 1, unit: str = "") -> Scale:
    """Return the scale that writes this many digits, or all digits before the decimal point."""
    exponent = int(f"{value * factor:.{digits - 1}e}".partition("e")[2])
    return Scale(factor, max(digits - 1 - exponent, 0) if value else 0, unit)


def seconds_scale(seconds: float) -> Scale:
    return digits_scale(seconds, 2, 1000, " ms") if seconds < 0.0995 else digits_scale(seconds, 2, 1, " s")


def share_scale(share: float) -> Scale:
    return Scale(100, int(0 < share < 0.0995 or 0.9905 <= share < 0.9995), "%")


def seconds_text(seconds: float | None) -> str:
    """ "12 ms", "0.34 s", "5.1 s", "98 s"; "-" for None."""
    return "–" if seconds is None else seconds_scale(seconds).text(seconds)


def share_text(share: float | None) -> str:
    """Return a share in percent: "84%", "0.4%"; "-" for None."""
    return "–" if share is None else share_scale(share).text(share)


def change_text(change: float) -> str:
    """Format a relative change: "+84%", "−0.4%", "±0%"."""
    text = share_text(abs(change))
    return "±0%" if text in ("0%", "0.0%") else f"{'+' if change > 0 else '−'}{text}"


def policy_label(policy: str) -> str:
    """Shorten a policy's name so that it fits; a path loses its folders."""
    return shorten(policy.rpartition("/")[2], 26)


def shorten(name: str, width: int = 18) -> str:
    """Shorten a name in its middle, because names often differ only at the end, as "adapter-012" does from
    others."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= width:
        return name
    return f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"
