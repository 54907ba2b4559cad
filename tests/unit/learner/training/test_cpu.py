import torch

from learner.training.cpu import use_fast_float32


def test_matrix_products_stay_those_of_float32() -> None:
    use_fast_float32()
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(300, 257, generator=generator), torch.randn(257, 129, generator=generator)
    torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=1e-4, atol=1e-4)
