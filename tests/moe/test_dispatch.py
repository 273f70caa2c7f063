"""Grouping choices by expert: every choice that is no padding lands in exactly one row of its own expert.

Shapes: T tokens, K experts a token, choices numbered t * K + k.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offmoe.moe.dispatch import Assignment, dispatch

NUM_EXPERTS = 6
choices = st.integers(1, 4).flatmap(
    lambda top_k: st.lists(
        st.lists(st.integers(-2, NUM_EXPERTS + 2), min_size=top_k, max_size=top_k), min_size=1, max_size=9
    )
)


def rows_of(assignment: Assignment) -> list[tuple[int, int]]:
    """(choice, token) of each row, also of the only token's."""
    choices = assignment.choices_N
    if assignment.tokens_N is None:
        assert isinstance(choices, int)
        return [(choices, 0)]
    assert isinstance(choices, torch.Tensor)
    return list(zip(choices.tolist(), assignment.tokens_N.tolist(), strict=True))


@given(ids=choices)
def test_every_choice_is_one_row_of_its_expert(ids: list[list[int]]) -> None:
    expected = [
        (expert, token * len(ids[0]) + k, token)
        for token, choices in enumerate(ids)
        for k, expert in enumerate(choices)
        if 0 <= expert < NUM_EXPERTS
    ]
    assignments = dispatch(torch.tensor(ids), NUM_EXPERTS)
    assert [assignment.num_rows for assignment in assignments] == [len(rows_of(each)) for each in assignments]
    found = [(each.expert_idx, choice, token) for each in assignments for choice, token in rows_of(each)]
    assert found == sorted(expected)  # in order of experts, and an expert's rows in order of tokens


@given(ids=choices.filter(lambda ids: len(ids) > 1))
def test_many_tokens_have_one_assignment_an_expert(ids: list[list[int]]) -> None:
    experts = [assignment.expert_idx for assignment in dispatch(torch.tensor(ids), NUM_EXPERTS)]
    assert len(set(experts)) == len(experts)


def test_one_token_needs_no_index_tensors() -> None:
    assert dispatch(torch.tensor([[5, NUM_EXPERTS, 0, 5, -1]]), NUM_EXPERTS) == [
        Assignment(0, 1, 2, None),
        Assignment(5, 1, 0, None),
        Assignment(5, 1, 3, None),
    ]


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_nothing_but_padding(num_tokens: int) -> None:
    assert dispatch(torch.full((num_tokens, 3), NUM_EXPERTS), NUM_EXPERTS) == []
