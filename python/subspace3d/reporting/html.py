"""HTML by construction: every string is escaped unless it was built here, so a scene name cannot break a page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")


class Html(str):
    """Markup that is already safe; plain ``str`` is text and gets escaped."""

    __slots__ = ()


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
    if tag in {"img", "meta", "br", "link"}:
        return Html(opening)
    return Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[str | None]) -> Html:
    kept = [child for child in children if child is not None]
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in kept))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Html:
    """A table in a container of its own that scrolls sideways; the first cell of a row is its heading."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    inner = element("table", element("thead", head), element("tbody", *body))
    # the container takes keyboard focus so that it can be scrolled without a mouse; the caption stays outside of it,
    # or it would scroll with the table
    scroll = element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")
    return join([scroll, element("p", caption, class_="note") if caption else None])


def definitions(items: Sequence[tuple[str, str]]) -> Html:
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in items))


def picture(image: bytes, alt: str, caption: str = "", kind: str = "png", class_: str | None = None) -> Html:
    """A figure with the image inside the page itself."""
    source = f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
    text = element("figcaption", caption) if caption else None
    return element("figure", element("img", src=source, alt=alt, loading="lazy"), text, class_=class_)


def details(summary: str, *children: str | None) -> Html:
    return element("details", element("summary", summary), *children)


def section(anchor: str, title: str, *children: str | None) -> Html:
    return element("section", element("h2", title), *children, id=anchor)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, Html]]) -> str:
    """One whole page.

    Args:
        title: heading of the page and of its window.
        subtitle: one line under it.
        sections: (anchor, title in the navigation, section).
    """
    links = [element("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    navigation = element("nav", *links, aria_label="sections")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    header = element("header", element("h1", title), element("p", subtitle, class_="subtitle"), navigation)
    main = element("main", *(body for _, _, body in sections))
    return f"<!doctype html>\n{element('html', head, element('body', header, main), lang='en')}\n"
