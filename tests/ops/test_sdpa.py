"""Our function under torch's signature: equal to torch's for every way of calling it."""

import pytest
import torch
import torch.nn.functional as F

from headprune import ops
from headprune.errors import InvalidInput
from headprune.head_map import HeadMap
from headprune.ops.sdpa import repeated_heads

RAGGED = HeadMap((0, 0, 0, 1), 2)


def tensors(query=(2, 4, 5, 8), key=(2, 4, 7, 8), value_dim=6, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (query, key, (*key[:-1], value_dim))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("groups", [(2, 0), (0, 2), (0, 1, 2)])
def test_as_many_query_heads_as_key_value_heads_need_not_read_one_each(groups):
    head_map = HeadMap(tuple(kv for kv, size in enumerate(groups) for _ in range(size)), len(groups))
    q, k, v = tensors((2, head_map.query_heads, 5, 8), (2, len(groups), 7, 8))
    expected = F.scaled_dot_product_attention(q, k[:, head_map.kv_of_query], v[:, head_map.kv_of_query])
    assert torch.allclose(ops.scaled_dot_product_attention(q, k, v, head_map=head_map), expected, atol=1e-12)
    assert torch.equal(repeated_heads(k, head_map), k[:, head_map.kv_of_query])


def check(q, k, v, **options):
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    found = ops.scaled_dot_product_attention(q, k, v, **options)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)


SHAPES = [
    ((5, 8), (7, 8)),
    ((4, 5, 8), (4, 7, 8)),
    ((2, 4, 5, 8), (2, 4, 7, 8)),
    ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8)),
    ((3, 4, 5, 8), (1, 4, 7, 8)),
    ((3, 4, 5, 8), (3, 1, 7, 8)),
    ((0, 4, 5, 8), (0, 4, 7, 8)),
]


@pytest.mark.parametrize(("query", "key"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(5, 7).tril(1).bool()}])
def test_every_number_of_dimensions(query, key, options):
    check(*tensors(query, key), **options)


@pytest.mark.parametrize(("length", "kv_len"), [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_causal_is_aligned_top_left(length, kv_len):
    check(*tensors((2, 4, length, 8), (2, 4, kv_len, 8)), is_causal=True)


@pytest.mark.parametrize("shape", [(7,), (5, 1), (4, 5, 7), (4, 1, 7), (2, 4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (1, 1, 1, 7)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_every_mask_that_broadcasts(shape, kind):
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4 if kind == torch.bool else torch.randn(shape, dtype=kind)
    if len(shape) == 1:  # torch takes no 1-D mask
        mask = mask[None]
    check(*tensors(), attn_mask=mask)


def test_a_mask_of_five_dimensions():
    q, k, v = tensors((3, 2, 4, 5, 8), (3, 2, 4, 7, 8))
    check(q, k, v, attn_mask=torch.rand(3, 1, 1, 5, 7) > 0.4)


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_equal_groups_and_ragged_ones(lead):
    q, k, v = tensors((*lead, 4, 5, 8), (*lead, 2, 7, 8))
    check(q, k, v, enable_gqa=True)
    groups = list(RAGGED.kv_of_query)
    expected = F.scaled_dot_product_attention(q, k[..., groups, :, :], v[..., groups, :, :], is_causal=True)
    assert torch.allclose(ops.scaled_dot_product_attention(q, k, v, is_causal=True, head_map=RAGGED), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_dropout_drops_what_torch_drops(scale):
    q, k, v = tensors((2, 4, 5, 8), (2, 2, 7, 8))
    groups = list(RAGGED.kv_of_query)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(q, k[:, groups], v[:, groups], dropout_p=0.5, scale=scale)
    torch.manual_seed(3)
    assert torch.equal(ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5, head_map=RAGGED, scale=scale), expected)


def test_gradients_reach_the_mask_too():
    grads = []
    for function in (F.scaled_dot_product_attention, ops.scaled_dot_product_attention):
        leaves = [tensor.requires_grad_() for tensor in (*tensors(), torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7))]
        function(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(*grads))


def test_it_compiles_whole_and_exports():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return ops.scaled_dot_product_attention(q, k, v, attn_mask=mask, head_map=RAGGED)

    inputs = (*tensors((2, 4, 5, 8), (2, 2, 7, 8), dtype=torch.float32), torch.rand(2, 1, 1, 7) > 0.3)
    expected = Layer()(*inputs)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert torch.equal(torch.export.export(Layer(), inputs).module()(*inputs), expected)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attn_mask": torch.ones(5, 7).bool(), "is_causal": True}, "exclude each other"),
        ({"attn_mask": torch.ones(3, 1, 5, 7).bool()}, "leading dimensions"),
        ({"attn_mask": torch.ones(6, 7).bool()}, "attn_mask has shape"),
        ({"attn_mask": torch.ones(5, 7).int()}, "attn_mask is torch.int32; expected a floating type"),
        ({"head_map": RAGGED}, "key has shape"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1; expected the share to drop, 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, names):
    with pytest.raises(InvalidInput, match=names):
        ops.scaled_dot_product_attention(*tensors(), **options)


def test_vectors_are_named():
    with pytest.raises(InvalidInput, match="query, key, value have 1, 4, 4 dimensions; expected 2 or more"):
        ops.scaled_dot_product_attention(torch.ones(8), *tensors()[1:])


def test_heads_that_do_not_broadcast_are_named():
    with pytest.raises(InvalidInput, match=r"heads .* are \[4\], \[2\], \[2\], which do not broadcast: enable_gqa=True"):
        ops.scaled_dot_product_attention(*tensors((2, 4, 5, 8), (2, 2, 7, 8)))
