"""report.html and the model card: complete, self-contained, safe against hostile names."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest
import yaml

from tests.analysis.plans import fake_plan
from tests.cost.fakes import Rows, Share
from ultrazoo import report
from ultrazoo.grid import Grid

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects text, sources and links; checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.requests: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.requests.append(value or "")
                if (value or "").startswith("data:image/png;base64,"):
                    self.images.append(base64.b64decode(value.partition(",")[2], validate=True))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(plan) -> Reader:
    reader = Reader()
    reader.feed(report.html(plan))
    assert reader.open == []
    return reader


def test_the_page_requests_nothing():
    page = report.html(fake_plan())
    reader = read(fake_plan())
    assert all(value.startswith("data:") for value in reader.requests)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_holds_everything_a_plan_says():
    plan = fake_plan()
    reader = read(plan)
    text = " ".join(reader.text)
    assert len(reader.images) == 3
    assert all(image.startswith(b"\x89PNG") for image in reader.images)
    for wanted in (
        "a toy that alternates", "arXiv:0000.00000", "grid 3×10×14", "needs tuning (arXiv:0000.00000)", plan.hash,
        "H100 80GB", "attention 58 %, matmul 72 %", "AdamW", "30 steps, guidance 5", "schema: 1", "frame", "row",
        "60 forwards", "peak memory", "after 2 layers every token can have influenced every other", "all 420 tokens",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_the_same_plan_gives_the_same_page():
    assert report.html(fake_plan()) == report.html(fake_plan())


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b"])
def test_names_of_a_recipe_are_only_text(name):
    plan = fake_plan(name, summary=name, source=name)
    reader = read(plan)
    assert "script" not in reader.tags
    assert len(reader.requests) == 3
    assert name in " ".join(reader.text)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": Grid(1, 16, 16), "attention": (Share(),)},
        {"sampling": None},
        {"dtype": "float64"},
        {"plugins": ({"name": "acme/rows", "distribution": "acme", "version": "2.0"},)},
        {"attention": (Rows(),) * 12},
    ],
)
def test_every_kind_of_plan_has_a_page_and_a_card(changes):
    plan = fake_plan(**changes)
    text = " ".join(read(plan).text)
    assert "plugins" not in changes or "acme 2.0" in text
    assert plan.hash in report.card(plan)


def front(card: str) -> tuple[dict, str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_has_front_matter_that_parses():
    plan = fake_plan("name: [tricky] #1")
    head, body = front(report.card(plan))
    assert head["library_name"] == "ultrazoo"
    assert "test/toy" in head["tags"]
    assert head["ultrazoo"]["recipe"] == "name: [tricky] #1"
    assert head["ultrazoo"]["parameters"] == plan.totals.parameters
    assert head["ultrazoo"]["grid"] == [3, 10, 14]
    assert "license" not in head
    assert "The weights are untrained" in body


def test_the_card_of_a_model_that_was_saved_does_not_promise_its_numbers():
    plan = fake_plan()
    assert "makes this model again" in report.card(plan)
    saved = report.card(plan, origin={"seed": 0, "weights": None})
    assert "this model again" not in saved
    assert "one of the same design, from its start" in saved


def test_the_card_says_where_weights_came_from():
    from types import SimpleNamespace

    plan = fake_plan(weights=SimpleNamespace(path="/somewhere/secret.safetensors", format="wan"))
    _, body = front(report.card(plan))
    assert "loaded from a checkpoint" in body
    assert "secret" not in body


def test_recipe_text_is_no_markup_in_the_card():
    _, body = front(report.card(fake_plan("x", summary="# big | <b>bold</b>\n\n---\nline")))
    assert "\\# big \\| \\<b\\>bold\\</b\\> --- line" in body
    assert "<b>" not in body
