"""Hypothesis strategies: recipes whose types are right, with mistakes of every kind sprinkled in where they are asked for."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.recipe.samples import WAN

Strategy = st.SearchStrategy[Any]
choice = st.sampled_from

WRONG = choice([None, True, -1, 0, "no", "", [], {}, 1.5, [1, "a"], {"name": 3}, {"cycle": []}, 10**12])
DIT = {"name": "dit", "dim": 48, "layers": 6, "heads": 4}
PRESET = {"name": "wan", "preset": "t2v_1_3b", "layers": 6}


class Maker:
    """Strategies for the parts of a recipe. Without `mistakes` every type and name is right; sizes may still not fit."""

    def __init__(self, mistakes: bool):
        self.mistakes = mistakes

    def slip(self, good: Strategy, *bad: Any) -> Strategy:
        """`good`, or once in a while something wrong: of the given kind, or of any."""
        if not self.mistakes:
            return good
        wrong = choice(bad) if bad else WRONG
        return st.integers(0, 29).flatmap(lambda roll: wrong if roll == 0 else good)

    def options(self, **fields: Strategy) -> Strategy:
        """Any selection of the options, sometimes with one that nobody knows."""
        chosen = st.fixed_dictionaries({}, optional={key: self.slip(value) for key, value in fields.items()})
        more = self.slip(st.just({}), {"unknownn": 1})
        return st.builds(lambda a, b: {**a, **b}, chosen, more)

    def named(self, name: str, needed: dict[str, Strategy] | None = None, **fields: Strategy) -> Strategy:
        required = st.fixed_dictionaries({key: self.slip(value) for key, value in (needed or {}).items()})
        full = st.builds(lambda a, b: {"name": name, **a, **b}, required, self.options(**fields))
        return full if needed else st.just(name) | full

    def cycled(self, good: Strategy) -> Strategy:
        return good | st.lists(good, min_size=1, max_size=3).map(lambda items: {"cycle": items})

    def branch(self) -> Strategy:
        sizes = st.integers(1, 3) | st.lists(st.integers(1, 3), min_size=2, max_size=3)
        ragged = choice(["exact", "resize"])
        layout = self.slip(
            self.named("whole")
            | self.named("windows", {"counts": self.cycled(sizes)}, ragged=ragged)
            | self.named("windows", {"size": sizes})
            | self.named("strided", {"counts": sizes}),
            *("windws", "no", {"name": "whole", "counts": 2}),
        )
        compress = self.named("avg_pool", factor=sizes, of=choice(["both", "keys"]), lift=choice(["nearest", None]))
        compress |= self.named("depthwise_conv", factor=sizes, ragged=ragged)
        return self.options(
            layout=self.cycled(layout),
            compress=compress,
            shift=choice(["none", "none", "roll", "repartition"]),
            adapt=choice(["shared", "own"]) | self.named("lora", {"rank": st.integers(1, 6)}),
            coords=self.options(origin=choice(["grid", "window"]), cell=choice(["index", "centre"])),
        )

    def branched(self) -> Strategy:
        two = st.fixed_dictionaries({"a": self.slip(self.branch()), "b": self.slip(self.branch())})
        fuse = choice(["weights", "token_gate"])
        fuse |= self.named("weights", {"weights": st.just({"a": 0.5, "b": 0.5})}, learned=st.booleans())
        fuse |= self.named("time_gate", {"order": st.just(["a", "b"])}, per=choice(["channel", "head", "scalar"]))
        return st.builds(lambda b, f: {"name": "branched", "branches": b, "fuse": f}, two, self.slip(fuse, "lsee"))

    def attention(self) -> Strategy:
        groups = st.just({"0-1": "full"}).flatmap(
            lambda low: self.branched().map(lambda high: {"name": "by_head", "groups": {**low, "2-3": high}})
        )
        one = self.named("full", kernel=choice(["auto", "math"])) | self.branched() | self.branched() | groups
        one |= self.named("ultragen", variant=choice(["paper", "released"]), windows=choice([2, 4]), rank=st.just(3))
        return self.cycled(self.slip(one, "ful", "acme/none", {"kernel": "auto"}))

    def layer_map(self) -> Strategy:
        keys = self.slip(choice(["odd", "0", "0-2", "1-5/2", "last2", "0-1,5"]), "7", "fisrt_", "0,9")
        more = st.dictionaries(keys, self.attention(), max_size=1)
        return st.builds(lambda rest, found: {"*": rest, **found}, self.attention(), more)

    def video(self) -> Strategy:
        grid = st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9)).map(lambda t: {"grid": list(t)})
        width = self.slip(choice([64, 80, 96]), 100, 0)
        pixels = st.fixed_dictionaries({"width": width, "height": choice([64, 80]), "frames": choice([1, 5, 9])})
        return grid | pixels

    def backbone(self) -> Strategy:
        more = self.options(ffn_chunk=st.integers(1, 9), eps=st.just(1e-5))
        worse = self.slip(st.just({}), {"heads": 5}, {"layers": 2}, {"preset": "xl_2"})
        return st.builds(lambda a, b, c: {**a, **b, **c}, choice([WAN, WAN, DIT, PRESET]), more, worse)

    def recipes(self) -> Strategy:
        sampling = self.named("", {"steps": st.integers(2, 6)}, guidance=st.floats(0, 9))
        sampling = sampling.map(lambda data: {key: value for key, value in data.items() if key != "name"})
        steps = st.dictionaries(
            choice(["0", "*"]),
            st.dictionaries(choice(["*", "1", "odd"]), self.attention(), min_size=1, max_size=1),
            max_size=2,
        )
        sections = {
            "video": self.video(),
            "backbone": self.backbone(),
            "attention": self.layer_map(),
            "sampling": sampling,
        }
        more = {
            "name": self.slip(choice(["x", "ok-1"]), "a b", "../x"),
            "steps": steps,
            "dtype": choice(["float32", "bfloat16"]),
            "seed": st.integers(0, 5),
        }
        return st.fixed_dictionaries(
            {key: self.slip(value) for key, value in sections.items()},
            optional={key: self.slip(value) for key, value in more.items()},
        )


def recipes(mistakes: bool = True) -> Strategy:
    """Random recipes of six tiny layers."""
    return Maker(mistakes).recipes()
