"""Every family of masked-language models: head on masked positions, evaluation and fills.

Real classes, random weights, compared with the dense head, which is the model's own forward pass,
and with the pipeline.
"""

import re

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, FillMaskPipeline

from mlm_scratch.config import TUTORIAL, changed
from mlm_scratch.evaluate import evaluate
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf.checks import ignores_padding, sparse_head_works, unused_parameters
from mlm_scratch.loader import TokenRows
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import Precision
from mlm_scratch.speed.checks import earliest_gather, first_position_if_packed, ready_mask_works
from mlm_scratch.speed.model import FastMaskedLM
from mlm_scratch.speed.packing import pack
from tests.support.tiny import SENTENCES, batch_of, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
}
FAMILIES = {
    "Luke": BERT_LIKE | {"entity_vocab_size": 4, "entity_emb_size": 8},  # cuts to a row's length
    "Albert": BERT_LIKE | {"embedding_size": 16},
    "Bert": BERT_LIKE,
    "BigBird": BERT_LIKE | {"attention_type": "original_full"},
    "Camembert": BERT_LIKE,
    "ConvBert": BERT_LIKE | {"embedding_size": 32},
    "Data2VecText": BERT_LIKE,
    "Deberta": BERT_LIKE | {"relative_attention": True, "pos_att_type": "c2p|p2c"},
    "DebertaV2": BERT_LIKE | {"relative_attention": True, "pos_att_type": "c2p|p2c"},
    "DistilBert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
        "max_position_embeddings": 70,
    },
    "Electra": BERT_LIKE | {"embedding_size": 16},
    "Ernie": BERT_LIKE,
    "Esm": BERT_LIKE | {"mask_token_id": TOKENIZER.mask_token_id},
    "FNet": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 70,
    },
    "IBert": BERT_LIKE,
    "MegatronBert": BERT_LIKE,
    "MobileBert": BERT_LIKE
    | {
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
    },
    "ModernBert": BERT_LIKE
    | {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
        "local_attention": 8,
    },
    "MPNet": BERT_LIKE,
    "RemBert": BERT_LIKE | {"input_embedding_size": 16, "output_embedding_size": 24},
    "RoFormer": BERT_LIKE | {"embedding_size": 32},
    "Roberta": BERT_LIKE,
    "RobertaPreLayerNorm": BERT_LIKE,
    "SqueezeBert": BERT_LIKE
    | {
        "embedding_size": 32,
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
        "intermediate_groups": 2,
        "output_groups": 2,
    },
    "XLMRoberta": BERT_LIKE,
    "XLMRobertaXL": BERT_LIKE,
}
UNTIED = {
    f"{name}, untied": FAMILIES[name] | {"tie_word_embeddings": False}
    for name in ("Bert", "ModernBert", "Roberta")
}
TYPED = {
    f"{name}, two token types": FAMILIES[name] | {"type_vocab_size": 2}
    for name in ("Roberta", "XLMRoberta")
}
CASES = FAMILIES | UNTIED | TYPED


@pytest.fixture(params=CASES)
def model(request):
    """A small model with random weights, in eval mode."""
    config_class = getattr(transformers, request.param.split(",")[0] + "Config")
    torch.manual_seed(0)
    config = config_class(vocab_size=len(TOKENIZER), pad_token_id=1, **CASES[request.param])
    return AutoModelForMaskedLM.from_config(config).eval()


def batch():
    """Two rows of 12 and 9 tokens, padded; 6 masked positions."""
    encoding = TOKENIZER(
        ["The Milky Way is a spiral", "Water boils"],
        padding="max_length",
        max_length=12,
        truncation=True,
        return_tensors="pt",
    )
    labels = torch.full_like(encoding["input_ids"], -100)
    for row, column in ((0, 1), (0, 2), (0, 10), (1, 0), (1, 3), (1, 5)):
        labels[row, column] = 20 * row + column
    return encoding["input_ids"], encoding["attention_mask"], labels


def test_masked_positions_alone_give_the_dense_loss_and_gradients(model):
    """To the head alone; and to all that follows the last layer's attention."""
    masked_lm = MaskedLM(model)
    assert sparse_head_works(masked_lm)

    def loss_and_gradients():
        model.zero_grad()
        loss_sum = masked_lm(batch_of(*batch()))
        loss_sum.backward()
        named = model.named_parameters()
        return loss_sum.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    masked_lm.dense_head = True
    dense_loss, dense = loss_and_gradients()
    input_ids, attention_mask, labels = batch()
    own = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.item()
    assert dense_loss / 6 == pytest.approx(own, rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in dense.values())
    masked_lm.dense_head = False
    for module in (model.base_model, earliest_gather(masked_lm, 12)):
        masked_lm.gather_after(module)
        loss, gradients = loss_and_gradients()
        assert loss == pytest.approx(dense_loss, rel=1e-5)
        assert gradients.keys() == dense.keys() and dense
        for name, gradient in dense.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest)


