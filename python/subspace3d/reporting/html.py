"""HTML by construction: every string is escaped unless it was built here, so a scene name cannot break a page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_VOID = {"img", "input", "meta", "br", "link"}


class Html(str):
    """Markup that is already safe; plain ``str`` is text and gets escaped."""

    __slots__ = ()


def number(value: float | None) -> str:
    """Four digits; a dash for none."""
    return "–" if value is None else f"{value:#.4g}".rstrip(".")


def element(tag: str, *children: str | None, **attributes: str | bool | None) -> Html:
    """``<tag name="value">children</tag>``.

    Args:
        tag: element name.
        children: text (escaped), `Html` (kept) or None (left out).
        attributes: a trailing underscore is dropped (``class_``), an inner one becomes a hyphen; True writes the bare
            name, None and False leave it out.
    """
    parts = [tag]
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f'{name}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    if tag in _VOID:
        return Html(opening)
    return Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[str | None]) -> Html:
    kept = [child for child in children if child is not None]
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in kept))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", label: str = "table") -> Html:
    """A table in a container of its own that scrolls sideways; the first cell of a row is its heading.

    Args:
        header: names of the columns.
        rows: cells, as many as names.
        caption: a line under the table.
        label: what a screen reader calls the table where it has no caption.
    """
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    inner = element("table", element("thead", head), element("tbody", *body))
    # the container takes keyboard focus so that it can be scrolled without a mouse; the caption stays outside of it,
    # or it would scroll with the table
    scroll = element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption or label)
    return join([scroll, element("p", caption, class_="note") if caption else None])


def bar(share: float) -> Html:
    """A bar under a number that fills ``share`` of its cell; the number says the same."""
    track = element("rect", width="100", height="4", class_="track")
    filled = element("rect", width=f"{100 * min(max(share, 0.0), 1.0):.1f}", height="4", class_="filled")
    return element(
        "svg", track, filled, viewBox="0 0 100 4", preserveAspectRatio="none", class_="bar", aria_hidden="true"
    )


def definitions(items: Sequence[tuple[str, str]]) -> Html:
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in items))


def picture(image: bytes, alt: str, caption: str = "") -> Html:
    """A figure with the PNG inside the page itself."""
    text = element("figcaption", caption) if caption else None
    return element("figure", inline_picture(image, alt), text)


def inline_picture(image: bytes, alt: str) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
    return element("img", src=source, alt=alt, loading="lazy")


def plot(image: bytes, alt: str, caption: str = "") -> Html:
    """A drawing on white: it scrolls sideways on narrow screens, and its lightness is turned over on dark pages."""
    return element("div", picture(image, alt, caption), class_="wide", tabindex="0")


def data_block(anchor: str, value: Any) -> Html:
    """JSON for a script of the page; no text in it can end the block or begin markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return element("script", Html(text), type="application/json", id=anchor)


def details(summary: str, *children: str | None) -> Html:
    return element("details", element("summary", summary), *children)


def section(anchor: str, title: str, *children: str | None) -> Html:
    return element("section", element("h2", title), *children, id=anchor)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, Html]]) -> str:
    """One whole page, which may load nothing and run nothing but the project's own two scripts.

    Args:
        title: heading of the page and of its window.
        subtitle: one line under it.
        sections: (anchor, title in the navigation, section).
    """
    style, early, late = (_own_file(name) for name in ("page.css", "page.js", "viewer.js"))
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src {_fingerprint(style)}; script-src {_fingerprint(early)} {_fingerprint(late)}"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="subspace3d"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", style),
        element("script", early),
    )
    links = [element("li", element("a", name, href=f"#{anchor}")) for anchor, name, _ in sections]
    switch = element("button", "Dark", type="button", data_theme_switch=True, hidden=True)
    body = element(
        "body",
        element("a", "Skip to the content", href=f"#{sections[0][0]}", class_="skip"),
        element("header", element("div", element("h1", title), switch), element("p", subtitle, class_="subtitle")),
        element("nav", element("ul", *links), aria_label="sections"),
        element("main", *(section for _, _, section in sections)),
        element("script", late),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _own_file(name: str) -> Html:
    return Html(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _fingerprint(text: str) -> str:
    """Source expression of a Content Security Policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
