"""What proves a cut, for models with torch's own attention too."""

import copy

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import headprune as hp
from headprune.nn.replace import own_attention
from headprune.surgery.verify import cut_error


def test_a_re_solved_pool_by_torchs_attention_equals_its_gated_twin():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=4)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    batches = [{"pixel_values": torch.randn(64, 3, 16, 16)} for _ in range(4)]
    with own_attention(model):
        names = [site.name for site in hp.attention_sites(model)]
    plan = hp.PruningPlan.from_keep(model, {names[0]: [0, 2], names[1]: [1], names[2]: [0, 1, 3]})
    pruned = copy.deepcopy(model)
    hp.prune(pruned, plan, batches)
    assert cut_error(model, pruned, plan, lambda model: model(**batches[0]).pooler_output) < 1e-5
