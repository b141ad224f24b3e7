"""Pages that reports write, as elements with their text; and names that must not become elements."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script>",
    "\"two\" & 'one' {three}",
    r"_ % & # $ ~ ^ \ [x]",
    "=cmd()",
    "線形 $x$ <g id=-- -->",
    "long " * 30,
)
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page with their text, and whether they are nested well."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open[-1]}"

    def handle_starttag(self, tag, attributes):
        element = {
            "tag": tag,
            "text": "",
            "inside": [each["tag"] for each in self.open],
            "parents": {id(each) for each in self.open},
        }
        element["attributes"] = dict(attributes)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without its beginning"
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, inside=None):
        return [each for each in self.elements if each["tag"] == tag and (inside is None or id(inside) in each["parents"])]


def table_of(page, caption):
    return next(each for each in page.all("table") if each["text"].startswith(caption))
