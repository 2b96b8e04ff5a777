"""How closely a geometry is followed: nothing is off in the picture itself, and more the further it is moved."""

from __future__ import annotations

import torch

from facegen.evaluation.geometry import edges_found, overlap, points_error


def test_points_are_off_by_shares_of_the_eyes_distance() -> None:
    true = torch.zeros(68, 2)
    true[45] = torch.tensor([20.0, 0.0])
    assert points_error(true, true) == 0
    assert abs(points_error(true + torch.tensor([3.0, 4.0]), true) - 0.25) < 1e-6


def test_parts_overlap_as_far_as_they_do() -> None:
    true = torch.zeros(10, 10, dtype=torch.long)
    true[:, 5:] = 1
    assert overlap(true, true) == 1
    assert abs(overlap(torch.zeros_like(true), true) - 0.25) < 1e-6  # half of one class, nothing of the other
    true[0, 0] = 7
    assert overlap(true, true) == 1


def test_edges_are_found_near_where_they_should_be() -> None:
    picture = torch.zeros(3, 64, 64)
    picture[:, 20:40, 20:40] = 1
    assert edges_found(picture, picture) == 1
    assert edges_found(picture.roll(1, 2), picture) == 1
    assert edges_found(picture.roll(12, 2), picture) < 0.8
    assert edges_found(torch.zeros(3, 64, 64), picture) == 0
