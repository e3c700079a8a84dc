"""Video DeltaNet: published shares and counts, scans against explicit inverses, the complement, sizes at the edge."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.oracles.delta import delta as oracle
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.delta import DeltaSpec
from ultrazoo.attention.delta_branch import DeltaBranch, _scan
from ultrazoo.attention.full import FullSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.kernels import record
from ultrazoo.ops.frame_windows import FrameWindows
from ultrazoo.ops.init import initial_tensor
from ultrazoo.options import parse_part
from ultrazoo.spec import Rope, Site
from ultrazoo.testing import assert_close, dense_heads, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

SITE = Site(dim=24, heads=3, head_dim=8, grid=Grid(7, 2, 3), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
# 50 layers of 56 heads of 128 channels on a stream of 5376
H3 = Site(dim=5376, heads=56, head_dim=128, layers=50, grid=Grid(37, 24, 42), rope=Rope((44, 42, 42)), qk_norm=True)


def against_the_oracle(spec: DeltaSpec, site: Site = SITE, **options: bool) -> None:
    scenario = Scenario(Example(spec, site, "one"), torch.float64, **options)
    with torch.no_grad():
        assert_close("output", scenario.run(), oracle(scenario.case()), 1e-10)


@pytest.mark.parametrize(("frames", "share"), [(37, 0.45), (72, 0.25), (102, 0.18)])
def test_published_share_of_the_pairs(frames: int, share: float) -> None:
    site = H3.at(grid=Grid(frames, 24, 42))
    cost = DeltaSpec().cost(site)
    assert cost.pairs / site.tokens**2 == pytest.approx(share, abs=0.006)
    assert cost.attention_flops == 4 * cost.pairs * site.inner


def test_published_cost_of_the_linear_branch() -> None:
    """3 N d D multiply-adds beside the projections, and d^3 per frame and head for each scan."""
    site = H3
    convolved = DeltaSpec(convolve="none").cost(site).other_flops
    N, D, d, C = site.tokens, site.inner, site.head_dim, site.dim
    inner = N * 35 // 37
    gates = 2 * N * C * 56 + 2 * inner * C * 56 + 2 * inner * d * (C + D) + 2 * 35 * d * (C + D)
    # B (I + A)^-1 for each of 35 frames; one scan ends with frame 29, the other with frame 10
    cubes = 2 * 56 * d**3 * (35 + 28 + 25)
    assert convolved - gates - 2 * inner * D * C == 2 * 3 * inner * d * D + cubes


WINDOWS = list(itertools.product((1, 2, 3, 5, 6, 7, 10, 11, 12, 23), (1, 2, 5), (0, 1, 2), (True, False)))


@pytest.mark.parametrize(("frames", "chunk", "radius", "anchors"), WINDOWS)
def test_window_and_branch_share_all_frames_between_them(frames: int, chunk: int, radius: int, anchors: bool) -> None:
    windows = FrameWindows(frames, chunk, radius, anchors)
    rows = {t: group.keys for group in windows.rows for start, stop in group.queries for t in range(start, stop)}
    assert sorted(rows) == list(range(frames))
    assert sum(stop - start for group in windows.rows for start, stop in group.queries) == frames
    beyond = {t: [] for t in range(frames)}
    for window in windows.windows:
        for t in range(window.start, window.stop):
            beyond[t] = [u for side in windows.beyond(window) for u in range(*side)]
    ends = {0, frames - 1} if anchors else set()
    for t in range(frames):
        seen = [u for start, stop in rows[t] for u in range(start, stop)]
        near = {u for u in range(frames) if abs(t // chunk - u // chunk) <= radius}
        assert set(seen) == (set(range(frames)) if t in ends else near | ends)
        # disjoint, and all together
        assert sorted(seen + beyond[t]) == list(range(frames))
    assert windows.covered == (not any(beyond.values()))


def test_scans_equal_the_recurrence_with_an_inverse_per_frame() -> None:
    torch.manual_seed(3)
    frames, tokens, d = 9, 12, 8
    site = SITE.at(grid=Grid(frames, 3, 4))
    branch = DeltaBranch(site, "vdn", "none").double()
    k, v = (torch.randn(2, frames, 3, 4, 24, dtype=torch.float64) for _ in range(2))
    beta = torch.rand(2, frames, 3, 4, 3, dtype=torch.float64)
    log_alpha = -torch.rand(2, frames, 3, d, dtype=torch.float64)
    transition, injection = branch._factors(k, v, beta, log_alpha)
    forth = _scan(transition, injection, range(frames), set(range(frames)))
    back = _scan(transition, injection, range(frames - 1, -1, -1), set(range(frames)))
    for order, found in ((range(frames), forth), (range(frames - 1, -1, -1), back)):
        state = torch.zeros(2, 3, d, d, dtype=torch.float64)
        for t in order:
            keys = torch.nn.functional.normalize(k[:, t].reshape(2, tokens, 3, d), dim=-1).transpose(1, 2)
            values = v[:, t].reshape(2, tokens, 3, d).transpose(1, 2)
            write = torch.diag_embed(beta[:, t].reshape(2, tokens, 3).transpose(1, 2))
            A, B = keys.mT @ write @ keys, values.mT @ write @ keys
            old = state @ torch.diag_embed(log_alpha[:, t].exp())
            state = (old + B) @ torch.linalg.inv(torch.eye(d, dtype=torch.float64) + A)
            assert_close(f"state after frame {t}", found[t], state, 1e-12)
            # the state minimises |S - old|^2 + sum beta |S k - v|^2: its gradient there is zero
            gradient = state - old + (state @ keys.mT - values.mT) @ write @ keys
            assert float(gradient.abs().max()) < 1e-10


def test_states_do_not_lose_digits_over_a_long_clip() -> None:
    """fp32 against fp64 at 100 frames whose decays multiply to almost nothing."""
    site = SITE.at(grid=Grid(100, 1, 2))
    example = Example(DeltaSpec(chunk=2), site, "long")
    with torch.no_grad():
        wide = Scenario(example, torch.float64, batch=1)
        narrow = Scenario(example, torch.float32, batch=1)
        assert error_ratio(narrow.run(), wide.run()) < 5e-6


@pytest.mark.parametrize("rule", ["vdn", "sana_scaled", "vdn_scaled"])
@pytest.mark.parametrize("convolve", ["none", "kv", "qkv"])
def test_every_rule_and_convolution(rule: str, convolve: str) -> None:
    against_the_oracle(DeltaSpec(chunk=1, rule=rule, convolve=convolve))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "grid",
    [Grid(1, 4, 5), Grid(2, 3, 2), Grid(3, 1, 1), Grid(4, 1, 5), Grid(4, 5, 1), Grid(11, 1, 2), Grid(12, 1, 2)],
    ids=str,
)
def test_images_rows_columns_and_short_clips(grid: Grid) -> None:
    for spec in (DeltaSpec(), DeltaSpec(chunk=1, radius=0), DeltaSpec(chunk=1, radius=0, anchors="none")):
        against_the_oracle(spec, SITE.at(grid=grid))


def test_the_stream_may_be_narrower_than_the_heads() -> None:
    against_the_oracle(DeltaSpec(chunk=1), SITE.at(dim=20))


def test_frames_without_a_real_token() -> None:
    scenario = Scenario(Example(DeltaSpec(chunk=1), SITE, "holes"), torch.float64)
    valid = torch.ones(2, *SITE.grid, dtype=torch.bool)
    valid[0, 2] = False
    valid[1, 0] = False
    valid[1, 4:] = False
    scenario.key_valid = valid.flatten(1)
    with torch.no_grad():
        got, expected = scenario.run(), oracle(scenario.case())
    assert_close("valid rows", got[scenario.key_valid], expected[scenario.key_valid], 1e-10)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize(("frames", "chunk"), [(1, 5), (2, 1), (3, 1), (9, 5), (10, 5), (11, 5), (4, 99)])
def test_a_window_that_holds_every_frame_is_gated_full_attention(frames: int, chunk: int) -> None:
    site = SITE.at(grid=Grid(frames, 2, 3))
    spec = DeltaSpec(chunk=chunk)
    assert spec.windows(frames).covered
    assert spec.cost(site).pairs == FullSpec().cost(site).pairs
    scenario = Scenario(Example(spec, site, "covered"), torch.float64)
    case = scenario.case()
    with torch.no_grad(), record() as runs:
        got = scenario.run()
    gate = torch.sigmoid(case.x @ case.weights["softmax_gate.up.weight"].T + case.weights["softmax_gate.up.bias"])
    expected = case.host.out(dense_heads(case) * gate.repeat_interleave(8, dim=-1))
    assert len(runs) == 1
    assert_close("output", got, expected, 1e-10)


def test_the_published_start_keeps_99_percent_of_full_attention() -> None:
    scenario = Scenario(Example(DeltaSpec(), SITE, "start"), torch.float64, random_weights=False)
    with torch.no_grad():
        case = scenario.case()
        assert_close("output", scenario.run(), case.host.out(0.99 * dense_heads(case)), 1e-6)


def test_our_start_is_full_attention_where_the_window_holds_all_and_the_window_elsewhere() -> None:
    ours = {"gate": "none", "init": "zero"}
    for spec in (DeltaSpec(**ours), DeltaSpec(chunk=1, **ours)):  # type: ignore[arg-type]
        scenario = Scenario(Example(spec, SITE, "ours"), torch.float64, random_weights=False)
        case = scenario.case()
        with torch.no_grad():
            got = scenario.run()
            assert_close("output", got, oracle(case), 1e-10)
            same = error_ratio(got, case.host.out(dense_heads(case))) < 1e-10
        assert same == spec.windows(SITE.grid.t).covered
        assert not bool(scenario.runner.attention.to_out_linear.weight.any())


def test_decays_start_as_published() -> None:
    decay = DeltaBranch(H3, "vdn", "kv").alpha
    generator = torch.Generator()
    rate = initial_tensor(decay, "A_log", decay.A_log.shape, generator).exp()
    step = torch.nn.functional.softplus(initial_tensor(decay, "dt_bias", decay.dt_bias.shape, generator))
    assert 1 < float(rate.min()) < 1.5
    assert 15.5 < float(rate.max()) < 16
    assert float(rate.mean()) == pytest.approx(8.5, rel=1e-4)
    assert 1e-3 < float(step.min()) < 1.1e-3
    assert 0.09 < float(step.max()) < 0.1
    assert float(step.log().mean().exp()) == pytest.approx(0.01, rel=1e-3)


def test_the_second_projection_gets_the_first_gradient_when_it_starts_at_zero() -> None:
    example = Example(DeltaSpec(chunk=1, init="zero"), SITE, "zero")
    scenario = Scenario(example, torch.float64, random_weights=False)
    scenario.run().square().sum().backward()
    assert bool(scenario.runner.attention.to_out_linear.weight.grad.any())


def test_sixteen_bit_models_keep_wide_states() -> None:
    """Under autocast as well: A in 16 bits would break the conditioning of I + A."""
    scenario = Scenario(Example(DeltaSpec(chunk=1), SITE, "mixed"), torch.float32)
    seen = []
    branch = scenario.runner.attention.linear_attention
    inner = branch._factors

    def watch(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = inner(*args)
        seen.extend(z.dtype for z in found)
        return found

    branch._factors = watch
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = scenario.run()
    with torch.no_grad():
        assert error_ratio(mixed, scenario.run()) < 2e-2
        Scenario(Example(DeltaSpec(chunk=1), SITE, "half"), torch.bfloat16).run()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"chunk": 0}, "chunk"),
        ({"chunk": -1}, "chunk"),
        ({"chunk": 2.5}, "chunk"),
        ({"radius": -1}, "radius"),
        ({"rule": "delta"}, "rule"),
        ({"anchors": "rows"}, "anchors"),
        ({"convolve": "q"}, "convolve"),
        ({"gate": "tanh"}, "gate"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], path: str) -> None:
    _, problems = parse_part("attention", {"name": "delta", **options})
    assert [problem.path for problem in problems] == [path]


def test_a_kernel_that_nobody_registered_and_a_group_of_heads() -> None:
    assert [problem.path for problem in DeltaSpec(kernel="fast").problems(SITE)] == ["kernel"]
    with pytest.raises(SiteError, match="second output projection"):
        ByHeadSpec(groups={"0-1": DeltaSpec(), "2": FullSpec()}).build(SITE)