# Where the masked positions are gathered in a last layer, where that is not its attention's norm.
NOT_A_NORM = {
    "albert": "",  # its layers are one, run several times
    "esm": "encoder.layer.1.attention.output",  # its norms come before what they are for
    "ibert": "",  # its modules return a scale, too
    "luke": "",  # it cuts off what is longer than a row
    "megatron-bert": "encoder.layer.1.attention.output",
    "mobilebert": "encoder.layer.1.output.bottleneck.LayerNorm",  # its layers have two streams
    "modernbert": "layers.1",  # the sum after its attention belongs to no module
    "roberta-prelayernorm": "encoder.layer.1.attention.output",
    "squeezebert": "",  # (B, H, T) inside
    "xlm-roberta-xl": "encoder.layer.1.attention.output",
}


def test_the_last_layer_can_do_without_the_other_positions(model):
    found = earliest_gather(MaskedLM(model), 12)
    name = next(name for name, module in model.base_model.named_modules() if module is found)
    if model.config.model_type in NOT_A_NORM:
        assert name == NOT_A_NORM[model.config.model_type]
    else:
        assert re.fullmatch(r".*\.1\..*(norm|Norm)", name)


def test_no_zero_of_a_new_model_hides_what_mixes_positions():
    """A layer that is added with a scale of 0 at first, and learns to look at its neighbours."""

    class Neighbours(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.scale = module, torch.nn.Parameter(torch.zeros(32))

        def forward(self, hidden):
            return self.module(hidden) + self.scale * hidden.roll(1, dims=1)

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(TOKENIZER), **BERT_LIKE)
    model = AutoModelForMaskedLM.from_config(config)
    last = model.bert.encoder.layer[1]
    last.output.dropout = Neighbours(last.output.dropout)
    assert earliest_gather(MaskedLM(model), 12) is last.output.LayerNorm


def test_what_has_no_gradient_is_no_place_to_gather():
    """Such as positions that are computed, not learned: nothing can be found out about them."""

    class Computed(torch.nn.Module):
        def forward(self, hidden):
            return torch.ones_like(hidden).detach()

    class WithPositions(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.positions = module, Computed()

        def forward(self, hidden):
            return self.module(hidden) + self.positions(hidden)

    config = transformers.BertConfig(vocab_size=len(TOKENIZER), **BERT_LIKE)
    model = AutoModelForMaskedLM.from_config(config)
    last = model.bert.encoder.layer[1]
    last.output.dropout = WithPositions(last.output.dropout)
    assert earliest_gather(MaskedLM(model), 12) is last.attention.output.LayerNorm


@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_a_layer_that_works_on_chunks_of_positions_gets_all_of_them(chunk):
    """It refuses a number of positions that is not a multiple: any may be masked."""
    settings = BERT_LIKE | {"chunk_size_feed_forward": chunk}
    config = transformers.BertConfig(vocab_size=len(TOKENIZER), **settings)
    masked_lm = MaskedLM(AutoModelForMaskedLM.from_config(config))
    module = earliest_gather(masked_lm, 12)
    works = sparse_head_works(masked_lm)  # it refuses odd rows, too
    assert module is (masked_lm.hf_model.bert if works else None)


def test_a_model_that_refuses_to_be_tried_gathers_at_its_end():
    """Reformer's layers compute their input again in the backward pass."""
    config = transformers.ReformerConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=16,
        feed_forward_size=64,
        attn_layers=["local", "local"],
        local_attn_chunk_length=4,
        axial_pos_embds=False,
        max_position_embeddings=64,
        is_decoder=False,
        pad_token_id=1,
    )
    masked_lm = MaskedLM(AutoModelForMaskedLM.from_config(config))
    assert earliest_gather(masked_lm, 16) in (masked_lm.hf_model.base_model, None)


def test_a_model_that_pads_long_rows_inside_gathers_at_its_end():
    """BigBird's blocks of 4; short rows have all tokens attend to all."""
    settings = BERT_LIKE | {"block_size": 4, "num_random_blocks": 1}
    config = transformers.BigBirdConfig(vocab_size=len(TOKENIZER), pad_token_id=1, **settings)
    masked_lm = MaskedLM(AutoModelForMaskedLM.from_config(config))
    last = masked_lm.hf_model.bert.encoder.layer[1]
    assert earliest_gather(masked_lm, 20) is last.attention.output.LayerNorm
    assert earliest_gather(masked_lm, 64) is masked_lm.hf_model.bert
    assert masked_lm.hf_model.bert.attention_type == "block_sparse"  # as it was


