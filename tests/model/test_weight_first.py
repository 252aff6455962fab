"""Products with the weight on the left, against F.linear."""

import pytest
import torch
import torch.nn.functional as F

from model.generation import MOST_ROWS, WeightFirst


@pytest.mark.parametrize("rows", [1, 2, 8, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("outputs", [1, 6, 7])
def test_same_product(rows, outputs):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 16), torch.randn(outputs, 16), torch.randn(outputs)
    expected = F.linear(x, weight), F.linear(x, weight, bias)
    with WeightFirst():
        found = F.linear(x, weight), F.linear(x, weight, bias=bias)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
