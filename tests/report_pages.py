"""Reads a report as its tests need it."""

import base64
import html.parser
import io
from collections import Counter

import numpy as np
from PIL import Image


class Page(html.parser.HTMLParser):
    """The elements of a page, as (name, attributes), and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._silent = [], [], 0
        self.source = text
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._silent += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._silent -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._silent:
            self.texts.append(data)

    def all(self, tag, **wanted):
        """The attributes of all elements of a kind that have some attributes."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [
            found
            for name, found in self.elements
            if name == tag and wanted.items() <= found.items()
        ]

    def picture(self, alt):
        """The pixels of the picture with a text, uint8 [H, W, 3]."""
        (found,) = self.all("img", alt=alt)
        return decoded(found["src"])


def decoded(uri):
    """The pixels of a data URI, uint8 [H, W, 3]."""
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    )


def check_self_contained(page):
    """Checks that nothing is loaded from elsewhere, and pictures and ids are whole."""
    names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background")
    for _, attributes in page.elements:
        for name in names:
            assert attributes.get(name, "data:").startswith(("data:", "#")), attributes
    assert not any(word in page.source for word in ("url(", "@import", "http://", "https://"))
    kinds = {name for name, _ in page.elements}
    assert not kinds & {"iframe", "object", "embed", "base", "form"}
    images = page.all("img")
    assert all(image["alt"].strip() for image in images)
    assert all(int(image["width"]) and int(image["height"]) for image in images)
    ids = Counter(found["id"] for _, found in page.elements if "id" in found)
    assert max(ids.values()) == 1
    for _, found in page.elements:
        for name in ("for", "aria-labelledby"):
            assert name not in found or found[name] in ids
    headings = [name for name, _ in page.elements if name in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and headings.count("h1") == 1
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:")
