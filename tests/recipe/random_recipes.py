"""Hypothesis strategies: recipes that are mostly right, with mistakes of every kind sprinkled in."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.recipe.samples import WAN

wrong = st.sampled_from([None, True, -1, 0, "no", "", [], {}, 1.5, [1, "a"], {"name": 3}, {"cycle": []}, 10**12])


def sometimes_wrong(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 14).flatmap(lambda roll: wrong if roll == 0 else good)


def options(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any selection of the options, sometimes with one that nobody knows."""
    chosen = st.fixed_dictionaries({}, optional={key: sometimes_wrong(value) for key, value in fields.items()})
    return st.builds(lambda a, b: {**a, **b}, chosen, st.sampled_from([{}, {}, {}, {}, {}, {"unknwon": 1}]))


def named(name: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(name) | options(**fields).map(lambda data: {"name": name, **data})


def cycled(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return good | st.lists(good, min_size=1, max_size=3).map(lambda items: {"cycle": items})


few = st.integers(1, 6)
sizes = few | st.lists(few, min_size=1, max_size=3)
choice = st.sampled_from
layout = (
    named("whole")
    | named("windows", counts=cycled(sizes), ragged=choice(["exact", "resize"]))
    | named("windows", size=sizes)
    | named("strided", counts=sizes)
    | choice(["windws", "no"])
)
compress = named(
    "avg_pool", factor=sizes, of=choice(["both", "keys"]), lift=choice(["nearest", "bilinear", None])
) | named("depthwise_conv", factor=sizes, ragged=choice(["exact", "resize"]))
branch = options(
    layout=cycled(layout),
    compress=compress,
    shift=choice(["none", "roll", "repartition"]),
    adapt=choice(["shared", "own"]) | named("lora", rank=few),
    coords=options(origin=choice(["grid", "window"]), cell=choice(["index", "centre"])),
)
fuse = (
    choice(["weights", "lse", "token_gate"])
    | named("weights", weights=st.just({"a": 0.5, "b": 0.5}), learned=st.booleans())
    | named("time_gate", order=st.just(["a", "b"]), per=choice(["channel", "head", "scalar"]))
)
branches = st.dictionaries(choice(["a", "b", "c", "1x"]), sometimes_wrong(branch), max_size=3)
attention = cycled(
    named("full", kernel=choice(["auto", "math", "sdpaa"]))
    | named("original")
    | named("ultragen", variant=choice(["paper", "released"]), windows=choice([2, 4]), rank=few)
    | st.builds(lambda b, f: {"name": "branched", "branches": b, "fuse": f}, branches, fuse)
    | st.dictionaries(choice(["0-1", "2-3", "0-3", "4"]), named("full"), max_size=2).map(
        lambda groups: {"name": "by_head", "groups": groups}
    )
    | choice(["ful", "acme/none"])
)
keys = choice(["*", "*", "odd", "even", "0", "0-2", "1-5/2", "last2", "0-1,5", "7", "frist"])
layer_map = st.dictionaries(keys, sometimes_wrong(attention), max_size=2).map(lambda found: {"*": "full", **found})
video = (
    st.lists(few, min_size=2, max_size=3).map(lambda grid: {"grid": grid})
    | st.fixed_dictionaries(
        {"width": choice([64, 80, 96, 100]), "height": choice([48, 64]), "frames": choice([1, 5, 8, 9])}
    )
    | options(grid=few, width=few)
)
backbone = st.builds(
    lambda a, b: {**a, **b},
    choice(
        [
            WAN,
            WAN,
            {"name": "wan", "preset": "t2v_1_3b", "layers": 6},
            {"name": "dit", "dim": 48, "layers": 6, "heads": 4},
        ]
    ),
    options(layers=choice([6, 6, 6, 2]), heads=choice([4, 2, 5])),
)


def recipes() -> st.SearchStrategy[dict[str, Any]]:
    sections = {
        "video": sometimes_wrong(video),
        "backbone": sometimes_wrong(backbone),
        "attention": sometimes_wrong(layer_map),
    }
    more = {
        "name": choice(["x", "a b", "ok-1"]),
        "sampling": options(steps=few, guidance=st.floats(0, 9)),
        "steps": st.dictionaries(
            choice(["0-1", "2", "*", "last1"]), st.dictionaries(keys, attention, max_size=2), max_size=2
        ),
        "dtype": choice(["float32", "bfloat16", "int4"]),
        "seed": st.integers(-1, 5),
        "search": st.just({"space": {"seed": {"choice": [1, 2]}}}),
    }
    return st.fixed_dictionaries(sections, optional={key: sometimes_wrong(value) for key, value in more.items()})
