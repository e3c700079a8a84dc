"""SpargeAttention2 in fp64: per query block the best share of key blocks, united with those that hold a share of the mass."""

from __future__ import annotations

import math
from typing import Any

from ultrazoo.testing import Case, plain

from .grouped_tokens import answer, best, each_row, group_scores, heads_of, heaviest, over_groups, real_ones, run_groups


def sparge2(case: Case) -> Any:
    options = plain(case.spec)
    tokens = case.x.shape[1]
    rows, columns = (run_groups(0, tokens, size) for size in options["block"])
    q, k, v, real = heads_of(case)

    def chosen(row: list[float]) -> set[int]:
        count = max(1, math.ceil(round(options["share"] * real_ones(row), 9)))
        return best(row, count) | heaviest(row, options["p"])

    kept = each_row(group_scores(q, k, rows, columns, real), chosen)
    return answer(case, over_groups(case, q, k, v, real, kept, rows, columns))