def test_a_ready_attention_mask_is_used_where_it_gives_the_same(model):
    """ModernBERT's local layers would take it in place of their window of 8 tokens."""
    masked_lm = FastMaskedLM(model)
    refused = {"deberta", "deberta-v2", "esm", "modernbert"}
    assert ready_mask_works(masked_lm, 12) == (model.config.model_type not in refused)
    masked_lm.ready_mask = ready_mask_works(masked_lm, 12)
    loss_sum = masked_lm(batch_of(*batch())).item()
    input_ids, attention_mask, labels = batch()
    own = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss.item()
    assert loss_sum / 6 == pytest.approx(own, rel=1e-6)


def test_packed_texts_have_the_gradients_of_padded_ones(model):
    masked_lm = FastMaskedLM(model)
    mixes = {"convbert", "deberta", "deberta-v2", "esm", "fnet", "mobilebert", "modernbert"}
    first = first_position_if_packed(masked_lm, 12)
    assert (first is None) == (model.config.model_type in mixes)
    if first is None:
        return
    masked_lm.first_position = first
    padded = batch_of(*batch())
    packed = batch_of(*pack(*batch(), width=24))  # two texts in one row
    masked_lm.gather_after(earliest_gather(masked_lm, 12))
    assert len(padded.input_ids) == 2 and len(packed.input_ids) == 1
    gradients = []
    for one in (padded, packed):
        model.zero_grad()
        masked_lm.packs = one is packed
        loss_sum = masked_lm(one)
        loss_sum.backward()
        weights = [p for p in model.parameters() if p.grad is not None]
        gradients.append((loss_sum.item(), torch.cat([p.grad.flatten() for p in weights])))
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-5)
    difference = (gradients[1][1] - gradients[0][1]).norm()
    assert difference < 1e-5 * gradients[0][1].norm()


def test_a_window_shows_in_rows_that_are_longer():
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(TOKENIZER),
        pad_token_id=1,
        **FAMILIES["ModernBert"] | {"local_attention": 32},
    )
    masked_lm = FastMaskedLM(AutoModelForMaskedLM.from_config(config))
    works = [ready_mask_works(masked_lm, length) for length in (8, 16, 40, 64)]
    assert works == [True, True, False, False]  # a window reaches 16 tokens to each side


def test_parameters_that_the_loss_never_reaches_are_listed(model):
    """DistributedDataParallel would wait for their gradients."""
    masked_lm = MaskedLM(model)
    unused = unused_parameters(masked_lm)
    assert all(parameter.grad is None for parameter in model.parameters())
    masked_lm(batch_of(*batch())).backward()
    without = [parameter for parameter in model.parameters() if parameter.grad is None]
    assert list(map(id, unused)) == list(map(id, without))


def test_an_attention_mask_of_ones_equals_none(model):
    masked_lm, (input_ids, _, labels) = MaskedLM(model), batch()
    sums = [
        masked_lm(batch_of(input_ids[:1], mask, labels[:1])).item()
        for mask in (None, torch.ones_like(input_ids[:1]))
    ]
    assert sums[0] == sums[1]


def test_evaluation_is_the_same_with_either_head(model):
    encoding = TOKENIZER(SENTENCES, truncation=True, max_length=24)["input_ids"]
    rows = TokenRows(
        np.concatenate(encoding).astype(np.uint16), np.cumsum([0, *map(len, encoding)])
    )
    config = changed(TUTORIAL, eval_batch_size=4, mlm_probability=0.4)
    cpu = Precision(torch.device("cpu"), torch.float32)
    masked_lm, results = MaskedLM(model), []
    for masked_lm.dense_head in (False, True):
        results.append(evaluate(masked_lm, TOKENIZER, rows, config, cpu))
    sparse, dense = results
    assert sparse["eval_loss"] == pytest.approx(dense["eval_loss"], rel=1e-5)
    assert sparse["eval_accuracy"] == dense["eval_accuracy"]


@pytest.mark.parametrize(
    "text", ["The Milky Way is a <mask> galaxy.", "<mask> is the capital of <mask>."]
)
def test_fills_equal_the_pipelines(model, text):
    pipeline = FillMaskPipeline(model=model, tokenizer=TOKENIZER)
    assert fill_mask(model, TOKENIZER, text) == pipeline(text)


def test_a_batch_has_the_fills_of_its_single_texts(model):
    texts = ["A <mask> galaxy.", "The Milky Way is a spiral <mask> and Paris is a capital."]
    together = fill_mask(model, TOKENIZER, texts, top_k=1, batch_size=2)
    alone = fill_mask(model, TOKENIZER, texts, top_k=1)
    same = all(
        one[0]["score"] == pytest.approx(other[0]["score"], rel=1e-3)
        for one, other in zip(together, alone, strict=True)
    )
    leaks = model.config.model_type in ("convbert", "fnet")  # a convolution, a Fourier transform
    assert ignores_padding(model, TOKENIZER) == (not leaks)
    assert same or leaks
