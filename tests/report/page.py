"""A page of the report as a reader gets it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from megatron_pr2.report import theme

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Text, figures and captions of a page, which must need nothing but itself: tags that nest, ids that are unique and resolve,
    colours of the reader's scheme, nothing of the network, no NaN.
    """

    def __init__(self, path):
        super().__init__()
        self.source, self.stack, self.words = path.read_text(encoding="utf-8"), [], []
        self.ids, self.references, self.links, self.tags, self.captions = [], set(), [], set(), {}
        self.feed(self.source)
        assert not self.stack, f"unclosed: {self.stack}"
        assert len(self.ids) == len(set(self.ids))
        assert {link[1:] for link in self.links if link.startswith("#")} | self.references <= set(self.ids)
        assert all(link.startswith(("#", "data:image/png;base64,", "https://arxiv.org/abs/")) for link in self.links)
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", self.source))
        namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert addresses - namespaces <= {"https://arxiv.org/abs/2606.00395", "https://arxiv.org/abs/2510.11370"}
        assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & self.tags
        assert "@import" not in self.source
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in self.source
        assert "prefers-color-scheme: dark" in self.source
        used = set(re.findall(r"var\(--(\w+)\)", self.source))
        assert used <= set(theme.COLOURS) | set(theme.PAGE) | {"tone"}
        figures = self.source.partition("<svg")[2]
        assert not [light for light, _ in theme.COLOURS.values() if light in figures]
        assert self.source.count("<svg") == len(self.plots)
        assert set(self.captions) == self.plots
        assert all(caption.endswith(".") and len(caption) > 40 for caption in self.captions.values())
        assert not re.search(r"\bnan\b", self.source, re.I)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.stack.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                self.links.append(value)
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))

    def handle_endtag(self, tag):
        opened, _ = self.stack.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] not in ("style", "text"):
            self.words.append(data)
        if self.stack and self.stack[-1][0] == "figcaption":
            self.captions[next(i for tag, i in self.stack[::-1] if tag == "figure").removeprefix("plot-")] = data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def plots(self):
        return {i.removeprefix("plot-") for i in self.ids if i.startswith("plot-")}
